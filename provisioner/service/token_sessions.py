"""Whom an agent's call speaks for, by its token, and whether it comes from where its agent is."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from provisioner.core.contracts import AgentToken, Clock, Store, Tx
from provisioner.core.model import Event, Host, Operation

from .addresses import Addresses
from .agent_access import AGENT, TokenLifetime, session_of
from .identity import TokenRefused

# Where an operation's evidence keeps the address that its agent said hello from.
ADDRESS: Final = "agent_address"


@dataclass(frozen=True)
class Session:
    """One call of an agent, in its transaction."""

    tx: Tx
    agent: AgentToken
    operation: Operation
    host: Host


class TokenSessions:
    """Opens a transaction for whoever comes with an agent's token. `addresses` says whether
    hosts keep theirs."""

    def __init__(
        self, store: Store, clock: Clock, lifetime: TokenLifetime, addresses: Addresses
    ) -> None:
        self._store = store
        self._clock = clock
        self._lifetime = lifetime
        self._addresses = addresses

    @contextmanager
    def open(self, token: str, source: str, *, ended: bool = False) -> Iterator[Session]:
        """Give the session of a token that is used at `source`, and let the token live on.

        Raises TokenRefused for one that is not valid (any more), and for one that has left the
        address of its agent, where our own DHCP fixes that; the timeline then says who used it.
        `ended` is that of `session_of`.
        """
        with self._store.begin() as tx:
            now = self._clock()
            agent, operation, host = session_of(tx, token, now, ended=ended)
            known = operation.evidence.get(ADDRESS)
            if known is None or not self._addresses.has_moved(known, source):
                if not operation.is_final:
                    self._lifetime.renew(tx, agent, now)
                yield Session(tx, agent, operation, host)
                return
            tx.add_event(
                Event(
                    at=now,
                    source=AGENT,
                    text=f"agent token refused: it was used from {source}, "
                    f"and its agent is at {known}",
                    host_id=host.id,
                    operation_id=operation.id,
                    detail={"address": source, "expected": known},
                )
            )
        raise TokenRefused(
            "this agent token is not valid at this address",
            host=host.name,
            expected="the address that the agent said hello from",
            found=source,
            hint="if it was not the host itself, somebody has its token: find out who",
        )
