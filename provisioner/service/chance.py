"""Ids, tokens and what is derived from the master key. The only place that draws chance.

Tickets, nonces and the like are derived, not stored: the database keeps hashes, and a
boot script that is asked for twice carries the same ticket both times.
"""

import base64
import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from provisioner.core.model import HostId, OperationId, Secret

_OPERATION: Final = re.compile(r"op_([0-9a-f]{8})[0-9a-f]{16}")
_ISSUED: Final = re.compile(
    r"(?P<prefix>bt_|at_|)(?P<operation>op_[0-9a-f]{1,64})\.(?P<generation>[0-9]{1,9})"
    r"(\.(?P<host>host_[0-9a-f]{1,64})\.(?P<chance>[A-Za-z0-9_-]{43}))?\.(?P<mac>[A-Za-z0-9_-]{43})"
)


def utc_now() -> datetime:
    return datetime.now(UTC)


def digest_of(token: str) -> str:
    """Return what is stored of a token: its SHA-256. Tokens are random and 256 bits long,
    so a slow hash would add nothing. What somebody else sent may be no text at all."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def new_host_id() -> HostId:
    return HostId(f"host_{secrets.token_hex(8)}")


def new_operation_id(now: datetime | None = None) -> OperationId:
    """Return an id that begins with the second in which it was drawn: a ticket, token or nonce
    of an operation that nobody knows tells by it whether it was lost with a database."""
    return OperationId(f"op_{int((now or utc_now()).timestamp()):08x}{secrets.token_hex(8)}")


def drawn_at(operation_id: OperationId) -> datetime | None:
    """Return when an operation's id was drawn; None for what is no such id."""
    match = _OPERATION.fullmatch(operation_id)
    return datetime.fromtimestamp(int(match[1], 16), UTC) if match else None


def new_request_id() -> str:
    return f"rq_{secrets.token_hex(8)}"


def new_token(prefix: str) -> Secret:
    return Secret(f"{prefix}_{secrets.token_urlsafe(32)}")


@dataclass(frozen=True)
class Issued:
    """What a text of ours says of itself: what it is, and for which operation. An agent token
    names its host as well."""

    kind: str
    operation_id: OperationId
    generation: int
    host_id: HostId | None = None


class Derived:
    """Secrets of one operation and generation, derived from the service's master key.

    Each says for what it was issued, so that it is recognised as ours when nothing is known of
    it any more: see `issued`.
    """

    def __init__(self, master_key: bytes) -> None:
        self._key = hmac.digest(master_key, b"provisioner derived secrets", "sha256")

    @property
    def key_id(self) -> str:
        """Return what tells this master key from others, and nothing about it."""
        return hmac.digest(self._key, b"key id", "sha256")[:8].hex()

    def _derive(self, purpose: str, operation_id: OperationId, generation: int) -> str:
        text = f"{purpose}:{operation_id}:{generation}".encode()
        mac = hmac.digest(self._key, text, "sha256")
        return base64.urlsafe_b64encode(mac).decode().rstrip("=")

    def ticket(self, operation_id: OperationId, generation: int) -> Secret:
        mac = self._derive("ticket", operation_id, generation)
        return Secret(f"bt_{operation_id}.{generation}.{mac}")

    def nonce(self, operation_id: OperationId, generation: int) -> Secret:
        """Return the nonce that the new system reports; it names its operation."""
        mac = self._derive("nonce", operation_id, generation)
        return Secret(f"{operation_id}.{generation}.{mac}")

    def agent_token(self, operation_id: OperationId, generation: int, host_id: HostId) -> Secret:
        """Return a new token, another one at each call."""
        chance = secrets.token_urlsafe(32)
        mac = self._derive(f"token {host_id} {chance}", operation_id, generation)
        return Secret(f"at_{operation_id}.{generation}.{host_id}.{chance}.{mac}")

    def issued(self, text: str) -> Issued | None:
        """Return for what a text was issued by this service, whatever the database says; None
        for one that was not."""
        match = _ISSUED.fullmatch(text)
        if match is None:
            return None
        operation_id, generation = OperationId(match["operation"]), int(match["generation"])
        host_id = HostId(match["host"]) if match["host"] else None
        kind = {"bt_": "ticket", "at_": "token", "": "nonce"}[match["prefix"]]
        purpose = f"token {host_id} {match['chance']}" if kind == "token" else kind
        if (kind == "token") != (host_id is not None):
            return None
        right = self._derive(purpose, operation_id, generation)
        if not hmac.compare_digest(right, match["mac"]):
            return None
        return Issued(kind, operation_id, generation, host_id)
