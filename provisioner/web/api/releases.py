"""Routes of releases and channels: show, promote, revoke. The bytes go by the boot listener."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final

from apiflask import APIBlueprint
from flask import Response

from provisioner.core.contracts import Archive
from provisioner.core.manifest import FILES, SPDX, Manifest
from provisioner.core.model import Channel, ReleaseRow, ReleaseTest
from provisioner.errors import NotFound

from .auth import Verb, actor, needs
from .release_schemas import (
    ChannelOut,
    ChannelsOut,
    ReleaseDetailOut,
    ReleaseOut,
    ReleasesOut,
    ReleaseTestsOut,
)
from .schemas import ChannelIn, ReleasesQuery, RevocationIn
from .services import ApiServices

Shown = dict[str, Any]

_OF_MANIFEST: Final = (
    *("architecture", "chunk_bytes", "parent", "recipe_digest", "builder", "built_at"),
)


def release_routes(services: ApiServices) -> APIBlueprint:
    """Return the routes under /releases and /channels."""
    api = APIBlueprint("releases", __name__, tag="releases and channels")
    _reads(api, services)
    _parts(api, services)
    _changes(api, services)
    return api


def _reads(api: APIBlueprint, services: ApiServices) -> None:
    releases = services.releases

    @api.get("/releases")
    @api.input(ReleasesQuery, location="query")
    @api.output(ReleasesOut)
    @needs(Verb.READ)
    def list_releases(query_data: ReleasesQuery) -> Shown:
        """List all releases, with the channels that point to them."""
        by_digest = _by_digest(releases.channels())
        rows = releases.list(with_removed=query_data.removed)
        return {"releases": [_release(row, by_digest) for row in rows]}

    @api.get("/releases/<reference>")
    @api.output(ReleaseDetailOut)
    @needs(Verb.READ)
    def get_release(reference: str) -> Shown:
        """Show a release: image@version, image:channel, or (the start of) its digest."""
        row = releases.show(reference)
        return {
            **_release(row, _by_digest(releases.channels())),
            **_details(services, row),
            "tests": [_test(one) for one in releases.tests(row.digest)],
        }

    @api.get("/releases/<reference>/tests")
    @api.output(ReleaseTestsOut)
    @needs(Verb.READ)
    def release_tests(reference: str) -> Shown:
        """Show how a release's tests went, the newest first."""
        return {"tests": [_test(one) for one in releases.tests(reference)]}

    @api.get("/channels")
    @api.output(ChannelsOut)
    @needs(Verb.READ)
    def list_channels() -> Shown:
        """List the channels of all images, and what they point to."""
        return {"channels": [_channel(one) for one in releases.channels()]}


def _parts(api: APIBlueprint, services: ApiServices) -> None:
    def attachment(reference: str, name: str) -> Response:
        manifest = services.releases.manifest(reference)
        data = services.archive.attachment(manifest, name)
        return Response(data, content_type="application/json")

    @api.get("/releases/<reference>/files")
    @api.doc(responses={200: "The signed list of all files, as JSON."})
    @needs(Verb.READ)
    def release_files(reference: str) -> Response:
        """Send the list of a release's files."""
        return attachment(reference, FILES)

    @api.get("/releases/<reference>/spdx")
    @api.doc(responses={200: "The signed list of all packages, as SPDX in JSON."})
    @needs(Verb.READ)
    def release_spdx(reference: str) -> Response:
        """Send the SPDX document of a release."""
        return attachment(reference, SPDX)

    @api.get("/releases/<reference>/log")
    @api.doc(responses={200: "The log as plain text."})
    @needs(Verb.READ)
    def release_log(reference: str) -> Response:
        """Send the log of a release's build."""
        text = services.archive.log(services.releases.show(reference).digest)
        return Response(text, content_type="text/plain; charset=utf-8")


def _changes(api: APIBlueprint, services: ApiServices) -> None:
    releases = services.releases

    @api.put("/channels/<image>/<name>")
    @api.input(ChannelIn)
    @api.output(ChannelOut)
    @needs(Verb.PUBLISH)
    def move_channel(image: str, name: str, json_data: ChannelIn) -> Shown:
        """Let a channel of an image point to one of its releases."""
        row = releases.show(json_data.release)
        if row.image != image:
            raise NotFound(
                f"{row.name} is no release of {image}", expected=f"{image}@…", found=row.name
            )
        return _channel(releases.promote(row.digest, name, actor=actor()))

    @api.post("/releases/<reference>/revoke")
    @api.input(RevocationIn)
    @api.output(ReleaseOut)
    @needs(Verb.PUBLISH)
    def revoke_release(reference: str, json_data: RevocationIn) -> Shown:
        """Stop every deployment of a release, present and to come."""
        row = releases.revoke(reference, json_data.reason, actor=actor())
        return _release(row, _by_digest(releases.channels()))


def _release(row: ReleaseRow, channels: dict[str, list[str]]) -> Shown:
    return {**asdict(row), "name": row.name, "channels": channels.get(row.digest, [])}


def _by_digest(channels: Sequence[Channel]) -> dict[str, list[str]]:
    """Return the names of the channels that point to each release."""
    found: dict[str, list[str]] = defaultdict(list)
    for channel in channels:
        found[channel.digest].append(channel.name)
    return found


def _details(services: ApiServices, row: ReleaseRow) -> Shown:
    """Return what the archive knows besides; nothing where it was told to forget."""
    if row.removed_at is not None:
        nothing = dict.fromkeys(_OF_MANIFEST)
        return {**nothing, "packages": {}, "attachments": {}, "signed_by": [], "record": {}}
    manifest = services.archive.load(row.digest)
    return {
        **{name: getattr(manifest, name) for name in _OF_MANIFEST},
        "packages": dict(manifest.packages),
        "attachments": dict(manifest.attachments),
        "signed_by": list(services.releases.signers(row.digest)),
        "record": _record(services.archive, manifest),
    }


def _record(archive: Archive, manifest: Manifest) -> Shown:
    try:
        return archive.record(manifest.digest)
    except NotFound:  # a bundle need not bring one
        return {}


def _test(test: ReleaseTest) -> Shown:
    return asdict(test)


def _channel(channel: Channel) -> Shown:
    return {**asdict(channel), "name": str(channel), "channel": channel.name}
