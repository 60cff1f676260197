"""Build a golden image from a recipe: one raw disk that starts by BIOS and by UEFI.

Uses no loop device, no mount on this machine, and no network but the package mirrors.
Publishing it is somebody else's work.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import secrets
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from provisioner.core.manifest import Partition, check_version
from provisioner.errors import RequestError, Unavailable
from provisioner.imaging.archive import ReleaseFacts
from provisioner.imaging.base import base_tree
from provisioner.imaging.bootloader import grub_cfg, install_bios, install_uefi
from provisioner.imaging.gpt import BIOS_BOOT, EFI_SYSTEM, SECTOR_BYTES
from provisioner.imaging.mirrors import MirrorState, state_of
from provisioner.imaging.recipe import Recipe
from provisioner.imaging.rootfs import RELEASE_FILE, RootSpec
from provisioner.imaging.tools import as_root_of_a_namespace, run

MIB: Final = 1024 * 1024
# The tree, the raw image and the base tree at once, for an image that is quite full.
SPACE_BYTES_MIN: Final = 4 * 1024 * MIB
ROOT_LIMIT: Final = timedelta(minutes=15)
# Discoverable Partitions Specification, root of this architecture.
ROOT_TYPE: Final = {
    "amd64": "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709",
    "arm64": "B921B045-1DF0-41C3-AF44-4C6F280D3FAE",
}
# Identifiers are derived in this namespace, so that the same inputs give the same image.
_NAMESPACE: Final = uuid.UUID("6f6c9a35-6d0b-4b76-9d0e-0b7a3c6c8a11")

Say = Callable[[str], None]


def quiet(line: str) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class BuiltImage:
    """A raw disk image, and what its builder knows of it."""

    raw: Path
    facts: ReleaseFacts


@contextlib.contextmanager
def built_image(
    recipe: Recipe, version: str, *, cache: Path, now: datetime, say: Say = quiet
) -> Iterator[BuiltImage]:
    """Build the image, yield it, and remove it again.

    cache keeps fetched packages and base trees between builds. now is the time of
    the build (aware). say gets one line for each stage. Works as root, and without
    root where user namespaces and subordinate ids are allowed.

    Raises RequestError for a bad version, Unavailable when a mirror is silent or
    space is short, ToolFailed with the tool's last lines. Nothing but the cache is
    left behind.
    """
    check_version(version)
    if recipe.architecture != "amd64":
        raise RequestError("images are built for amd64 only", found=recipe.architecture)
    cache.mkdir(parents=True, exist_ok=True)
    _require_space(cache)
    work = cache / f"work-{secrets.token_hex(8)}"
    work.mkdir()
    try:
        say("asking the package mirrors")
        mirrors = state_of(recipe.mirrors)
        base = base_tree(recipe, mirrors, cache, say)
        yield _assemble(recipe, version, mirrors, base.archive, work, now, say)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if work.exists():
            # Without root, the tree's files belong to subordinate ids.
            run(as_root_of_a_namespace(["rm", "-rf", "--one-file-system", str(work)]))


def layout(recipe: Recipe) -> tuple[Partition, ...]:
    """Return the partitions: BIOS boot and EFI system where asked for, and then root.

    The root is the last, so that it can grow over the whole disk, and everything
    starts at a whole mebibyte, so that a change in one leaves the chunks of the
    others alone.
    """
    wanted = []
    if "bios" in recipe.firmware:
        wanted.append(("bios", BIOS_BOOT, MIB))
    if "uefi" in recipe.firmware:
        wanted.append(("esp", EFI_SYSTEM, 64 * MIB))
    partitions = []
    start = MIB
    for number, (name, kind, size_bytes) in enumerate(wanted, 1):
        partitions.append(Partition(number, name, kind, start, size_bytes))
        start += size_bytes
    # The last mebibyte holds the second copy of the partition table.
    left = recipe.size_bytes - start - MIB
    root_type = ROOT_TYPE[recipe.architecture]
    partitions.append(Partition(len(wanted) + 1, "root", root_type, start, left))
    return tuple(partitions)


def release_id(recipe: Recipe, version: str, mirrors: MirrorState) -> str:
    """Return the id that names a build's inputs; it stands inside the image."""
    text = f"{recipe.image} {version} {recipe.digest} {mirrors.digest}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _assemble(
    recipe: Recipe,
    version: str,
    mirrors: MirrorState,
    base: Path,
    work: Path,
    now: datetime,
    say: Say,
) -> BuiltImage:
    """Put the disk together in work and return it."""
    raw = work / f"{recipe.image}-{version}.raw"
    identity = release_id(recipe, version, mirrors)
    partitions = layout(recipe)
    by_name = {part.name: part for part in partitions}
    root = by_name["root"]
    epoch_s = int(mirrors.newest_at.timestamp())
    say("writing the partition table")
    with raw.open("xb") as disk:
        disk.truncate(recipe.size_bytes)
    run(
        ["sfdisk", "--quiet", "--no-tell-kernel", "--no-reread", str(raw)],
        stdin=_table(partitions, identity).encode(),
    )
    say("making the root file system")
    _make_root(recipe, version, identity, root, base, work, raw, epoch_s)
    say("installing the boot loaders")
    if "bios" in by_name:
        install_bios(raw, work / "out/boot", by_name["bios"], root, work)
    if "esp" in by_name:
        volume = uuid.UUID(_derived("esp", identity)).int & 0xFFFFFFFF
        install_uefi(
            raw, work / "out/boot", by_name["esp"], root, work, volume=volume, epoch_s=epoch_s
        )
    packages: dict[str, str] = json.loads((work / "out/packages.json").read_text())
    facts = ReleaseFacts(
        image=recipe.image,
        version=version,
        architecture=recipe.architecture,
        firmware=recipe.firmware,
        release_id=identity,
        packages=packages,
        recipe_digest=recipe.digest,
        builder=f"provisioner {own_version()}",
        built_at=now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        root_partition=root.number,
    )
    return BuiltImage(raw, facts)


