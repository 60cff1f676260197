"""The agent's and the reporter's calls: each checked against its token, each one event.

A repeated report gets the same answer again, since any answer may be lost on its way.
"""

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Final

from provisioner.core.contracts import AgentToken, Clock, Store, Tx
from provisioner.core.disks import Disk, DiskRule, choose_disk
from provisioner.core.guard import WriteRefused, WriteRequest, authorise_write, identity
from provisioner.core.lifecycle import E, NotAllowed
from provisioner.core.model import (
    Event,
    Host,
    Json,
    Operation,
    Phase,
    Profile,
    Ticket,
)
from provisioner.errors import Gone, TrustError

from .agent_bodies import (
    Hello,
    error_in,
    event_of,
    hello_in,
    number_in,
    object_in,
    seconds_in,
    text_in,
)
from .chance import Derived, digest_of, new_token
from .homecoming import Homecoming
from .identity import TicketRefused as TicketRefused
from .identity import TokenRefused as TokenRefused
from .identity import check_identity, with_inventory
from .seeds import render_seed
from .transitions import Transitions

HEARTBEAT_S: Final = 3
PERMISSION_S: Final = 30
# What an agent may need beside its phases: a service that restarts, a slow BMC.
TOKEN_MARGIN: Final = timedelta(hours=1)
AGENT: Final = "agent"
# Where an operation's evidence keeps the session that used its ticket.
SESSION: Final = "agent_session"


