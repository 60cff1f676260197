"""`Idempotency-Key`: a change that is sent twice is carried out once.

The reply to a change is kept under the caller, the route and the key, after the change. What
starts operations keeps the key with them, in its own transaction, and knows itself again when no
reply was kept: see `asked`. Another change may be carried out again then, if it does not refuse
what has happened already (a name in use).
"""

import hashlib
import json
import threading
from datetime import UTC, datetime
from typing import Final

import structlog
from flask import Flask, Response, g, request

from provisioner.core.contracts import Store
from provisioner.errors import Conflict, RequestError, Unavailable
from provisioner.service.selections import Asked

log = structlog.get_logger(__name__)

HEADER: Final = "Idempotency-Key"
KEY_CHARACTERS_MAX: Final = 128
REPLY_BYTES_MAX: Final = 1024 * 1024
# Requests with one key wait for each other within this process; keys share these locks.
LOCKS: Final = 64
LOCK_WAIT_S: Final = 30.0
_CHANGES: Final = frozenset({"POST", "PUT", "PATCH", "DELETE"})
# These replies hold what is kept only as a hash, or sealed. The token's name guards instead,
# and a profile that is saved twice is the same revision.
_NEVER_KEPT: Final = ("/api/v1/tokens", "/api/v1/profiles/")


def install_idempotency(app: Flask, store: Store) -> None:
    """Make every change of `app` honour the header. Install it after the authentication."""
    locks = [threading.Lock() for _ in range(LOCKS)]

    @app.before_request
    def replay() -> Response | None:
        key = _key()
        if key is None:
            return None
        lock = locks[int(key[:8], 16) % LOCKS]
        if not lock.acquire(timeout=LOCK_WAIT_S):
            raise Conflict("a request with this Idempotency-Key is still being carried out")
        g.idempotency_lock = lock
        with store.read() as tx:
            kept = tx.recall(key)
        if kept is None:
            g.idempotency_key = key
            return None
        if kept["request"] != _request_digest():
            raise RequestError(
                "this Idempotency-Key was used for another request",
                hint="use a new key for each change",
            )
        response = Response(kept["body"], kept["status"], content_type=kept["content_type"])
        response.headers["Idempotency-Replayed"] = "true"
        return response

    @app.after_request
    def keep(response: Response) -> Response:
        key = g.pop("idempotency_key", None)
        if key is None or not 200 <= response.status_code < 300:
            return response
        body = response.get_data(as_text=True)
        if len(body) <= REPLY_BYTES_MAX:
            reply = {
                "request": _request_digest(),
                "status": response.status_code,
                "content_type": response.content_type,
                "body": body,
            }
            try:
                with store.begin() as tx:
                    tx.remember(key, reply, datetime.now(UTC))
            except Unavailable as error:
                # The change was made, and its caller is told so. Repeated, what starts operations
                # finds them; any other change is made once more, or refuses itself.
                log.warning("reply not kept", why=error.message)
        return response

    @app.teardown_request
    def release(_error: BaseException | None) -> None:
        lock = g.pop("idempotency_lock", None)
        if lock is not None:
            lock.release()


def asked() -> Asked | None:
    """Return by what a request is known again when no reply to it was kept; None when its
    caller gave it no key."""
    key = g.get("idempotency_key")
    return Asked(f"rq_{key[:32]}", _request_digest()) if key is not None else None


def _key() -> str | None:
    """Return under what the reply is kept: a hash over caller, route and key."""
    given = request.headers.get(HEADER)
    if given is None or request.method not in _CHANGES or request.path.startswith(_NEVER_KEPT):
        return None
    if request.endpoint is None or g.get("token") is None:
        return None
    if not given or len(given) > KEY_CHARACTERS_MAX or not given.isprintable():
        raise RequestError(
            f"the {HEADER} is not usable", expected=f"1 to {KEY_CHARACTERS_MAX} characters"
        )
    parts = [g.token.digest, request.method, request.path, given]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _request_digest() -> str:
    return hashlib.sha256(request.get_data(cache=True)).hexdigest()
