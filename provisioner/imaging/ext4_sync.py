"""Make a file system hold what a folder holds, moving as few blocks as possible.

One way for both kinds of build: from nothing, the file system is an empty one; on a
parent, it is the parent's. debugfs(8) writes, our own reader (`ext4`) proves. No mount.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Final

from provisioner.errors import RequestError
from provisioner.imaging.ext4 import Ext4
from provisioner.imaging.ext4_plan import BLOCK_BYTES, Plan, plan
from provisioner.imaging.file_manifest import DIFFERENCES_SHOWN_MAX, FileEntry, differences
from provisioner.imaging.sparse import data_ranges, write_all
from provisioner.imaging.tools import ToolFailed, find_tool, run

# Debian 12's GRUB 2.06 cannot read file systems with metadata_csum_seed. All features are
# named, so that the builder's own mke2fs.conf and version do not choose them.
CONFIGURATION: Final = """[defaults]
base_features = sparse_super,large_file,filetype,resize_inode,dir_index,ext_attr
default_mntopts = acl,user_xattr
enable_periodic_fsck = 0
blocksize = 4096
inode_size = 256
inode_ratio = 16384
[fs_types]
ext4 = {
features = has_journal,extent,huge_file,flex_bg,metadata_csum,64bit,dir_nlink,extra_isize
}
"""
_PIECE_BYTES: Final = 256 * BLOCK_BYTES
_ZEROS: Final = bytes(BLOCK_BYTES)
# debugfs's first line of messages is always its name and version.
_BANNER: Final = re.compile(r"debugfs \d\S* \(\S+\)")


def make_empty(image: Path, size_bytes: int, uuid: str, hash_seed: str, epoch_s: int) -> None:
    """Make an empty ext4 in a new sparse file, the same for the same arguments."""
    with image.open("xb") as file:
        file.truncate(size_bytes)
    configuration = image.with_suffix(".conf")
    configuration.write_text(CONFIGURATION)
    # The image is zero outside of what mke2fs writes, and chunks that are zero are made
    # zero on the disk, too: nothing is left for the kernel to initialise later.
    extended = f"hash_seed={hash_seed},root_owner=0:0,lazy_itable_init=0,nodiscard"
    run(
        [
            *("mke2fs", "-q", "-F", "-t", "ext4", "-m", "1", "-L", "root", "-U", uuid),
            *("-E", extended, str(image)),
        ],
        environment={
            "MKE2FS_CONFIG": str(configuration),
            "SOURCE_DATE_EPOCH": str(epoch_s),
            "E2FSPROGS_FAKE_TIME": str(epoch_s),
        },
    )
    configuration.unlink()


def sync(image: Path, tree: Path, wanted: Iterable[FileEntry], scratch: Path, epoch_s: int) -> None:
    """Make the ext4 in `image` hold the entries, whose contents are in `tree`.

    What is equal already is left wholly alone, so that it may keep an older time.
    The same image, entries and epoch_s give the same bytes. Raises RequestError for
    what cannot be held, or does not fit, ToolFailed when debugfs fails; image is then
    worth nothing. Whether it holds what it should is for `prove` to say.
    """
    wanted = tuple(wanted)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        values = Path(folder)
        with image.open("rb") as file:
            system = Ext4(file)
            old = system.entries()
            _refuse_stuck(system, old, wanted)
            made = plan(old, wanted, tree, values, lambda path: _blocks(system, path))
        for number, value in enumerate(made.values):
            (values / str(number)).write_bytes(value)
        _perform(made, image, values / "commands", epoch_s)
    with image.open("r+b", buffering=0) as file:
        system = Ext4(file)
        for path in made.overwritten:
            _overwrite(file, system, path, tree)
        _clear_unused(file, system)


def prove(image: Path, wanted: Iterable[FileEntry], start_bytes: int = 0) -> tuple[FileEntry, ...]:
    """Return what the file system in the image holds, after comparing it with what it should.

    Reads every file out of the image. Raises ToolFailed with the first differences, or
    with e2fsck's findings.
    """
    try:
        with image.open("rb") as file:
            found = Ext4(file, start_bytes).entries()
    except RequestError as error:
        raise ToolFailed(error.message, expected=error.expected, found=error.found) from error
    if lines := differences(wanted, found):
        shown = lines[:DIFFERENCES_SHOWN_MAX]
        raise ToolFailed(
            f"the root file system differs from its files in {len(lines)} places",
            found="\n".join(shown),
        )
    place = f"{image}?offset={start_bytes}" if start_bytes else str(image)
    try:
        # It tells what it finds on its output.
        run(["sh", "-c", 'exec "$1" -f -n "$2" >&2', "sh", find_tool("e2fsck"), place])
    except ToolFailed as error:
        raise ToolFailed("e2fsck finds the root file system damaged", found=error.found) from error
    return found


def _perform(made: Plan, image: Path, script: Path, epoch_s: int) -> None:
    """Let debugfs perform the commands, and take anything that it complains of for a failure."""
    # Counting what was ever written would make the super block depend on how it was.
    lines = [*made.commands, "ssv kbytes_written 0"]
    script.write_text("\n".join(lines) + "\n")
    # Its exit code says nothing. Its messages do; its output repeats every command.
    quiet = 'exec "$1" -w -f "$2" "$3" 2>&1 >/dev/null'
    said = run(
        ["sh", "-c", quiet, "sh", find_tool("debugfs"), str(script), str(image)],
        environment={"E2FSPROGS_FAKE_TIME": str(epoch_s)},
    )
    complaints = [
        line
        for line in said.decode("utf-8", "replace").splitlines()
        if line.strip() and not _BANNER.fullmatch(line)
    ]
    if any("allocate" in line for line in complaints):
        raise RequestError(
            "the files do not fit into the image's root partition",
            found=complaints[0][:200],
            hint="give the recipe a larger `size`",
        )
    if complaints:
        raise ToolFailed(
            f"debugfs complained {len(complaints)} times",
            found="\n".join(complaints[:DIFFERENCES_SHOWN_MAX]),
        )


def _refuse_stuck(system: Ext4, old: Iterable[FileEntry], wanted: Iterable[FileEntry]) -> None:
    """Raise RequestError when an inode with a block of attributes would have to change.

    debugfs never frees such a block. Few files have that many attributes.
    """
    stuck = {entry.first_path for entry in old if system.has_xattr_block(entry.path)}
    there = [replace(entry, mtime=0) for entry in old if entry.first_path in stuck]
    kept = [replace(entry, mtime=0) for entry in wanted if entry.first_path in stuck]
    if there != kept:
        raise RequestError(
            "files with many extended attributes cannot change in place",
            found=", ".join(sorted(stuck))[:200],
        )


def _blocks(system: Ext4, path: str) -> int | None:
    """Return how many blocks a file has, or None when they are not all there to be written."""
    runs = system.runs(path)
    if any(run.physical is None for run in runs):
        return None
    return sum(run.count for run in runs)


def _overwrite(file: FileIO, system: Ext4, path: str, tree: Path) -> None:
    """Write a file's content into the blocks it has in the image."""
    with Path(f"{tree}{path}").open("rb") as source:
        for part in system.runs(path):
            if part.physical is None:
                raise ToolFailed(f"{path} has no blocks for all of its content")
            start = part.physical * BLOCK_BYTES
            for place in range(start, start + part.count * BLOCK_BYTES, _PIECE_BYTES):
                length = min(_PIECE_BYTES, start + part.count * BLOCK_BYTES - place)
                write_all(file, place, source.read(length).ljust(length, b"\0"))


def _clear_unused(file: FileIO, system: Ext4) -> None:
    """Make every block zero that no file has: what was removed shall not be handed out."""
    blocks = system.geometry.blocks
    end = 0
    for first, count in [*system.used_ranges(), (blocks, 0)]:
        for place, length in data_ranges(file, end * BLOCK_BYTES, first * BLOCK_BYTES):
            _clear(file, place, length)
        end = first + count


def _clear(file: FileIO, place: int, length: int) -> None:
    for start in range(place, place + length, BLOCK_BYTES):
        if os.pread(file.fileno(), BLOCK_BYTES, start) != _ZEROS:
            write_all(file, start, _ZEROS)