class AgentSessions:
    """What ramdisks and freshly deployed systems say to the service.

    `vendor_data` renders the reporter's vendor data from a nonce; `boot_url` is where
    chunks are fetched.
    """

    def __init__(
        self,
        store: Store,
        transitions: Transitions,
        clock: Clock,
        derived: Derived,
        *,
        boot_url: str,
        vendor_data: Callable[[str], str],
    ) -> None:
        self._store = store
        self._transitions = transitions
        self._clock = clock
        self._derived = derived
        self._boot_url = boot_url
        self._vendor_data = vendor_data
        self._homecoming = Homecoming(store, transitions, clock, derived)

    def hello(self, body: Json, source: str) -> Json:
        """Consume the ticket, save the inventory, and return what to do with a token for it.

        The answer may be lost: until something was permitted, the session that used the
        ticket is answered anew. Raises TicketRefused for a ticket that is unknown, expired,
        another host's, or used by another session.
        """
        said = hello_in(body)
        try:
            with self._store.begin() as tx:
                return self._hello(tx, said, source)
        except TicketRefused as error:
            self._note_refused_ticket(said.ticket, error, source)
            raise

    def _hello(self, tx: Tx, said: Hello, source: str) -> Json:
        now = self._clock()
        ticket, operation = self._known_ticket(tx, said.ticket)
        host = tx.host(operation.host_id)
        is_repeat = _is_repeat(ticket, operation, said)
        if not is_repeat:
            _check_ticket(ticket, host, now)
        check_identity(host, said.inventory)
        if is_repeat:
            # What the lost answer held is of no use to anybody any more.
            tx.revoke_operation(operation.id, now)
        elif ticket.generation != operation.generation or not tx.consume_ticket(ticket.digest, now):
            raise _used(host.name)
        token = new_token("at")
        tx.add_agent_token(
            AgentToken(
                digest_of(token.reveal()),
                operation.id,
                host.id,
                operation.generation,
                now + self._transitions.limits.agent_phases + TOKEN_MARGIN,
            )
        )
        tx.save_host(with_inventory(host, said.inventory))
        step = self._transitions.apply(
            tx,
            operation.id,
            E.REPORTED if is_repeat else E.AGENT_SEEN,
            generation=operation.generation,
            actor=AGENT,
            evidence={"agent_address": source, SESSION: _session_record(said)},
        )
        text = "agent says hello again, without an answer yet" if is_repeat else "agent says hello"
        tx.add_event(event_of(now, "agent", text, host, operation))
        profile = self._pinned_profile(tx, operation)
        return {
            "operation": operation.id,
            "generation": operation.generation,
            "kind": operation.kind,
            "host": host.name,
            "token": token.reveal(),
            "heartbeat_s": HEARTBEAT_S,
            "release": step.operation.release,
            "disk_rule": profile.document["disk"] if profile else None,
            "boot_url": self._boot_url,
            "then": "reboot",
        }

    def authorise(self, token: str, body: Json) -> Json:
        """Return a permission to write, or raise WriteRefused. The host is saved as dirty,
        in the same transaction, before the agent hears of it."""
        try:
            return self._authorise(token, body)
        except WriteRefused as error:
            self._note_refused_write(token, error)
            raise

    def _authorise(self, token: str, body: Json) -> Json:
        generation, release = number_in(body, "generation"), text_in(body, "release")
        disk = Disk.from_dict({"rotational": False, "bus": "virtio", **object_in(body, "disk")})
        now = self._clock()
        with self._store.begin() as tx:
            agent, operation, host = self._session(tx, token)
            chosen = self._chosen_disk(tx, operation, host)
            asked = WriteRequest(agent.host_id, generation, release, disk)
            authorise_write(asked, operation, host, chosen, now=now)
            first = operation.phase is Phase.PREPARING
            self._transitions.apply(
                tx,
                operation.id,
                E.WRITE_PERMITTED if first else E.REPORTED,
                generation=generation,
                actor=AGENT,
                evidence={"disk": identity(chosen), "disk_name": chosen.name} if first else None,
            )
            if first:
                where = f"may write {chosen.name}, serial {chosen.serial}, WWN {chosen.wwn}"
                tx.add_event(event_of(now, "agent", where, host, operation))
            return {"permitted": True, "expires_in_s": PERMISSION_S}

    def progress(self, token: str, body: Json) -> Json:
        """Save a heartbeat. Raises when the agent must stop before its next write."""
        generation = number_in(body, "generation")
        report: Json = {
            key: number_in(body, key)
            for key in ("done_bytes", "total_bytes", "fetched_bytes", "written_bytes")
            if key in body
        }
        with self._store.begin() as tx:
            _, operation, _ = self._session(tx, token)
            is_verifying = body.get("phase") == "verifying"
            event = E.WRITTEN if is_verifying and operation.phase is Phase.WRITING else E.REPORTED
            self._transitions.apply(
                tx, operation.id, event, generation=generation, actor=AGENT, progress=report
            )
            return {"go_on": True}

    def seed(self, token: str, body: Json) -> Json:
        """Return the seed, once. Raises Gone the second time."""
        generation = number_in(body, "generation")
        now = self._clock()
        with self._store.begin() as tx:
            _, operation, host = self._session(tx, token)
            if generation != operation.generation or operation.phase not in (
                Phase.WRITING,
                Phase.VERIFYING,
            ):
                raise TokenRefused(
                    "the seed is only for the agent that writes",
                    host=host.name,
                    expected="writing or verifying",
                    found=str(operation.phase),
                )
            taken_before = not tx.take_seed(operation.id, now)
            text = "seed asked for a second time, refused" if taken_before else "seed handed out"
            tx.add_event(event_of(now, "agent", text, host, operation))
            tx.audit(
                now,
                AGENT,
                "seed.refused" if taken_before else "seed.taken",
                host.name,
                {"operation": operation.id},
            )
            profile = self._pinned_profile(tx, operation)
        if taken_before or profile is None:
            raise Gone(
                "the seed has left already", host=host.name, hint="reimage the host for a new one"
            )
        nonce = self._derived.nonce(operation.id, operation.generation)
        documents = render_seed(
            operation, host, profile, vendor_data=self._vendor_data(nonce.reveal())
        )
        return dict(documents)

    def failed(self, token: str, body: Json) -> Json:
        """Save why the agent gave up. Repeatable."""
        generation = number_in(body, "generation")
        error = error_in(body)
        with self._store.begin() as tx:
            _, operation, host = self._session(tx, token, ended=True)
            if not operation.is_final:
                self._transitions.apply(
                    tx,
                    operation.id,
                    E.AGENT_FAILED,
                    generation=generation,
                    actor=AGENT,
                    error={"host": host.name, **error},
                )
            return {}

    def done(self, token: str, body: Json) -> Json:
        """Save that everything was written and read back. Repeatable."""
        generation, release = number_in(body, "generation"), text_in(body, "release")
        evidence: Json = {
            "written_bytes": number_in(body, "written_bytes"),
            "fetched_bytes": number_in(body, "fetched_bytes"),
            "agent_seconds": seconds_in(body),
        }
        with self._store.begin() as tx:
            _, operation, host = self._session(tx, token)
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

    def phone_home(self, body: Json, source: str) -> Json:
        """Judge the report of a freshly booted system. See `Homecoming`."""
        return self._homecoming.phone_home(body, source)

    def _known_ticket(self, tx: Tx, text: str) -> tuple[Ticket, Operation]:
        ticket = tx.ticket(digest_of(text))
        if ticket is None:
            raise TicketRefused(
                "this boot ticket is not known",
                expected="the ticket of an open operation",
                found="an unknown one",
            )
        return ticket, tx.operation(ticket.operation_id)

    def _note_refused_ticket(self, ticket_text: str, error: TicketRefused, source: str) -> None:
        with self._store.begin() as tx:
            ticket = tx.ticket(digest_of(ticket_text))
            text = f"boot ticket refused: {error.message}"
            tx.add_event(
                Event(
                    at=self._clock(),
                    source="agent",
                    text=text,
                    host_id=ticket.host_id if ticket else None,
                    operation_id=ticket.operation_id if ticket else None,
                    detail={"address": source},
                )
            )
            # Anybody on the network can invent tickets. The timeline has a limit, the audit
            # log has none, so only a ticket that was ours once is worth a row in it.
            if ticket is not None:
                why: Json = {"why": error.message, "address": source}
                subject = error.host or tx.host(ticket.host_id).name
                tx.audit(self._clock(), AGENT, "ticket.refused", subject, why)

    def _note_refused_write(self, token: str, error: WriteRefused) -> None:
        with self._store.begin() as tx:
            _, operation, host = self._session(tx, token)
            now, why = self._clock(), f"write refused: {error.message}"
            tx.add_event(event_of(now, "agent", why, host, operation))
            tx.audit(now, AGENT, "write.refused", host.name, error.as_dict())

    def _session(
        self, tx: Tx, token: str, *, ended: bool = False
    ) -> tuple[AgentToken, Operation, Host]:
        agent = tx.agent_token(digest_of(token))
        if agent is None or self._clock() >= agent.expires_at:
            raise TokenRefused(
                "this agent token is not valid (any more)",
                expected="the token of an open operation",
                hint="the operation has ended; nothing more may be written",
            )
        operation = tx.operation(agent.operation_id)
        host = tx.host(operation.host_id)
        if agent.generation != host.generation or (operation.is_final and not ended):
            raise TokenRefused(
                "this agent acts for an operation that is over",
                host=host.name,
                expected=host.generation,
                found=agent.generation,
            )
        return agent, operation, host

    def _pinned_profile(self, tx: Tx, operation: Operation) -> Profile | None:
        digest = operation.pins.get("profile")
        return tx.profile_revision(digest) if digest else None

    def _chosen_disk(self, tx: Tx, operation: Operation, host: Host) -> Disk:
        profile = self._pinned_profile(tx, operation)
        if profile is None or host.inventory is None:
            raise TokenRefused("this operation writes no disk", host=host.name)
        disks = [Disk.from_dict(disk) for disk in host.inventory["disks"]]
        return choose_disk(DiskRule.parse(profile.document["disk"]), disks)


