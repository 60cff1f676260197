"""The live permission to write, and the heartbeat that keeps it.

Nothing here writes. Whoever does calls `check` right before each write.
"""

import threading
import time
from collections.abc import Callable
from typing import Any, Final

from provisioner.agent.client import ServiceClient
from provisioner.agent.console import say
from provisioner.agent.problems import (
    PermissionExpired,
    PermissionRefused,
    ServiceRefused,
    ServiceUnreachable,
)
from provisioner.errors import ProvisionerError

AUTHORISE: Final = "/agent/v1/authorise"
PROGRESS: Final = "/agent/v1/progress"
# How long a writer waits for a service that restarts before it gives up.
RENEWAL_LIMIT_S: Final = 600.0


class Permission:
    """One operation's permission. `stop` is set as soon as nothing may be written any more."""

    def __init__(
        self,
        client: ServiceClient,
        *,
        generation: int,
        heartbeat_s: float,
        progress: Callable[[], dict[str, Any]],
        renewal_limit_s: float = RENEWAL_LIMIT_S,
    ) -> None:
        self.stop = threading.Event()
        self._client = client
        self._generation = generation
        self._heartbeat_s = heartbeat_s
        self._progress = progress
        self._renewal_limit_s = renewal_limit_s
        self._changed = threading.Condition()
        self._question: dict[str, Any] | None = None
        self._ends_at = 0.0
        self._lasts_s = 0.0
        self._refusal: ProvisionerError | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat_until_over, daemon=True)

    def start(self) -> None:
        """Begin the heartbeat."""
        self._thread.start()

    def end(self) -> None:
        """End the heartbeat; `check` refuses from here on."""
        self._over.set()
        with self._changed:
            self._ends_at = 0.0
        self._thread.join()

    def beat_now(self) -> None:
        """Report at once, such as when a phase begins, besides the regular heartbeat.

        A service that does not answer is no error here, as long as the permission lasts.
        """
        try:
            self._beat()
        except ServiceUnreachable as error:
            say(f"heartbeat: {error.message}")
        except ServiceRefused as error:
            self._refuse(_refused(error))

    def ask(self, question: dict[str, Any], *, patience_s: float) -> None:
        """Ask for the permission to write; from here on it is renewed.

        question names the release and the disk. Raises PermissionRefused or
        ServiceUnreachable.
        """
        try:
            self._renew(question, patience_s=patience_s)
        except ServiceRefused as error:
            raise _refused(error) from error
        self._question = question

    def check(self) -> None:
        """Return while there is permission to write now.

        Waits when it has run out, since the service may be restarting; raises
        PermissionExpired when that lasts too long, and PermissionRefused at once.
        """
        gives_up_at = time.monotonic() + self._renewal_limit_s
        with self._changed:
            while True:
                now = time.monotonic()
                if self._refusal is not None:
                    raise self._refusal
                if now < self._ends_at:
                    return
                if now >= gives_up_at or self._over.is_set():
                    self.stop.set()
                    raise PermissionExpired(
                        "the permission to write ran out and was not renewed",
                        expected=f"a renewal within {self._renewal_limit_s:.0f} s",
                    )
                self._changed.wait(gives_up_at - now)

    def raise_refusal(self) -> None:
        """Raise what the service refused, if it did; unlike `check`, ask for no permission."""
        with self._changed:
            if self._refusal is not None:
                raise self._refusal

    def _beat_until_over(self) -> None:
        while self._refusal is None and not self._over.wait(self._heartbeat_s):
            self.beat_now()

    def _beat(self) -> None:
        body = {"generation": self._generation, **self._progress()}
        answer = self._client.post(PROGRESS, body, patience_s=self._heartbeat_s)
        if answer.get("go_on") is not True:
            self._refuse(PermissionRefused("the service told the agent to stop"))
        elif self._question is not None and self._remaining_s() < self._lasts_s / 2:
            self._renew(self._question, patience_s=self._heartbeat_s)

    def _remaining_s(self) -> float:
        return self._ends_at - time.monotonic()

    def _renew(self, question: dict[str, Any], *, patience_s: float) -> None:
        body = {"generation": self._generation, **question}
        answer = self._client.post(AUTHORISE, body, patience_s=patience_s)
        lasts_s = answer.get("expires_in_s")
        # Counted from when the answer is here: it may have waited for a service that restarts.
        if answer.get("permitted") is not True or not isinstance(lasts_s, int | float):
            raise ServiceRefused("the service did not permit the write", found=repr(answer)[:200])
        with self._changed:
            self._lasts_s = float(lasts_s)
            self._ends_at = time.monotonic() + self._lasts_s
            self._changed.notify_all()

    def _refuse(self, error: ProvisionerError) -> None:
        with self._changed:
            self._refusal = error
            self._changed.notify_all()
        self.stop.set()


def _refused(error: ServiceRefused) -> PermissionRefused:
    return PermissionRefused(
        f"the permission to write was refused: {error.message}",
        expected=error.expected,
        found=error.found,
        hint=error.hint,
    )
