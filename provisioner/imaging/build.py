"""Build a golden image from a recipe: one raw disk that starts by BIOS and by UEFI.

Uses no loop device, no mount on this machine, and no network but the package mirrors.
Publishing it is somebody else's work.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from provisioner.core.manifest import FILES as FILES_ATTACHMENT
from provisioner.core.manifest import SPDX, Partition, check_version
from provisioner.errors import RequestError, Unavailable
from provisioner.imaging import rootfs
from provisioner.imaging.archive import ReleaseFacts
from provisioner.imaging.base import current_tree
from provisioner.imaging.bootloader import grub_cfg, install_bios, install_uefi
from provisioner.imaging.build_record import BuildNotes, Say, quiet, record_of
from provisioner.imaging.ext4_sync import prove
from provisioner.imaging.file_manifest import boot_file, parse, to_bytes
from provisioner.imaging.gpt import BIOS_BOOT, EFI_SYSTEM, SECTOR_BYTES, root_partition
from provisioner.imaging.mirrors import MirrorState
from provisioner.imaging.parent import Parent
from provisioner.imaging.recipe import Recipe
from provisioner.imaging.scratch import scratch_folder, told_when_full
from provisioner.imaging.sparse import copy_into
from provisioner.imaging.spdx import InstalledPackages, spdx_document
from provisioner.imaging.tools import ToolFailed, as_root_of_a_namespace, run
from provisioner.own_identity import own_version

MIB: Final = 1024 * 1024
# Two copies of an image's content are there at once (the tree and the file system, then the
# file system and the disk), and they take the space of what is in them, not of their size.
# Assumed are small images that are quite full, and large ones whose room is mostly for later.
SPACE_BYTES_MIN: Final = 4 * 1024 * MIB
FILLED: Final = 1 / 4
ROOT_LIMIT: Final = timedelta(minutes=15)
# Discoverable Partitions Specification, root of this architecture.
ROOT_TYPE: Final = {
    "amd64": "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709",
    "arm64": "B921B045-1DF0-41C3-AF44-4C6F280D3FAE",
}
# Identifiers are derived in this namespace, so that the same inputs give the same image.
_NAMESPACE: Final = uuid.UUID("6f6c9a35-6d0b-4b76-9d0e-0b7a3c6c8a11")


@dataclass(frozen=True)
class BuiltImage:
    """A raw disk image, and what its builder knows of it."""

    raw: Path
    facts: ReleaseFacts


@dataclass(frozen=True)
class _Build:
    """One build under way: what from, where, and what it says on the way."""

    recipe: Recipe
    version: str
    mirrors: MirrorState
    parent: Parent | None
    work: Path
    notes: BuildNotes

    @property
    def out(self) -> Path:
        """Where the child that makes the root leaves its results."""
        return self.work / "out"

    @property
    def identity(self) -> str:
        """The release id."""
        return release_id(self.recipe, self.version, self.mirrors)

    @property
    def epoch_s(self) -> int:
        """The date of the inputs, in seconds since 1970."""
        return int(self.mirrors.newest_at.timestamp())


@contextlib.contextmanager
def built_image(
    recipe: Recipe,
    version: str,
    *,
    cache: Path,
    now: datetime,
    say: Say = quiet,
    parent: Parent | None = None,
    source: Path | None = None,
) -> Iterator[BuiltImage]:
    """Build the image, yield it, and remove it again.

    cache keeps fetched packages and base trees between builds. now is the time of
    the build (aware). say gets one line for each stage. With a parent, the root file
    system is made on the parent's, so that what did not change stays where it was;
    the files are the same as without. source is where the recipe was read from, for
    the record. Works as root, and without root where user namespaces and subordinate
    ids are allowed.

    Raises RequestError for a bad version, or files that do not fit, Unavailable when
    a mirror is silent or changes all the time, when space is short or the disk fills up,
    ToolFailed with the tool's last lines, or when the image does not hold what it should.
    Nothing but the cache is left behind; what a killed build left is cleared by the next.
    """
    check_version(version)
    if recipe.architecture != "amd64":
        raise RequestError("images are built for amd64 only", found=recipe.architecture)
    with scratch_folder(cache, "build") as work:
        with told_when_full(cache):
            _require_space(cache, recipe)
            notes = BuildNotes(now, say)
            mirrors, base = current_tree(recipe, cache, notes.say)
            notes.add(base.log)
            build = _Build(recipe, version, mirrors, parent, work, notes)
            built = _assemble(build, base.archive, source)
        yield built


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


def _assemble(build: _Build, base: Path, source: Path | None) -> BuiltImage:
    """Put the disk together in the build's folder and return it."""
    recipe, notes = build.recipe, build.notes
    raw = build.work / f"{recipe.image}-{build.version}.raw"
    partitions = layout(recipe)
    root = partitions[-1]
    notes.say("writing the partition table")
    _write_table(raw, recipe.size_bytes, partitions, build.identity)
    notes.say("making the root file system")
    _make_root(build, root, base)
    summary = json.loads((build.out / rootfs.SUMMARY).read_text())
    if build.parent and summary["without_parent"]:
        notes.say(f"not built on {build.parent.name}: {summary['without_parent']}")
    copy_into(build.out / rootfs.FILE_SYSTEM, raw, root.start_bytes)
    (build.out / rootfs.FILE_SYSTEM).unlink()
    notes.say("installing the boot loaders")
    _install_boot_loaders(build, raw, partitions)
    notes.say("reading it back")
    files = prove(raw, parse((build.out / rootfs.FILES).read_bytes()), root.start_bytes)
    notes.say("listing the packages")
    spdx = _spdx(build)
    is_on_parent = build.parent is not None and summary["without_parent"] is None
    record = record_of(
        notes, recipe.digest, build.mirrors, source, build.parent, summary["without_parent"]
    )
    facts = ReleaseFacts(
        image=recipe.image,
        version=build.version,
        architecture=recipe.architecture,
        firmware=recipe.firmware,
        release_id=build.identity,
        packages=summary["packages"],
        recipe_digest=recipe.digest,
        builder=f"provisioner {own_version()}",
        # Not the time of the build: building again gives the same release.
        built_at=build.mirrors.newest_at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        root_partition=root.number,
        parent=build.parent.digest if build.parent and is_on_parent else None,
        kernel=boot_file(files, "/vmlinuz"),
        initrd=boot_file(files, "/initrd.img"),
        kernel_arguments=recipe.arguments,
        attachments={FILES_ATTACHMENT: to_bytes(files), SPDX: spdx},
        log=notes.text(),
        record=record,
    )
    return BuiltImage(raw, facts)


