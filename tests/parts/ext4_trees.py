"""Small trees of files, and file systems made of them, for the tests of syncing."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from provisioner.imaging.ext4 import Ext4
from provisioner.imaging.ext4_sync import make_empty, prove, sync
from provisioner.imaging.file_manifest import FileEntry
from provisioner.imaging.sparse import copy_part
from provisioner.imaging.tree import read_tree

MIB = 1024 * 1024
EPOCH_S = 1_700_000_000
UUID = "7d3c8c1a-1111-4222-8333-444455556666"


@dataclass(frozen=True)
class File:
    content: bytes = b""
    mode: int = 0o644
    xattrs: Mapping[str, bytes] = field(default_factory=dict)
    uid: int | None = None


@dataclass(frozen=True)
class Dir:
    mode: int = 0o755
    xattrs: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Link:
    target: str


@dataclass(frozen=True)
class Same:
    """A hard link to a path of the same tree."""

    path: str


@dataclass(frozen=True)
class Node:
    """A device or a pipe, by the type bits of its mode."""

    kind: int = stat.S_IFIFO
    device: tuple[int, int] = (0, 0)


Tree = Mapping[str, File | Dir | Link | Same | Node]


def make_tree(folder: Path, tree: Tree, mtime: int = EPOCH_S - 1000) -> Path:
    """Make a new folder that holds the tree; folders need not be named unless they are empty."""
    folder.mkdir()
    folder.chmod(0o755)
    (folder / "lost+found").mkdir(mode=0o700)
    for name, what in tree.items():
        _make(folder, folder / name, what)
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (mtime, mtime), follow_symlinks=False)
    return folder


def _make(top: Path, path: Path, what: File | Dir | Link | Same | Node) -> None:
    for parent in reversed(path.parents):
        parent.mkdir(mode=0o755, exist_ok=True)
    match what:
        case Link():
            path.symlink_to(what.target)
            return
        case Same():
            path.hardlink_to(top / what.path)
            return
        case Node():
            os.mknod(path, what.kind | 0o640, os.makedev(*what.device))
            return
        case Dir():
            path.mkdir(exist_ok=True)
        case File():
            path.write_bytes(what.content)
            if what.uid is not None:
                os.chown(path, what.uid, what.uid)
    path.chmod(what.mode)
    for name, value in what.xattrs.items():
        os.setxattr(path, name, value)


class Builder:
    """Makes file systems in a folder, all alike and size_bytes large."""

    def __init__(self, folder: Path, size_bytes: int = 32 * MIB) -> None:
        self.folder = folder
        self._size_bytes = size_bytes
        self._made = 0
        self._empty = folder / "empty.ext4"
        make_empty(self._empty, size_bytes, UUID, UUID, EPOCH_S)

    def build(self, tree: Tree, parent: Path | None = None, mtime: int = EPOCH_S - 1000) -> Path:
        """Return a new file system that was proven to hold the tree, on a parent's or not."""
        self._made += 1
        image = self.folder / f"{self._made}.ext4"
        folder = make_tree(self.folder / f"tree-{self._made}", tree, mtime)
        copy_part(parent or self._empty, 0, self._size_bytes, image)
        wanted = read_tree(folder)
        sync(image, folder, wanted, self.folder, EPOCH_S)
        prove(image, wanted)
        shutil.rmtree(folder)
        return image


def entries_of(image: Path) -> dict[str, FileEntry]:
    with image.open("rb") as file:
        return {entry.path: entry for entry in Ext4(file).entries()}


def blocks_of(image: Path, path: str) -> list[int | None]:
    """Return the physical block of each block of a file; None for holes."""
    with image.open("rb") as file:
        runs = Ext4(file).runs(path)
    return [
        None if run.physical is None else run.physical + number
        for run in runs
        for number in range(run.count)
    ]


def moved_bytes(one: Path, other: Path, piece_bytes: int = 4096) -> int:
    """Return how many bytes are in pieces that differ between two images of one size."""
    first, second = one.read_bytes(), other.read_bytes()
    assert len(first) == len(second)
    places = range(0, len(first), piece_bytes)
    differing = [
        place
        for place in places
        if first[place : place + piece_bytes] != second[place : place + piece_bytes]
    ]
    return len(differing) * piece_bytes
