"""Ids, tokens and what is derived from the master key. The only place that draws chance.

Tickets, nonces and the like are derived, not stored: the database keeps hashes, and a
boot script that is asked for twice carries the same ticket both times.
"""

import base64
import hashlib
import hmac
import secrets
from datetime import UTC, datetime

from provisioner.core.model import HostId, OperationId, Secret


def utc_now() -> datetime:
    return datetime.now(UTC)


def digest_of(token: str) -> str:
    """Return what is stored of a token: its SHA-256. Tokens are random and 256 bits long,
    so a slow hash would add nothing. What somebody else sent may be no text at all."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def new_host_id() -> HostId:
    return HostId(f"host_{secrets.token_hex(8)}")


def new_operation_id() -> OperationId:
    return OperationId(f"op_{secrets.token_hex(8)}")


def new_request_id() -> str:
    return f"rq_{secrets.token_hex(8)}"


def new_token(prefix: str) -> Secret:
    return Secret(f"{prefix}_{secrets.token_urlsafe(32)}")


class Derived:
    """Secrets of one operation and generation, derived from the service's master key."""

    def __init__(self, master_key: bytes) -> None:
        self._key = hmac.digest(master_key, b"provisioner derived secrets", "sha256")

    def _derive(self, purpose: str, operation_id: OperationId, generation: int) -> str:
        text = f"{purpose}:{operation_id}:{generation}".encode()
        mac = hmac.digest(self._key, text, "sha256")
        return base64.urlsafe_b64encode(mac).decode().rstrip("=")

    def ticket(self, operation_id: OperationId, generation: int) -> Secret:
        return Secret(f"bt_{self._derive('ticket', operation_id, generation)}")

    def nonce(self, operation_id: OperationId, generation: int) -> Secret:
        """Return the nonce that the new system reports; it names its operation."""
        return Secret(f"{operation_id}.{self._derive('nonce', operation_id, generation)}")
