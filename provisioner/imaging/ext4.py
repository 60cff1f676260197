"""Read an ext4 file system out of a file: entries, contents, the blocks in use. Writes nothing.

Kept apart from the tools that write it, so that what it reads proves what they wrote. Knows
the features that our builds use and refuses others; checks no checksums (e2fsck does).

Source: Linux, Documentation/filesystems/ext4, and fs/ext4/ext4.h for the flags.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

from provisioner.errors import RequestError
from provisioner.imaging.ext4_xattrs import xattrs_in_block, xattrs_in_inode
from provisioner.imaging.file_manifest import FileEntry, Kind, in_order
from provisioner.imaging.sparse import AnyFile
from provisioner.imaging.tree import readable

ROOT_INODE: Final = 2
PATHS_MAX: Final = 2_000_000
_SUPERBLOCK_BYTES: Final = 1024
_MAGIC: Final = 0xEF53
# filetype, extents, 64bit, flex_bg: what we can read. Anything else changes the layout.
_READABLE_INCOMPAT: Final = 0x2 | 0x40 | 0x80 | 0x200
_BLOCK_BITMAP_UNUSED: Final = 0x2
_EXTENTS_FLAG: Final = 0x80000
_EXTENT_MAGIC: Final = 0xF30A
_EXTENT_BLOCKS_MAX: Final = 32768
_EXTENT_DEPTH_MAX: Final = 5
_DIRENT: Final = struct.Struct("<IHBB")
_READ_BYTES: Final = 1024 * 1024

_KINDS: Final[dict[int, Kind]] = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "dir",
    stat.S_IFLNK: "link",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
    stat.S_IFIFO: "fifo",
}


@dataclass(frozen=True)
class Geometry:
    """What two file systems must share for one to be made from the other in place."""

    blocks: int
    inodes: int
    block_bytes: int
    inode_bytes: int
    group_blocks: int
    group_inodes: int
    descriptor_bytes: int
    features: tuple[int, int, int]
    uuid: bytes
    label: bytes
    hash_seed: bytes


@dataclass(frozen=True)
class Run:
    """count blocks of a file from block `logical` on, at `physical`, or None where all zero."""

    logical: int
    count: int
    physical: int | None


@dataclass(frozen=True)
class _Inode:
    mode: int
    uid: int
    gid: int
    mtime: int
    size: int
    flags: int
    place: bytes
    xattrs: dict[str, str]
    has_xattr_block: bool


class Ext4:
    """The ext4 file system that starts at start_bytes of a file opened for reading.

    Raises RequestError when it is none, or uses what we cannot read.
    """

    def __init__(self, file: AnyFile, start_bytes: int = 0) -> None:
        self._file = file.fileno()
        self._start_bytes = start_bytes
        self.geometry = _geometry(os.pread(self._file, _SUPERBLOCK_BYTES, start_bytes + 1024))

    def entries(self) -> tuple[FileEntry, ...]:
        """Return an entry for each path, as read_tree does for a folder."""
        entries = {}
        first_paths: dict[int, str] = {}
        for path, number in sorted(self._numbers.items(), key=lambda item: item[0].encode()):
            entry = self._entry(path, self._inodes[number])
            if entry.type != "dir" and number in first_paths:
                entry = replace(entry, hardlink=first_paths[number])
            first_paths.setdefault(number, path)
            entries[path] = entry
        return in_order(entries.values())

    def runs(self, path: str) -> list[Run]:
        """Return where the blocks of this file are, in order, with holes between them."""
        return self._runs(self._inodes[self._numbers[path]])

    def has_xattr_block(self, path: str) -> bool:
        """Say whether the inode's attributes do not fit into it, and have a block of their own."""
        return self._inodes[self._numbers[path]].has_xattr_block

    def used_ranges(self) -> Iterator[tuple[int, int]]:
        """Yield (first block, number of blocks) of what may hold something, in order."""
        shape = self.geometry
        for group, (bitmap_block, _, flags) in enumerate(self._descriptors):
            first = group * shape.group_blocks
            count = min(shape.group_blocks, shape.blocks - first)
            if flags & _BLOCK_BITMAP_UNUSED:
                # No file ever had a block here, and the bitmap was not written.
                yield first, count
                continue
            bitmap = int.from_bytes(self._block(bitmap_block), "little")
            for start, length in _ones(bitmap & ((1 << count) - 1)):
                yield first + start, length

    @cached_property
    def _numbers(self) -> dict[str, int]:
        """Inode numbers by path."""
        numbers = {"/": ROOT_INODE}
        folders = ["/"]
        for folder in folders:
            prefix = "" if folder == "/" else folder
            for raw, number in self._listing(self._inodes[numbers[folder]]):
                path = f"{prefix}/{readable(raw, 'a name')}"
                if path in numbers or len(numbers) >= PATHS_MAX:
                    raise _refused("names that stand in a folder once", path)
                numbers[path] = number
                if stat.S_ISDIR(self._inodes[number].mode):
                    folders.append(path)
        return numbers

    @cached_property
    def _inodes(self) -> _InodeTable:
        return _InodeTable(self)

    @cached_property
    def _descriptors(self) -> list[tuple[int, int, int]]:
        """(block bitmap's block, inode table's block, flags) of each group."""
        shape = self.geometry
        groups = -(-shape.blocks // shape.group_blocks)
        size = shape.descriptor_bytes
        data = self._bytes(shape.block_bytes, groups * size)
        found = []
        for place in range(0, len(data), size):
            low = struct.unpack_from("<III6xH", data, place)
            high = struct.unpack_from("<III", data, place + 32) if size >= 64 else (0, 0, 0)
            found.append((low[0] | high[0] << 32, low[2] | high[2] << 32, low[3]))
        return found

    def _entry(self, path: str, inode: _Inode) -> FileEntry:
        kind = _KINDS.get(stat.S_IFMT(inode.mode))
        if kind is None:
            raise _refused("no sockets", path)
        target = None
        if kind == "link":
            target = readable(self._link_target(inode), f"the target of {path}")
        return FileEntry(
            path=path,
            type=kind,
            mode=stat.S_IMODE(inode.mode),
            uid=inode.uid,
            gid=inode.gid,
            mtime=inode.mtime,
            size=inode.size if kind == "file" else None,
            sha256=self._digest(inode) if kind == "file" else None,
            target=target,
            device=_device(inode.place) if kind in ("char", "block") else None,
            xattrs=inode.xattrs,
        )

    def _link_target(self, inode: _Inode) -> bytes:
        if inode.flags & _EXTENTS_FLAG:
            return b"".join(self._content(inode))
        return inode.place[: inode.size]

    def _digest(self, inode: _Inode) -> str:
        hasher = hashlib.sha256()
        for part in self._content(inode):
            hasher.update(part)
        return hasher.hexdigest()

    def _content(self, inode: _Inode) -> Iterator[bytes]:
        """Yield the file's bytes in pieces."""
        block_bytes = self.geometry.block_bytes
        left = inode.size
        for run in self._runs(inode):
            for done in range(0, run.count * block_bytes, _READ_BYTES):
                length = min(_READ_BYTES, run.count * block_bytes - done, left)
                if length == 0:
                    return
                left -= length
                if run.physical is None:
                    yield bytes(length)
                else:
                    yield self._bytes(run.physical * block_bytes + done, length)

    def _runs(self, inode: _Inode) -> list[Run]:
        """Return the inode's blocks up to its size, holes included."""
        if not inode.flags & _EXTENTS_FLAG:
            raise _refused("files in extents", f"flags {inode.flags:#x}")
        end = -(-inode.size // self.geometry.block_bytes)
        runs: list[Run] = []
        place = 0
        for run in self._extents(inode.place, _EXTENT_DEPTH_MAX):
            if run.logical < place:
                raise _refused("extents in order", run)
            if run.logical > place:
                runs.append(Run(place, run.logical - place, None))
            runs.append(run)
            place = run.logical + run.count
        if place < end:
            runs.append(Run(place, end - place, None))
        return runs

    def _extents(self, branch: bytes, depth_max: int) -> Iterator[Run]:
        """Yield the extents below one part of the extent tree."""
        magic, count, _, depth = struct.unpack_from("<HHHH", branch)
        if magic != _EXTENT_MAGIC or depth > depth_max or 12 * (count + 1) > len(branch):
            raise _refused("a sound extent tree", f"magic {magic:#x}, depth {depth}")
        for number in range(1, count + 1):
            if depth:
                _, low, high = struct.unpack_from("<IIH", branch, 12 * number)
                yield from self._extents(self._block(low | high << 32), depth - 1)
                continue
            logical, length, high, low = struct.unpack_from("<IHHI", branch, 12 * number)
            is_written = length <= _EXTENT_BLOCKS_MAX
            length -= 0 if is_written else _EXTENT_BLOCKS_MAX
            yield Run(logical, length, low | high << 32 if is_written else None)

    def _listing(self, folder: _Inode) -> Iterator[tuple[bytes, int]]:
        """Yield (name, inode number) of what is in a folder, as it lies there.

        Index blocks of hashed folders look like blocks without names.
        """
        data = b"".join(self._content(folder))
        block_bytes = self.geometry.block_bytes
        place = 0
        while place + _DIRENT.size <= len(data):
            number, length, name_bytes, _ = _DIRENT.unpack_from(data, place)
            if length < _DIRENT.size or place % block_bytes + length > block_bytes:
                raise _refused("sound folders", f"an entry of {length} bytes")
            name = data[place + _DIRENT.size : place + _DIRENT.size + name_bytes]
            if number and name not in (b".", b".."):
                yield name, number
            place += length

    def inode(self, number: int) -> _Inode:
        """Return the inode of this number."""
        shape = self.geometry
        if not 1 <= number <= shape.inodes:
            raise _refused("inodes that exist", number)
        group, index = divmod(number - 1, shape.group_inodes)
        table = self._descriptors[group][1]
        place = table * shape.block_bytes + index * shape.inode_bytes
        return self._parsed(self._bytes(place, shape.inode_bytes))

    def _parsed(self, data: bytes) -> _Inode:
        mode, uid, size, _, _, mtime = struct.unpack_from("<HHIIIi", data)
        (gid,) = struct.unpack_from("<H", data, 0x18)
        (flags,) = struct.unpack_from("<I", data, 0x20)
        acl_low, size_high = struct.unpack_from("<II", data, 0x68)
        acl_high, uid_high, gid_high = struct.unpack_from("<HHH", data, 0x76)
        xattrs = xattrs_in_inode(data)
        if block := acl_low | acl_high << 32:
            xattrs |= xattrs_in_block(self._block(block))
        if len(data) > 0x8C:
            (extra,) = struct.unpack_from("<I", data, 0x88)
            mtime += (extra & 3) << 32
        return _Inode(
            mode=mode,
            uid=uid | uid_high << 16,
            gid=gid | gid_high << 16,
            mtime=mtime,
            size=size | size_high << 32,
            flags=flags,
            place=data[0x28:0x64],
            xattrs=dict(sorted(xattrs.items())),
            has_xattr_block=bool(block),
        )

    def _block(self, number: int) -> bytes:
        size = self.geometry.block_bytes
        return self._bytes(number * size, size)

    def _bytes(self, place: int, length: int) -> bytes:
        data = os.pread(self._file, length, self._start_bytes + place)
        if len(data) != length:
            raise _refused("a whole file system", "an end before its time")
        return data


class _InodeTable(dict[int, _Inode]):
    """Inodes by number, each read once."""

    def __init__(self, system: Ext4) -> None:
        super().__init__()
        self._system = system

    def __missing__(self, number: int) -> _Inode:
        self[number] = inode = self._system.inode(number)
        return inode


def _geometry(data: bytes) -> Geometry:
    """Return the shape that a superblock tells; RequestError for one that we cannot read."""
    if len(data) < _SUPERBLOCK_BYTES or data[0x38:0x3A] != _MAGIC.to_bytes(2, "little"):
        raise _refused("an ext4 file system", "none")
    inodes, blocks = struct.unpack_from("<II", data)
    first_block, block_shift = struct.unpack_from("<II", data, 0x14)
    group_blocks, _, group_inodes = struct.unpack_from("<III", data, 0x20)
    features = struct.unpack_from("<III", data, 0x5C)
    (blocks_high,) = struct.unpack_from("<I", data, 0x150)
    (inode_bytes,) = struct.unpack_from("<H", data, 0x58)
    (descriptor_bytes,) = struct.unpack_from("<H", data, 0xFE)
    if features[1] & ~_READABLE_INCOMPAT or first_block or block_shift != 2 or inode_bytes < 160:
        raise _refused("an ext4 of 4 KiB blocks with features we know", f"{features[1]:#x}")
    if not group_blocks or not group_inodes or group_blocks > 32768:
        raise _refused("groups of blocks", group_blocks)
    return Geometry(
        blocks=blocks | blocks_high << 32,
        inodes=inodes,
        block_bytes=1024 << block_shift,
        inode_bytes=inode_bytes,
        group_blocks=group_blocks,
        group_inodes=group_inodes,
        descriptor_bytes=descriptor_bytes if features[1] & 0x80 else 32,
        features=features,
        uuid=data[0x68:0x78],
        label=data[0x78:0x88],
        hash_seed=data[0xEC:0xFC],
    )


def _device(place: bytes) -> tuple[int, int]:
    """Return (major, minor): the old form holds eight bits of each, the new one more."""
    old, new = struct.unpack_from("<II", place)
    if old:
        return old >> 8 & 0xFF, old & 0xFF
    return new >> 8 & 0xFFF, new & 0xFF | new >> 12 & 0xFFF00


def _ones(bitmap: int) -> Iterator[tuple[int, int]]:
    """Yield (start, length) of the runs of set bits."""
    digits = f"{bitmap:b}"[::-1]
    end = 0
    while (start := digits.find("1", end)) >= 0:
        end = digits.find("0", start)
        end = len(digits) if end < 0 else end
        yield start, end - start


def _refused(expected: str, found: object) -> RequestError:
    return RequestError(
        "the root file system is not as we read it", expected=expected, found=str(found)[:200]
    )
