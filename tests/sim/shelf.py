"""The releases of a simulation: real manifests without bytes, and no signatures to check.

Stands in for the archive and for the folder of ramdisks; both have tests of their own.
"""

from datetime import datetime
from functools import cache
from typing import Final

from provisioner.core.manifest import Manifest, Partition
from provisioner.core.model import Json
from provisioner.errors import NotFound
from provisioner.service.ramdisks import Ramdisks

from .disks import OLD_SYSTEM

RELEASES: Final = 4
RAMDISK: Final = "cd" * 32
_MIB: Final = 1 << 20
_LINUX: Final = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"


@cache
def manifests() -> dict[str, Manifest]:
    """Return the releases by digest."""
    made = (_manifest(number) for number in range(1, RELEASES + 1))
    return {manifest.digest: manifest for manifest in made}


def _manifest(number: int) -> Manifest:
    return Manifest(
        image="tiny",
        version=str(number),
        architecture="amd64",
        size_bytes=8 * _MIB,
        chunk_bytes=_MIB,
        chunks=tuple(f"{number:x}{index:x}" * 32 for index in range(8)),
        firmware=("bios", "uefi"),
        release_id=f"{number:x}" * 32,
        root_digest="d" * 64,
        partitions=(Partition(1, "root", _LINUX, _MIB, 4 * _MIB),),
        packages={"bash": "5.2"},
        recipe_digest="c" * 64,
        builder="sim",
        built_at="2026-11-23T12:00:00Z",
    )


class Shelf(Ramdisks):
    """The `Archive` port, and which ramdisk is the newest."""

    def __init__(self) -> None:
        """Nothing is looked at: everything is in memory."""

    def newest_or_none(self) -> str | None:
        return RAMDISK

    def load(self, digest: str) -> Manifest:
        found = manifests().get(digest)
        if found is None:
            raise NotFound(f"there is no release {digest}")
        return found

    def signed_by(self, digest: str) -> set[str]:
        return {self.load(digest).recipe_digest}

    def check(self, digest: str, *, channel: str | None, now: datetime) -> Manifest:  # noqa: ARG002 # the port's signature
        return self.load(digest)

    def check_signed(self, digest: str) -> Manifest:
        return self.load(digest)

    def attachment(self, manifest: Manifest, name: str) -> bytes:
        raise NotFound(f"{manifest.name} has no {name}")

    def record(self, digest: str) -> Json:
        raise NotFound(f"nothing was noted of {digest}")

    def log(self, digest: str) -> str:
        raise NotFound(f"there is no log of {digest}")

    def digests(self) -> list[str]:
        return list(manifests())

    def release_id(self, release: str) -> str:
        """Return what the system of a release says of itself."""
        return OLD_SYSTEM if release == OLD_SYSTEM else self.load(release).release_id