def _spdx(build: _Build) -> bytes:
    installed = json.loads((build.out / rootfs.INSTALLED).read_text())
    return spdx_document(
        InstalledPackages(**installed),
        image=build.recipe.image,
        version=build.version,
        architecture=build.recipe.architecture,
        release_id=build.identity,
        created_at=build.mirrors.newest_at,
    )


def _make_root(build: _Build, root: Partition, base: Path) -> None:
    """Have the root file system made by a child that may own files of every user."""
    recipe, version = build.recipe, build.version
    build.out.mkdir()
    release = {"image": recipe.image, "version": version, "release_id": build.identity}
    menu = grub_cfg(
        f"{recipe.image} {version}", _derived("partition root", build.identity), recipe.arguments
    )
    spec = rootfs.RootSpec(
        base=str(base),
        work=str(build.work),
        out=str(build.out),
        size_bytes=root.size_bytes,
        # The same for all versions: the file system's checksums are seeded with it, and a
        # new one would change nearly every block of metadata.
        uuid=_derived("root file system", recipe.image),
        hash_seed=_derived("hash seed", recipe.image),
        epoch_s=build.epoch_s,
        files={
            f"/{rootfs.RELEASE_FILE}": json.dumps(release, sort_keys=True) + "\n",
            "/boot/grub/grub.cfg": menu,
        },
        image=recipe.image,
        version=version,
        parent=str(build.parent.raw) if build.parent else None,
        parent_start_bytes=_root_start(build.parent) if build.parent else 0,
    )
    (build.work / "root.json").write_text(spec.to_json())
    child = [sys.executable, "-m", "provisioner.imaging.rootfs", str(build.work / "root.json")]
    package_path = str(Path(__file__).resolve().parents[2])
    try:
        run(
            as_root_of_a_namespace(child),
            limit=ROOT_LIMIT,
            environment={"PYTHONPATH": package_path},
        )
    except ToolFailed as error:
        raise _told(build.out / rootfs.ERROR, error) from error


def _told(file: Path, error: ToolFailed) -> RequestError | ToolFailed:
    """Return the error that the child left behind, or the one that it failed with."""
    if not file.is_file():
        return error
    value = json.loads(file.read_text())
    kind = RequestError if value.pop("code") == RequestError.code else ToolFailed
    return kind(value.pop("message"), **value)


def _root_start(parent: Parent) -> int:
    root = root_partition(parent.partitions)
    # Where there is none, there is no file system either, and the child will say so.
    return root.start_bytes if root else 0


def _install_boot_loaders(build: _Build, raw: Path, partitions: tuple[Partition, ...]) -> None:
    by_name = {part.name: part for part in partitions}
    boot, root = build.out / "boot", by_name["root"]
    if "bios" in by_name:
        install_bios(raw, boot, by_name["bios"], root, build.work)
    if "esp" in by_name:
        # The same for all versions, so that the partition only changes when what is in it does.
        volume = uuid.UUID(_derived("esp", build.recipe.image)).int & 0xFFFFFFFF
        install_uefi(raw, boot, by_name["esp"], root, build.work, volume=volume)


def _write_table(
    raw: Path, size_bytes: int, partitions: tuple[Partition, ...], identity: str
) -> None:
    """Make a new raw disk with only a partition table on it."""
    with raw.open("xb") as disk:
        disk.truncate(size_bytes)
    run(
        ["sfdisk", "--quiet", "--no-tell-kernel", "--no-reread", str(raw)],
        stdin=_table(partitions, identity).encode(),
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


def space_bytes(recipe: Recipe) -> int:
    """Return how much space must be free for a build to begin."""
    return max(SPACE_BYTES_MIN, int(2 * recipe.size_bytes * FILLED))


def _require_space(cache: Path, recipe: Recipe) -> None:
    free, needed = shutil.disk_usage(cache).free, space_bytes(recipe)
    if free < needed:
        raise Unavailable(
            f"not enough space in {cache} to build an image",
            expected=f"{needed} bytes free",
            found=f"{free} bytes free",
            hint="free some space, or name another folder with --cache",
        )
