"""Who may speak for an operation: boot tickets, agent tokens, and the sessions behind them."""

import json
from datetime import datetime, timedelta
from typing import Final, NoReturn

from provisioner.core.contracts import AgentToken, Tx
from provisioner.core.model import Event, Host, Json, Kind, Operation, Phase, Ticket
from provisioner.core.releases import check_standing

from .agent_bodies import Hello
from .chance import digest_of
from .identity import IdentityDoubtful, TicketContested, TicketRefused, TokenRefused
from .observing import check_acting

AGENT: Final = "agent"
# Where an operation's evidence keeps the session that used its ticket.
SESSION: Final = "agent_session"
# The agent gives up when nobody has answered it for ten minutes.
SERVICE_AWAY_MAX: Final = timedelta(minutes=12)
RENEWED_AFTER: Final = timedelta(minutes=1)
# The phase after the hello, in which nothing was permitted yet.
_AFTER_HELLO: Final = {Kind.DEPLOYMENT: Phase.PREPARING, Kind.VERIFICATION: Phase.VERIFYING}


def known_ticket(tx: Tx, text: str) -> tuple[Ticket, Operation]:
    """Return a ticket of ours with its operation. Raises TicketRefused for another text."""
    check_acting(tx)
    digest = digest_of(text)
    found = tx.ticket(digest)
    # The operation is locked now; whoever came a moment earlier has left its mark.
    operation = tx.operation(found.operation_id) if found is not None else None
    ticket = tx.ticket(digest)
    if ticket is None or operation is None:
        raise TicketRefused(
            "this boot ticket is not known",
            expected="the ticket of an open operation",
            found="an unknown one",
        )
    return ticket, operation


def check_ticket(ticket: Ticket, host: Host, now: datetime) -> None:
    """Raise TicketRefused for a ticket that was used, or has expired."""
    if ticket.consumed_at is not None:
        raise used_ticket(host.name)
    if not ticket.is_live(now):
        raise TicketRefused(
            "this boot ticket has expired",
            host=host.name,
            expected=f"before {ticket.expires_at.isoformat()}",
            found=now.isoformat(),
            hint="request the operation again",
        )


def used_ticket(host: str) -> TicketRefused:
    """Return the error for a ticket that somebody used before."""
    return TicketRefused(
        "this boot ticket was used already",
        host=host,
        expected="a ticket that nobody used",
        found="a used one",
        hint="if the host restarted by itself, request the operation again",
    )


def check_claim(
    ticket: Ticket, operation: Operation, host: Host, said: Hello, now: datetime
) -> None:
    """Raise TicketRefused for a ticket that was used or has expired, and TicketContested when
    somebody else has used it: also when that has ended the operation, or whoever comes first
    could silence the alarm by saying quickly that it failed.

    The session that used it may come late and again; it is nobody else. A ticket that was
    taken back unused has no session.
    """
    known = operation.evidence.get(SESSION) or {}
    is_same = said.session is not None and known.get("digest") == digest_of(said.session)
    was_used = bool(known) or not operation.is_final
    if ticket.consumed_at is not None and was_used and not is_same:
        raise contested(operation, host.name, "another session")
    check_ticket(ticket, host, now)


def contested(operation: Operation, host: str, found: str) -> TicketContested:
    """Return the error for the second who comes with a ticket."""
    first = operation.evidence.get("agent_address", "unknown")
    return TicketContested(
        f"the boot ticket of host {host} was used by two",
        host=host,
        expected=f"only the session that used it first, from {first}",
        found=found,
        hint="somebody on the provisioning network saw the ticket: find out who, before the "
        "host is reimaged again",
    )


def note_refused_ticket(
    tx: Tx, ticket_text: str, error: TicketRefused, source: str, now: datetime
) -> None:
    """Record that somebody at `source` came with a ticket that was refused."""
    ticket = tx.ticket(digest_of(ticket_text))
    is_alarm = isinstance(error, TicketContested | IdentityDoubtful)
    what = f"{error.code}: " if is_alarm else "boot ticket refused: "
    tx.add_event(
        Event(
            at=now,
            source="agent",
            text=f"{what}{error.message}",
            host_id=ticket.host_id if ticket else None,
            operation_id=ticket.operation_id if ticket else None,
            detail={"address": source, "found": error.found} if is_alarm else {"address": source},
        )
    )
    # Anybody on the network can invent tickets, and repeat one that they heard. The timeline
    # has a limit, the audit log has none, so only a ticket that was ours once is worth a row
    # in it, and the same from the same address only one.
    if ticket is not None and _is_news(tx, f"{error.code} {ticket.digest} {source}", now):
        why: Json = {"why": error.message, "address": source}
        if is_alarm:
            why |= {"expected": error.expected, "found": error.found}
        subject = error.host or tx.host(ticket.host_id).name
        tx.audit(now, AGENT, error.code if is_alarm else "ticket.refused", subject, why)


