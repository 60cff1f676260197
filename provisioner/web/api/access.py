"""Routes of who did what and who may: the audit log and API tokens."""

from dataclasses import asdict
from datetime import timedelta
from typing import Any

from apiflask import APIBlueprint
from flask import Response

from provisioner.core.contracts import ApiToken

from .auth import Verb, actor, needs
from .schemas import (
    AuditOut,
    NewTokenOut,
    NumberedPageQuery,
    TokenIn,
    TokensOut,
    VerifiedOut,
)
from .services import ApiServices

Shown = dict[str, Any]


def access_routes(services: ApiServices) -> APIBlueprint:
    """Return the routes under /audit and /tokens."""
    api = APIBlueprint("access", __name__, tag="audit and tokens")
    _audit(api, services)
    _tokens(api, services)
    return api


def _audit(api: APIBlueprint, services: ApiServices) -> None:
    @api.get("/audit")
    @api.input(NumberedPageQuery, location="query")
    @api.output(AuditOut)
    @needs(Verb.READ)
    def list_audit(query_data: NumberedPageQuery) -> Shown:
        """Show rows of the audit log after a number, or the newest; oldest first."""
        rows = services.audit.rows(query_data.after, query_data.limit)
        return {
            "rows": [asdict(row) for row in rows],
            "next": rows[-1].number if rows else None,
        }

    @api.get("/audit/verify")
    @api.output(VerifiedOut)
    @needs(Verb.READ)
    def verify_audit() -> Shown:
        """Check the whole chain of the audit log."""
        return {"rows_checked": services.audit.verify()}


def _tokens(api: APIBlueprint, services: ApiServices) -> None:
    tokens = services.tokens

    @api.get("/tokens")
    @api.output(TokensOut)
    @needs(Verb.ADMINISTER)
    def list_tokens() -> Shown:
        """List API tokens, without their values, which nobody has."""
        return {"tokens": [_token(token) for token in tokens.list()]}

    @api.post("/tokens")
    @api.input(TokenIn)
    @api.output(NewTokenOut, status_code=201)
    @needs(Verb.ADMINISTER)
    def create_token(json_data: TokenIn) -> Shown:
        """Make a token. Its value is in this answer, and never again."""
        seconds = json_data.expires_in_s
        secret = tokens.create(
            json_data.name,
            json_data.role,
            expires_in=timedelta(seconds=seconds) if seconds is not None else None,
            actor=actor(),
        )
        return {"name": json_data.name, "role": json_data.role, "token": secret.reveal()}

    @api.delete("/tokens/<name>")
    @api.output({}, status_code=204)
    @needs(Verb.ADMINISTER)
    def revoke_token(name: str) -> Response:
        """Revoke a token at once."""
        tokens.revoke(name, actor=actor())
        return Response(status=204)


def _token(token: ApiToken) -> Shown:
    shown = asdict(token)
    del shown["digest"]
    return shown