def _make_root(
    recipe: Recipe,
    version: str,
    identity: str,
    root: Partition,
    base: Path,
    work: Path,
    raw: Path,
    epoch_s: int,
) -> None:
    """Have the root file system made by a child that may own files of every user."""
    (work / "out").mkdir()
    title = f"{recipe.image} {version}"
    release = {"image": recipe.image, "version": version, "release_id": identity}
    spec = RootSpec(
        base=str(base),
        work=str(work),
        out=str(work / "out"),
        raw=str(raw),
        start_bytes=root.start_bytes,
        size_bytes=root.size_bytes,
        # The same for all versions: the file system's checksums are seeded with it, and a
        # new one would change nearly every block of metadata.
        uuid=_derived("root file system", recipe.image),
        hash_seed=_derived("hash seed", recipe.image),
        epoch_s=epoch_s,
        files={
            f"/{RELEASE_FILE}": json.dumps(release, sort_keys=True) + "\n",
            "/boot/grub/grub.cfg": grub_cfg(
                title, _derived("partition root", identity), recipe.arguments
            ),
        },
        image=recipe.image,
        version=version,
    )
    (work / "root.json").write_text(spec.to_json())
    child = [sys.executable, "-m", "provisioner.imaging.rootfs", str(work / "root.json")]
    package_path = str(Path(__file__).resolve().parents[2])
    run(
        as_root_of_a_namespace(child),
        limit=ROOT_LIMIT,
        environment={"PYTHONPATH": package_path},
    )


def _table(partitions: tuple[Partition, ...], identity: str) -> str:
    """Return the table as sfdisk(8) reads it. Its GUIDs are this release's own."""
    lines = ["label: gpt", f"label-id: {_derived('disk', identity)}"]
    for part in partitions:
        lines.append(
            f"{part.number}: start={part.start_bytes // SECTOR_BYTES}, "
            f"size={part.size_bytes // SECTOR_BYTES}, type={part.type}, name={part.name}, "
            f"uuid={_derived(f'partition {part.name}', identity)}"
        )
    return "\n".join(lines) + "\n"


def _derived(purpose: str, seed: str) -> str:
    return str(uuid.uuid5(_NAMESPACE, f"{purpose}/{seed}"))


def own_version() -> str:
    """Return this program's version, also when it runs from a clone that is not installed."""
    try:
        return importlib.metadata.version("provisioner")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _require_space(cache: Path) -> None:
    free = shutil.disk_usage(cache).free
    if free < SPACE_BYTES_MIN:
        raise Unavailable(
            f"not enough space in {cache} to build an image",
            expected=f"{SPACE_BYTES_MIN} bytes free",
            found=f"{free} bytes free",
        )
