"""API tokens of people and programs: made once, shown once, kept as hashes."""

import re
from collections.abc import Sequence
from datetime import timedelta
from typing import ClassVar, Final

from provisioner.core.contracts import ApiToken, Clock, Store
from provisioner.core.model import Secret
from provisioner.errors import NotFound, RequestError, TrustError

from .chance import digest_of, new_token

ROLES: Final = ("viewer", "operator", "publisher", "admin")
# It stands in a path when the token is revoked, and in every audit row of its deeds.
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


class NotAuthenticated(TrustError):
    code = "not_authenticated"
    status: ClassVar[int] = 401


class Tokens:
    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    def create(
        self,
        name: str,
        role: str,
        *,
        expires_in: timedelta | None,
        actor: str,
        value: Secret | None = None,
    ) -> Secret:
        """Make a token and return it, for the only time. `value` is given for the first
        admin token, which `provisioner init` drew."""
        if role not in ROLES:
            raise RequestError(f"there is no role {role}", expected=list(ROLES), found=role)
        if not NAME.fullmatch(name):
            raise RequestError(
                "that is not a usable token name", expected="1 to 64 of A-Z a-z 0-9 . _ @ -"
            )
        secret = value or new_token("pt")
        now = self._clock()
        token = ApiToken(
            digest=digest_of(secret.reveal()),
            name=name,
            role=role,
            created_at=now,
            expires_at=now + expires_in if expires_in else None,
        )
        with self._store.begin() as tx:
            tx.add_api_token(token)
            tx.audit(now, actor, "token.created", name, {"role": role})
        return secret

    def ensure_first_admin(self, value: Secret) -> None:
        """Make the token that `provisioner init` drew known, once."""
        with self._store.read() as tx:
            if tx.api_token(digest_of(value.reveal())) is not None:
                return
        self.create("admin", "admin", expires_in=None, actor="init", value=value)

    def authenticate(self, bearer: str) -> ApiToken:
        with self._store.read() as tx:
            token = tx.api_token(digest_of(bearer))
        if token is None or token.revoked_at is not None:
            raise NotAuthenticated("this token is not known", hint="provisioner token create")
        if token.expires_at is not None and self._clock() >= token.expires_at:
            raise NotAuthenticated(
                f"token {token.name} has expired", hint="provisioner token create"
            )
        return token

    def list(self) -> Sequence[ApiToken]:
        with self._store.read() as tx:
            return tx.api_tokens()

    def revoke(self, name: str, *, actor: str) -> None:
        with self._store.begin() as tx:
            if not tx.revoke_api_token(name, self._clock()):
                raise NotFound(f"there is no live token {name}", found=name)
            tx.audit(self._clock(), actor, "token.revoked", name, {})
