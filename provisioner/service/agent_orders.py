"""What an agent is told to do: the answer to its hello. Holds the token, so it is never logged."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from provisioner.core.contracts import Tx
from provisioner.core.model import Host, Json, Kind, Operation, Profile, Secret

from .lookup import version_floor

HEARTBEAT_S: Final = 3
THEN: Final = "reboot"


@dataclass(frozen=True)
class Places:
    """Where chunks are fetched: `boot_url` is the boot listener, `mirrors` are other origins
    that have them, too."""

    boot_url: str
    mirrors: tuple[str, ...] = ()


def orders_for(
    tx: Tx, operation: Operation, host: Host, token: Secret, places: Places, now: datetime
) -> Json:
    """Return the answer to a hello.

    `channel`, `now` and `minimum_version` can only make the agent stricter than what its
    ramdisk pins.
    """
    profile = pinned_profile(tx, operation)
    row = tx.release(operation.release or "")
    return {
        "operation": operation.id,
        "generation": operation.generation,
        "kind": operation.kind,
        "host": host.name,
        "token": token.reveal(),
        "heartbeat_s": HEARTBEAT_S,
        "release": operation.release,
        "mode": _mode(operation),
        "channel": operation.pins.get("channel"),
        "minimum_version": version_floor(tx, row.image) if row else None,
        "now": now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "disk_rule": profile.document["disk"] if profile else None,
        "boot_url": places.boot_url,
        "mirrors": list(places.mirrors),
        "then": THEN,
    }


def pinned_profile(tx: Tx, operation: Operation) -> Profile | None:
    """Return the revision of the profile that the operation was requested with."""
    digest = operation.pins.get("profile")
    return tx.profile_revision(digest) if digest else None


def _mode(operation: Operation) -> str | None:
    """Return how much of the disk is read and written; None when none of it is."""
    if operation.kind is Kind.VERIFICATION:
        return "verify"
    if operation.kind is not Kind.DEPLOYMENT:
        return None
    return "full" if operation.options.get("full", False) else "delta"
