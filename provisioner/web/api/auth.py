"""Who may do what in the operator API: bearer tokens, four roles, refusal by default."""

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any, Final, TypeVar

from flask import Flask, g, request

from provisioner.errors import TrustError
from provisioner.service.tokens import Tokens

from ..bodies import bearer

View = TypeVar("View", bound=Callable[..., Any])


class Verb(StrEnum):
    """What a route does; a route that says nothing is refused to everyone."""

    PUBLIC = "public"
    READ = "read"
    OPERATE = "operate"
    PUBLISH = "publish"
    ADMINISTER = "administer"


MAY: Final[Mapping[str, frozenset[Verb]]] = {
    "viewer": frozenset({Verb.READ}),
    "operator": frozenset({Verb.READ, Verb.OPERATE}),
    "publisher": frozenset({Verb.READ, Verb.PUBLISH}),
    "admin": frozenset({Verb.READ, Verb.OPERATE, Verb.PUBLISH, Verb.ADMINISTER}),
}


class RoleRefused(TrustError):
    """The token is good, and its role does not allow this."""

    code = "role_refused"


def needs(verb: Verb) -> Callable[[View], View]:
    """Mark a view with what its caller must be allowed to do."""

    def mark(view: View) -> View:
        view.needs = verb  # type: ignore[attr-defined]  # read back by `install_auth` below
        return view

    return mark


def install_auth(app: Flask, tokens: Tokens) -> None:
    """Check every request to `app` before its view runs, and before its body is read."""

    @app.before_request
    def check() -> None:
        if request.endpoint is None:
            return  # no such route: a 404, for everyone
        view = app.view_functions[request.endpoint]
        verb = getattr(view, "needs", None)
        if verb is Verb.PUBLIC:
            return
        token = tokens.authenticate(bearer())
        if verb is None or verb not in MAY.get(token.role, frozenset()):
            raise RoleRefused(
                f"token {token.name} may not do this",
                expected=f"a role that may {verb or 'do it'}",
                found=token.role,
                hint="an admin can make one: provisioner token create NAME --role ROLE",
            )
        g.token = token


def actor() -> str:
    """Return who asks, as the audit log names them."""
    return f"token:{g.token.name}"
