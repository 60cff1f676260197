"""The agent's and the reporter's calls: each checked against its token, each one event.

A repeated report gets the same answer again, since any answer may be lost on its way.
"""

from collections.abc import Callable
from dataclasses import replace

from provisioner.core.contracts import AgentToken, Clock, Store, Tx
from provisioner.core.guard import why_not_begun
from provisioner.core.lifecycle import E, NotAllowed, is_allowed
from provisioner.core.model import Host, Json, Operation, Phase, Ticket
from provisioner.core.profile import ProfileUnreadable
from provisioner.errors import TrustError

from .addresses import Addresses
from .agent_access import (
    AGENT,
    SESSION,
    TokenLifetime,
    check_claim,
    check_not_revoked,
    check_same_inventory,
    contested,
    is_repeat,
    known_ticket,
    note_refused_ticket,
    session_record,
    used_ticket,
)
from .agent_bodies import (
    Hello,
    error_in,
    event_of,
    hello_in,
    number_in,
    seconds_in,
    text_in,
)
from .agent_orders import Places, orders_for
from .chance import Derived, digest_of
from .homecoming import Homecoming
from .identity import (
    IdentityDoubtful,
    TicketContested,
    check_identity,
    check_unique,
    with_inventory,
)
from .identity import TicketRefused as TicketRefused
from .identity import TokenRefused as TokenRefused
from .permissions import Permissions
from .token_sessions import ADDRESS, TokenSessions
from .transitions import Transitions


