"""Routes of profiles: what makes a host of a release."""

from dataclasses import asdict
from typing import Any

from apiflask import APIBlueprint
from flask import Response

from provisioner.core.model import Profile
from provisioner.core.profile import ProfileUnreadable
from provisioner.service.profiles import NOT_ASKED

from .auth import Verb, actor, needs
from .schemas import ProfileIn, ProfileOut, ProfilesOut, SavedProfileOut
from .services import ApiServices

Shown = dict[str, Any]


def profile_routes(services: ApiServices) -> APIBlueprint:
    """Return the routes under /profiles."""
    api = APIBlueprint("profiles", __name__, tag="profiles")
    profiles = services.profiles

    @api.get("/profiles")
    @api.output(ProfilesOut)
    @needs(Verb.OPERATE)  # a profile may hold secrets of its hosts
    def list_profiles() -> Shown:
        """List the newest revision of every profile."""
        return {"profiles": [_listed(profile) for profile in profiles.list()]}

    @api.get("/profiles/<name>")
    @api.output(ProfileOut)
    @needs(Verb.OPERATE)
    def get_profile(name: str) -> Shown:
        """Show the newest revision of a profile."""
        return _shown(profiles.show(name))

    @api.put("/profiles/<name>")
    @api.input(ProfileIn)
    @api.output(SavedProfileOut)
    @needs(Verb.OPERATE)
    def save_profile(name: str, json_data: ProfileIn) -> Shown:
        """Save a revision of a profile; the same content again changes nothing."""
        found = NOT_ASKED
        if json_data.check_schema:
            found = profiles.check(name, json_data.document)
        saved = profiles.save(name, json_data.document, actor=actor())
        return {**_shown(saved), "schema_check": asdict(found)}

    @api.delete("/profiles/<name>")
    @api.output({}, status_code=204)
    @needs(Verb.OPERATE)
    def delete_profile(name: str) -> Response:
        """Delete a profile that no host uses."""
        profiles.delete(name, actor=actor())
        return Response(status=204)

    return api


def _shown(profile: Profile) -> Shown:
    return {**_named(profile), "document": profile.document}


def _listed(profile: Profile) -> Shown:
    try:
        return _shown(profile)
    except ProfileUnreadable:  # the others are listed all the same
        return {**_named(profile), "document": None}


def _named(profile: Profile) -> Shown:
    return {"name": profile.name, "digest": profile.digest, "created_at": profile.created_at}