def _is_news(tx: Tx, refusal: str, now: datetime) -> bool:
    """Say whether this was not refused before, and keep that it was."""
    if tx.recall(refusal) is not None:
        return False
    tx.remember(refusal, {}, now)
    return True


def is_repeat(ticket: Ticket, operation: Operation, said: Hello) -> bool:
    """Say whether the ramdisk that used the ticket asks again, having got no answer.

    A try that was overtaken by a later one is none: its answer goes to nobody, and would
    take away the token that the later one got.
    """
    known = operation.evidence.get(SESSION) or {}
    return (
        ticket.consumed_at is not None
        and said.session is not None
        and operation.phase is _AFTER_HELLO.get(operation.kind)
        and ticket.generation == operation.generation
        and known.get("digest") == digest_of(said.session)
        and said.attempt > int(known.get("attempt", 0))
    )


def check_same_inventory(operation: Operation, said: Hello, host: Host) -> None:
    """Raise TicketContested when a session that asks again brings another inventory.

    The disk to write is chosen from it, by the rule that the first answer told. A ramdisk
    repeats what it said; whoever makes an inventory fit the rule is none.
    """
    known = operation.evidence.get(SESSION) or {}
    if known.get("inventory", _digest_of_inventory(said)) != _digest_of_inventory(said):
        raise contested(operation, host.name, "its session again, with another inventory")


def session_record(said: Hello) -> Json | None:
    """Return what is kept of a session: its hash, as of every secret, and what it brought."""
    if said.session is None:
        return None
    return {
        "digest": digest_of(said.session),
        "attempt": said.attempt,
        "inventory": _digest_of_inventory(said),
    }


def _digest_of_inventory(said: Hello) -> str:
    return digest_of(json.dumps(said.inventory, sort_keys=True))


class TokenLifetime:
    """How long an agent's token lasts, counted from the last word of its agent.

    As long as an agent may be silent, and what it waits for a service that restarts.
    """

    def __init__(self, agent_silence: timedelta) -> None:
        self.lifetime = agent_silence + SERVICE_AWAY_MAX

    def until(self, now: datetime) -> datetime:
        return now + self.lifetime

    def renew(self, tx: Tx, agent: AgentToken, now: datetime) -> None:
        """Let a token in use live on. Not at every heartbeat: a few seconds change nothing."""
        if agent.expires_at - now < self.lifetime - RENEWED_AFTER:
            tx.renew_agent_token(agent.digest, self.until(now))


def session_of(
    tx: Tx, token: str, now: datetime, *, ended: bool = False
) -> tuple[AgentToken, Operation, Host]:
    """Return whom an agent's token speaks for. Raises TokenRefused when it does not (any more).

    `ended` takes the word of an agent whose operation has ended: a repeated last report.
    """
    check_acting(tx)
    agent = tx.agent_token(digest_of(token))
    if agent is None or now >= agent.expires_at:
        _refuse_token()
    operation = tx.operation(agent.operation_id)
    host = tx.host(operation.host_id)
    if tx.agent_token(agent.digest) is None:
        _refuse_token()  # revoked while we waited for the operation
    if agent.generation != host.generation or (operation.is_final and not ended):
        raise TokenRefused(
            "this agent acts for an operation that is over",
            host=host.name,
            expected=host.generation,
            found=agent.generation,
        )
    return agent, operation, host


def _refuse_token() -> NoReturn:
    raise TokenRefused(
        "this agent token is not valid (any more)",
        expected="the token of an open operation, used without long pauses",
        hint="the operation has ended, or its agent was silent; nothing more may be written",
    )


def check_not_revoked(tx: Tx, operation: Operation) -> None:
    """Raise ReleaseRevoked when the release that is being deployed was revoked.

    Revoking ends what deploys it; this holds should such an operation be left all the same.
    """
    row = tx.release(operation.release or "")
    if operation.kind is Kind.DEPLOYMENT and row is not None and row.revoked_at is not None:
        check_standing(row)