class AgentSessions:
    """What ramdisks and freshly deployed systems say to the service.

    `vendor_data` renders the reporter's vendor data from a nonce; `boot_url` is where
    chunks are fetched, `mirrors` are other origins that have them; `addresses` says what our
    own DHCP gave to whom, where it does.
    """

    def __init__(
        self,
        store: Store,
        transitions: Transitions,
        clock: Clock,
        derived: Derived,
        *,
        boot_url: str,
        mirrors: tuple[str, ...] = (),
        vendor_data: Callable[[str], str],
        addresses: Addresses | None = None,
    ) -> None:
        self._addresses = addresses or Addresses()
        self._lifetime = TokenLifetime(transitions.limits.agent_silence)
        self._store = store
        self._transitions = transitions
        self._clock = clock
        self._derived = derived
        self._places = Places(boot_url, mirrors)
        self._sessions = TokenSessions(store, clock, self._lifetime, self._addresses)
        self._permissions = Permissions(self._sessions, transitions, clock, derived, vendor_data)
        self._homecoming = Homecoming(store, transitions, clock, derived)

    def hello(self, body: Json, source: str) -> Json:
        """Consume the ticket, save the inventory, and return what to do with a token for it.

        The answer may be lost: until something was permitted, the session that used the
        ticket is answered anew. Raises TicketRefused for a ticket that is unknown, expired,
        another host's, or used by another session; the latter also ends the operation for
        the first, as does whoever may be two hosts at once. Raises ProfileUnreadable, which
        ends the operation as well.
        """
        said = hello_in(body)
        try:
            with self._store.begin() as tx:
                answer = self._answer_hello(tx, said, source)
        except ProfileUnreadable as error:
            self._end_unplanned(said, error)
            raise
        if isinstance(answer, TicketRefused):
            raise answer
        return answer

    def _answer_hello(self, tx: Tx, said: Hello, source: str) -> Json | TicketRefused:
        """Return the answer, or the refusal: what it leads to is saved with its record."""
        try:
            return self._hello(tx, said, source)
        except TicketRefused as error:
            note_refused_ticket(tx, said.ticket, error, source, self._clock())
            if isinstance(error, TicketContested | IdentityDoubtful):
                self._stop_contested(tx, said, error)
            return error

    def _stop_contested(self, tx: Tx, said: Hello, error: TicketRefused) -> None:
        """End the operation for all who claim it; nothing starts it again by itself, also when
        it had ended before."""
        _, operation = known_ticket(tx, said.ticket)
        if operation.follow_up_at is not None:
            self._transitions.call_off(tx, operation, error.code)
        if is_allowed(operation, E.CONTESTED):
            self._transitions.apply(
                tx,
                operation.id,
                E.CONTESTED,
                generation=operation.generation,
                actor=AGENT,
                error=error.as_dict(),
            )

    def _end_unplanned(self, said: Hello, error: ProfileUnreadable) -> None:
        """End an operation of which nobody knows any more what it was to do."""
        with self._store.begin() as tx:
            _, operation = known_ticket(tx, said.ticket)
            if is_allowed(operation, E.REFUSED):
                host = tx.host(operation.host_id).name
                self._transitions.apply(
                    tx,
                    operation.id,
                    E.REFUSED,
                    generation=operation.generation,
                    actor=AGENT,
                    error={"host": host, **error.as_dict()},
                )

    def _hello(self, tx: Tx, said: Hello, source: str) -> Json:
        now = self._clock()
        ticket, operation = known_ticket(tx, said.ticket)
        host = tx.host(operation.host_id)
        again = is_repeat(ticket, operation, said)
        if not again:
            check_claim(ticket, operation, host, said, now)
        try:
            self._check_who(tx, operation, ticket, host, said, source)
        except TicketRefused as error:
            if again:
                raise contested(operation, host.name, error.message) from error
            raise
        if again:
            check_same_inventory(operation, said, host)
            # What the lost answer held is of no use to anybody any more.
            tx.revoke_operation(operation.id, now)
        elif ticket.generation != operation.generation or not tx.consume_ticket(ticket.digest, now):
            raise used_ticket(host.name)
        token = self._derived.agent_token(operation.id, operation.generation, host.id)
        tx.add_agent_token(
            AgentToken(
                digest_of(token.reveal()),
                operation.id,
                host.id,
                operation.generation,
                self._lifetime.until(now),
            )
        )
        tx.save_host(with_inventory(host, said.inventory))
        step = self._transitions.apply(
            tx,
            operation.id,
            E.REPORTED if again else E.AGENT_SEEN,
            generation=operation.generation,
            actor=AGENT,
            evidence={ADDRESS: source, SESSION: session_record(said)},
        )
        text = "agent says hello again, without an answer yet" if again else "agent says hello"
        tx.add_event(event_of(now, "agent", text, host, operation))
        return orders_for(tx, step.operation, host, token, self._places, now)

    def _check_who(
        self, tx: Tx, operation: Operation, ticket: Ticket, host: Host, said: Hello, source: str
    ) -> None:
        """Raise TicketRefused unless what came is the ticket's host, can be no other, and has
        not been flagged since the operation started."""
        if (reason := why_not_begun(operation, host)) is not None:
            raise TicketRefused(
                f"host {host.name} is left alone: {reason}",
                host=host.name,
                expected="a host without flags",
                found=reason,
            )
        check_identity(ticket, host, said.inventory)
        check_unique(tx, host, said.inventory)
        doubt = self._addresses.doubt(host.macs, source)
        if doubt is not None:
            raise TicketRefused(
                f"this boot ticket came from an address that is not its host's: {doubt}",
                host=host.name,
                expected="the address that our DHCP gave it",
                found=source,
                hint="is another DHCP server on the provisioning network?",
            )

    def authorise(self, token: str, body: Json, source: str) -> Json:
        """Answer who asks to write. See `Permissions`."""
        return self._permissions.authorise(token, body, source)

    def progress(self, token: str, body: Json, source: str) -> Json:
        """Save a heartbeat. Raises when the agent must stop before its next write."""
        generation = number_in(body, "generation")
        report: Json = {
            key: number_in(body, key)
            for key in ("done_bytes", "total_bytes", "fetched_bytes", "written_bytes")
            if key in body
        }
        with self._sessions.open(token, source) as session:
            tx, operation = session.tx, session.operation
            check_not_revoked(tx, operation)
            is_verifying = body.get("phase") == "verifying"
            event = E.WRITTEN if is_verifying and operation.phase is Phase.WRITING else E.REPORTED
            self._transitions.apply(
                tx, operation.id, event, generation=generation, actor=AGENT, progress=report
            )
            return {"go_on": True}

    def seed(self, token: str, body: Json, source: str) -> Json:
        """Return the seed, once. See `Permissions`."""
        return self._permissions.seed(token, body, source)

    def failed(self, token: str, body: Json, source: str) -> Json:
        """Save why the agent gave up, and tell it when it is to stay in the ramdisk.
        Repeatable."""
        generation = number_in(body, "generation")
        error = error_in(body)
        with self._sessions.open(token, source, ended=True) as session:
            tx, operation, host = session.tx, session.operation, session.host
            if not operation.is_final:
                self._transitions.apply(
                    tx,
                    operation.id,
                    E.AGENT_FAILED,
                    generation=generation,
                    actor=AGENT,
                    error={"host": host.name, **error},
                )
            is_kept = self._transitions.keeps_in_ramdisk(tx.host(host.id))
            return {"then": "stay"} if is_kept else {}

    def done(self, token: str, body: Json, source: str) -> Json:
        """Save that everything was written and read back. Repeatable."""
        generation, release = number_in(body, "generation"), text_in(body, "release")
        evidence: Json = {
            "written_bytes": number_in(body, "written_bytes"),
            "fetched_bytes": number_in(body, "fetched_bytes"),
            "agent_seconds": seconds_in(body),
        }
        with self._sessions.open(token, source) as session:
            tx, operation, host = session.tx, session.operation, session.host
            if release != operation.release:
                raise TrustError(
                    "the agent wrote another release",
                    host=host.name,
                    expected=operation.release,
                    found=release,
                )
            if operation.phase in (Phase.WRITING, Phase.VERIFYING):
                tx.save_host(replace(host, root_disk=operation.evidence.get("disk")))
                self._transitions.apply(
                    tx,
                    operation.id,
                    E.VERIFIED,
                    generation=generation,
                    actor=AGENT,
                    evidence=evidence,
                )
            elif operation.phase not in (Phase.BOOTING, Phase.PROVING):
                raise NotAllowed(
                    "nothing was permitted to be written",
                    host=host.name,
                    found=str(operation.phase),
                )
            return {"restart": "reboot"}

    def compared(self, token: str, body: Json, source: str) -> Json:
        """Save what a comparison found; nothing was written. Repeatable."""
        generation = number_in(body, "generation")
        counts = ("compared_chunks", "differing_chunks", "differing_bytes")
        evidence: Json = {key: number_in(body, key) for key in counts}
        evidence["agent_seconds"] = seconds_in(body)
        now = self._clock()
        with self._sessions.open(token, source, ended=True) as session:
            tx, operation, host = session.tx, session.operation, session.host
            if operation.phase is not Phase.SUCCEEDED:
                self._transitions.apply(
                    tx,
                    operation.id,
                    E.COMPARED,
                    generation=generation,
                    actor=AGENT,
                    evidence=evidence,
                )
                tx.add_event(event_of(now, "agent", _found(evidence), host, operation))
            return {"restart": "reboot"}

    def phone_home(self, body: Json, source: str) -> Json:
        """Judge the report of a freshly booted system. See `Homecoming`."""
        return self._homecoming.phone_home(body, source)


def _found(evidence: Json) -> str:
    differing, compared = evidence["differing_chunks"], evidence["compared_chunks"]
    if not differing:
        return f"the disk equals the release in all {compared} chunks"
    return f"the disk differs from the release in {differing} of {compared} chunks"
