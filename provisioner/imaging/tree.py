"""Read a folder into the entries of a file manifest. Follows no link and changes nothing."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Final

from provisioner.errors import RequestError
from provisioner.imaging.file_manifest import FileEntry, Kind, in_order

_KINDS: Final[dict[int, Kind]] = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "dir",
    stat.S_IFLNK: "link",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
    stat.S_IFIFO: "fifo",
}
# Labels by the policy of the machine that builds, which mean nothing elsewhere.
_XATTRS_OF_THE_BUILDER: Final = frozenset({"security.selinux"})


def read_tree(top: Path) -> tuple[FileEntry, ...]:
    """Return an entry for everything in the folder, the folder itself being `/`.

    Raises RequestError for what no image may hold: sockets, names that are not UTF-8
    or have control characters in them.
    """
    entries: list[FileEntry] = []
    inodes: dict[tuple[int, int], list[int]] = {}
    for path in _walk(os.fsencode(top)):
        status = os.lstat(path)
        entries.append(_entry(path, _name_in_image(path, os.fsencode(top)), status))
        if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
            inodes.setdefault((status.st_dev, status.st_ino), []).append(len(entries) - 1)
    for places in inodes.values():
        first, *others = sorted(places, key=lambda place: entries[place].sort_key)
        for place in others:
            entries[place] = replace(entries[place], hardlink=entries[first].path)
    return in_order(entries)


def file_digest(path: bytes | Path) -> str:
    """Return the sha256 of a file's content, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _walk(folder: bytes) -> list[bytes]:
    """Return the folder and everything in it, by bytes: names need not be text."""
    found = [folder]
    for path in found:
        if stat.S_ISDIR(os.lstat(path).st_mode):
            found.extend(os.path.join(path, name) for name in os.listdir(path))
    return found


def _name_in_image(path: bytes, top: bytes) -> str:
    raw = b"/" + os.path.relpath(path, top) if path != top else b"/"
    return readable(raw, "a name")


def readable(raw: bytes, what: str) -> str:
    """Return the text; RequestError when it is not UTF-8, or holds control characters.

    Such names are mistakes in practice, and no list of files could show them safely.
    """
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"{what} in the image is not UTF-8", found=repr(raw)) from error
    if any(ord(letter) < 0x20 or letter == "\x7f" for letter in text):
        raise RequestError(f"{what} in the image has control characters", found=repr(raw))
    return text


def _entry(path: bytes, name: str, status: os.stat_result) -> FileEntry:
    kind = _KINDS.get(stat.S_IFMT(status.st_mode))
    if kind is None:
        raise RequestError(f"{name} is a socket, which no image may hold")
    return FileEntry(
        path=name,
        type=kind,
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        mtime=int(status.st_mtime),
        size=status.st_size if kind == "file" else None,
        sha256=file_digest(path) if kind == "file" else None,
        target=readable(os.readlink(path), f"the target of {name}") if kind == "link" else None,
        device=_device(status) if kind in ("char", "block") else None,
        xattrs=_xattrs(path),
    )


def _device(status: os.stat_result) -> tuple[int, int]:
    return os.major(status.st_rdev), os.minor(status.st_rdev)


def _xattrs(path: bytes) -> dict[str, str]:
    return {
        name: os.getxattr(path, name, follow_symlinks=False).hex()
        for name in sorted(os.listxattr(path, follow_symlinks=False))
        if name not in _XATTRS_OF_THE_BUILDER
    }
