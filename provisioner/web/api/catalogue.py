"""Routes of what deployments are made from: releases and profiles."""

from dataclasses import asdict
from typing import Any

from apiflask import APIBlueprint
from flask import Response

from provisioner.core.model import ReleaseRow

from .auth import Verb, actor, needs
from .schemas import ProfileIn, ProfileOut, ProfilesOut, ReleaseOut, ReleasesOut
from .services import ApiServices

Shown = dict[str, Any]


def catalogue_routes(services: ApiServices) -> APIBlueprint:
    """Return the routes under /releases and /profiles."""
    api = APIBlueprint("catalogue", __name__, tag="releases and profiles")
    _releases(api, services)
    _profiles(api, services)
    return api


def _releases(api: APIBlueprint, services: ApiServices) -> None:
    @api.get("/releases")
    @api.output(ReleasesOut)
    @needs(Verb.READ)
    def list_releases() -> Shown:
        """List all releases."""
        return {"releases": [_release(row) for row in services.releases.list()]}

    @api.get("/releases/<reference>")
    @api.output(ReleaseOut)
    @needs(Verb.READ)
    def get_release(reference: str) -> Shown:
        """Show a release, named image@version or by (the start of) its digest."""
        return _release(services.releases.show(reference))


def _profiles(api: APIBlueprint, services: ApiServices) -> None:
    profiles = services.profiles

    @api.get("/profiles")
    @api.output(ProfilesOut)
    @needs(Verb.READ)
    def list_profiles() -> Shown:
        """List the newest revision of every profile."""
        return {"profiles": [asdict(profile) for profile in profiles.list()]}

    @api.get("/profiles/<name>")
    @api.output(ProfileOut)
    @needs(Verb.READ)
    def get_profile(name: str) -> Shown:
        """Show the newest revision of a profile."""
        return asdict(profiles.show(name))

    @api.put("/profiles/<name>")
    @api.input(ProfileIn)
    @api.output(ProfileOut)
    @needs(Verb.OPERATE)
    def save_profile(name: str, json_data: ProfileIn) -> Shown:
        """Save a revision of a profile; the same content again changes nothing."""
        return asdict(profiles.save(name, json_data.document, actor=actor()))

    @api.delete("/profiles/<name>")
    @api.output({}, status_code=204)
    @needs(Verb.OPERATE)
    def delete_profile(name: str) -> Response:
        """Delete a profile that no host uses."""
        profiles.delete(name, actor=actor())
        return Response(status=204)


def _release(row: ReleaseRow) -> Shown:
    return {**asdict(row), "name": row.name}
