"""Tickets, tokens and remembered replies in SQL. Of every secret only a hash arrives here."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final

from sqlalchemy import select

from ..core.contracts import AgentToken, ApiToken
from ..core.model import HostId, Json, OperationId, Ticket
from ..errors import Conflict
from .rows import agent_token_of, api_token_of, ticket_of, ticket_row
from .sql import Queries
from .tables import agent_tokens, api_tokens, replies, tickets

# How long a reply to an Idempotency-Key is remembered.
REPLIES_KEPT: Final = timedelta(days=1)


class PermissionQueries(Queries):
    def add_ticket(self, ticket: Ticket) -> None:
        self._add(tickets, ticket_row(ticket))

    def ticket(self, digest: str) -> Ticket | None:
        row = self._one(select(tickets).where(tickets.c.digest == digest))
        return ticket_of(row) if row is not None else None

    def open_ticket(self, host_id: HostId) -> Ticket | None:
        newest = (
            select(tickets)
            .where(tickets.c.host_id == host_id, tickets.c.consumed_at.is_(None))
            .order_by(tickets.c.generation.desc(), tickets.c.expires_at.desc())
            .limit(1)
        )
        row = self._one(newest)
        return ticket_of(row) if row is not None else None

    def consume_ticket(self, digest: str, at: datetime) -> bool:
        """Consume it; False when it was consumed before, or never was: one wins a race."""
        live = tickets.update().where(tickets.c.digest == digest, tickets.c.consumed_at.is_(None))
        return self._change(live.values(consumed_at=at)) == 1

    def add_agent_token(self, token: AgentToken) -> None:
        self._add(agent_tokens, token.__dict__)

    def agent_token(self, digest: str) -> AgentToken | None:
        row = self._one(select(agent_tokens).where(agent_tokens.c.digest == digest))
        return agent_token_of(row) if row is not None else None

    def renew_agent_token(self, digest: str, until: datetime) -> None:
        mine = agent_tokens.update().where(agent_tokens.c.digest == digest)
        self._change(mine.values(expires_at=until))

    def revoke_operation(self, operation_id: OperationId, at: datetime) -> None:
        table = tickets.c
        live = tickets.update().where(
            table.operation_id == operation_id, table.consumed_at.is_(None)
        )
        self._change(live.values(consumed_at=at))
        mine = agent_tokens.c.operation_id == operation_id
        self._change(agent_tokens.delete().where(mine))

    def add_api_token(self, token: ApiToken) -> None:
        taken = Conflict(
            f"there is a valid token named {token.name} already",
            hint="revoke it first, or choose another name",
        )
        self._add(api_tokens, token.__dict__, taken)

    def api_token(self, digest: str) -> ApiToken | None:
        row = self._one(select(api_tokens).where(api_tokens.c.digest == digest))
        return api_token_of(row) if row is not None else None

    def api_tokens(self) -> Sequence[ApiToken]:
        order = select(api_tokens).order_by(api_tokens.c.name, api_tokens.c.created_at)
        return [api_token_of(row) for row in self._all(order)]

    def revoke_api_token(self, name: str, at: datetime) -> bool:
        table = api_tokens.c
        valid = api_tokens.update().where(table.name == name, table.revoked_at.is_(None))
        return self._change(valid.values(revoked_at=at)) > 0

    def recall(self, key: str) -> Json | None:
        row = self._one(select(replies).where(replies.c.key == key))
        return row["reply"] if row is not None else None

    def remember(self, key: str, reply: Json, at: datetime) -> None:
        """Save the reply. Raises Conflict when the key has one: two requests raced."""
        self._change(replies.delete().where(replies.c.at <= at - REPLIES_KEPT))
        taken = Conflict("a request with this Idempotency-Key was answered just now")
        self._add(replies, {"key": key, "reply": reply, "at": at}, taken)
