"""The breaker, as people see and close it. It opens by itself: see `facts`."""

from typing import Final

from provisioner.core.contracts import Clock, Store
from provisioner.core.fleet import Breaker
from provisioner.core.model import Event
from provisioner.errors import Conflict, RequestError

from .facts import BREAKER_SUBJECT

REASON_MAX: Final = 500


class Breakers:
    """Shows the breaker, and closes it for a person."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    def show(self) -> Breaker:
        with self._store.read() as tx:
            return tx.breaker()

    def close(self, reason: str, *, actor: str) -> Breaker:
        """Let queued operations start again; failures from before count no more.

        Raises RequestError without a reason, and Conflict when it is closed already.
        """
        if not reason.strip() or len(reason) > REASON_MAX:
            raise RequestError(
                "closing the breaker needs a reason", expected=f"1 to {REASON_MAX} characters"
            )
        with self._store.begin() as tx:
            before = tx.breaker(lock=True)
            if not before.is_open:
                raise Conflict("the breaker is closed", expected="an open one", found="closed")
            now = self._clock()
            after = before.closed(now, actor, reason)
            tx.save_breaker(after)
            detail = {"reason": reason, "was_open_since": str(before.opened_at)}
            tx.audit(now, actor, "breaker.closed", BREAKER_SUBJECT, detail)
            text = f"the breaker was closed by {actor}: {reason}"
            tx.add_event(Event(at=now, source="service", text=text))
            return after