def _is_repeat(ticket: Ticket, operation: Operation, said: Hello) -> bool:
    """Say whether the ramdisk that used the ticket asks again, having got no answer.

    A try that was overtaken by a later one is none: its answer goes to nobody, and would
    take away the token that the later one got.
    """
    known = operation.evidence.get(SESSION) or {}
    return (
        ticket.consumed_at is not None
        and said.session is not None
        and operation.phase is Phase.PREPARING
        and ticket.generation == operation.generation
        and known.get("digest") == digest_of(said.session)
        and said.attempt > int(known.get("attempt", 0))
    )


def _session_record(said: Hello) -> Json | None:
    """Return what is kept of a session: its hash, as of every secret."""
    if said.session is None:
        return None
    return {"digest": digest_of(said.session), "attempt": said.attempt}


def _check_ticket(ticket: Ticket, host: Host, now: datetime) -> None:
    """Raise TicketRefused for a ticket that was used, or has expired."""
    if ticket.consumed_at is not None:
        raise _used(host.name)
    if not ticket.is_live(now):
        raise TicketRefused(
            "this boot ticket has expired",
            host=host.name,
            expected=f"before {ticket.expires_at.isoformat()}",
            found=now.isoformat(),
            hint="request the operation again",
        )


def _used(host: str) -> TicketRefused:
    return TicketRefused(
        "this boot ticket was used already",
        host=host,
        expected="a ticket that nobody used",
        found="a used one",
        hint="if the host restarted by itself, request the operation again",
    )
