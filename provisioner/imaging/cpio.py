"""Writes initramfs archives: the same folder always gives the same bytes.

Only the "newc" format and only what an initramfs needs: folders, files and symbolic links,
owned by root, dated to the epoch. No devices: the kernel mounts devtmpfs.

Source: Linux Documentation/driver-api/early-userspace/buffer-format.rst.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_TRAILER: Final = "TRAILER!!!"
_FOLDER_MODE: Final = stat.S_IFDIR | 0o755


def archive(folder: Path) -> bytes:
    """Return the folder's content as one cpio archive, names sorted, a multiple of 4 bytes.

    Files keep whether they may be executed, and nothing else of their mode. Raises
    ValueError for anything that is not a folder, a file or a symbolic link.
    """
    parts: list[bytes] = []
    for number, (name, mode, data) in enumerate(_entries(folder), start=1):
        parts.append(_entry(name, number, mode, data))
    parts.append(_entry(_TRAILER, 0, 0, b""))
    return b"".join(parts)


def _entries(folder: Path) -> Iterator[tuple[str, int, bytes]]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            yield name, stat.S_IFLNK | 0o777, os.fsencode(path.readlink())
        elif stat.S_ISDIR(mode):
            yield name, _FOLDER_MODE, b""
        elif stat.S_ISREG(mode):
            executable = 0o755 if mode & 0o100 else 0o644
            yield name, stat.S_IFREG | executable, path.read_bytes()
        else:
            raise ValueError(f"{path} is neither a folder nor a file nor a link")


def _entry(name: str, number: int, mode: int, data: bytes) -> bytes:
    raw = os.fsencode(name) + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    # inode, mode, uid, gid, links, mtime, size, device major and minor twice, name, checksum
    fields = (number, mode, 0, 0, links, 0, len(data), 0, 0, 0, 0, len(raw), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields)
    return _padded(header + raw) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)
