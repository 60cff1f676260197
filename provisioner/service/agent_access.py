"""Who may speak for an operation: boot tickets, agent tokens, and the sessions behind them."""

from datetime import datetime
from typing import Final

from provisioner.core.contracts import AgentToken, Tx
from provisioner.core.model import Event, Host, Json, Kind, Operation, Phase, Ticket
from provisioner.core.releases import check_standing

from .agent_bodies import Hello
from .chance import digest_of
from .identity import TicketRefused, TokenRefused
from .observing import check_acting

AGENT: Final = "agent"
# Where an operation's evidence keeps the session that used its ticket.
SESSION: Final = "agent_session"
# The phase after the hello, in which nothing was permitted yet.
_AFTER_HELLO: Final = {Kind.DEPLOYMENT: Phase.PREPARING, Kind.VERIFICATION: Phase.VERIFYING}


def known_ticket(tx: Tx, text: str) -> tuple[Ticket, Operation]:
    """Return a ticket of ours with its operation. Raises TicketRefused for another text."""
    check_acting(tx)
    ticket = tx.ticket(digest_of(text))
    if ticket is None:
        raise TicketRefused(
            "this boot ticket is not known",
            expected="the ticket of an open operation",
            found="an unknown one",
        )
    return ticket, tx.operation(ticket.operation_id)


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


def note_refused_ticket(
    tx: Tx, ticket_text: str, error: TicketRefused, source: str, now: datetime
) -> None:
    """Record that somebody at `source` came with a ticket that was refused."""
    ticket = tx.ticket(digest_of(ticket_text))
    tx.add_event(
        Event(
            at=now,
            source="agent",
            text=f"boot ticket refused: {error.message}",
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
        tx.audit(now, AGENT, "ticket.refused", subject, why)


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


def session_record(said: Hello) -> Json | None:
    """Return what is kept of a session: its hash, as of every secret."""
    if said.session is None:
        return None
    return {"digest": digest_of(said.session), "attempt": said.attempt}


def session_of(
    tx: Tx, token: str, now: datetime, *, ended: bool = False
) -> tuple[AgentToken, Operation, Host]:
    """Return whom an agent's token speaks for. Raises TokenRefused when it does not (any more).

    `ended` takes the word of an agent whose operation has ended: a repeated last report.
    """
    check_acting(tx)
    agent = tx.agent_token(digest_of(token))
    if agent is None or now >= agent.expires_at:
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


def is_revoked(tx: Tx, operation: Operation) -> bool:
    """Say whether the release of this deployment was revoked."""
    row = tx.release(operation.release or "")
    return row is not None and row.revoked_at is not None


def check_not_revoked(tx: Tx, operation: Operation) -> None:
    """Raise ReleaseRevoked when the release that is being deployed was revoked.

    Revoking ends what deploys it; this holds should such an operation be left all the same.
    """
    row = tx.release(operation.release or "")
    if operation.kind is Kind.DEPLOYMENT and row is not None and row.revoked_at is not None:
        check_standing(row)
