"""Moves a channel to a release, in the caller's transaction."""

from datetime import datetime

from provisioner.core.contracts import Tx
from provisioner.core.manifest import Manifest
from provisioner.core.model import Channel, Json
from provisioner.core.releases import CHANNELS_PER_IMAGE_MAX, check_standing, check_tested
from provisioner.core.trust import check_version_floor
from provisioner.errors import Conflict

from .lookup import version_floor


def move_channel(
    tx: Tx, manifest: Manifest, name: str, *, asks_for_test: bool, now: datetime, actor: str
) -> Channel:
    """Return the channel, which points to the release from now on.

    Its signatures and expiry were judged by the caller. Raises what `Releases.promote` does.
    """
    # Held, so that nobody removes or revokes it before the channel refers to it.
    row = tx.hold_release(manifest.digest)
    check_standing(row)
    check_version_floor(manifest, version_floor(tx, row.image))
    if asks_for_test:
        check_tested(row, tx.release_tests(row.digest), name)
    before = tx.channel(row.image, name)
    if before is not None and before.digest == row.digest:
        return before
    if before is None and len(tx.channels(row.image)) >= CHANNELS_PER_IMAGE_MAX:
        raise Conflict(f"image {row.image} has too many channels", expected=CHANNELS_PER_IMAGE_MAX)
    channel = Channel(row.image, name, row.digest, row.name, now, actor)
    tx.save_channel(channel)
    came_from = before.release_name if before is not None else None
    detail: Json = {"digest": row.digest, "from": came_from, "to": row.name}
    tx.audit(now, actor, "channel.moved", str(channel), detail)
    return channel
