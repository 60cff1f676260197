"""The file manifest of a release, files.json: what each path of its root file system is.

Judges drift, and proves that two builds hold the same. Reads no file system itself.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, cast, get_args

from provisioner.core.manifest import BootFile, is_digest
from provisioner.errors import RequestError, TrustError

FORMAT: Final = 1
FILES_MAX: Final = 2_000_000
FILE_MANIFEST_BYTES_MAX: Final = 512 * 1024 * 1024
DIFFERENCES_SHOWN_MAX: Final = 5
LINKS_MAX: Final = 8

Kind = Literal["file", "dir", "link", "char", "block", "fifo"]
KINDS: Final = frozenset(get_args(Kind))

_NUMBERS: Final = ("mode", "uid", "gid", "mtime")


@dataclass(frozen=True)
class FileEntry:
    """One path of a root file system.

    path is absolute, `/` for the root itself. mode holds the twelve permission bits.
    size and sha256 belong to files, target to symbolic links, device (major, minor) to
    char and block devices. xattrs maps full names, such as security.capability, to
    values in hex, as getxattr(2) gives them. mtime is in seconds since 1970. hardlink
    is the first path, in order, of the same inode, where that is another path.
    """

    path: str
    type: Kind
    mode: int
    uid: int
    gid: int
    mtime: int
    size: int | None = None
    sha256: str | None = None
    target: str | None = None
    device: tuple[int, int] | None = None
    xattrs: Mapping[str, str] = field(default_factory=dict)
    hardlink: str | None = None

    @property
    def first_path(self) -> str:
        """The path that stands for this inode."""
        return self.hardlink or self.path

    @property
    def sort_key(self) -> bytes:
        """The order of a file manifest: that of the paths' bytes, so folders come first."""
        return self.path.encode()

    def to_json(self) -> dict[str, Any]:
        """Return the form in files.json: only the keys that say something."""
        kept = {
            key: value for key, value in vars(self).items() if value is not None and value != {}
        }
        if self.device is not None:
            kept["device"] = list(self.device)
        return kept


def in_order(entries: Iterable[FileEntry]) -> tuple[FileEntry, ...]:
    """Return the entries as a file manifest orders them."""
    return tuple(sorted(entries, key=lambda entry: entry.sort_key))


def to_bytes(entries: Iterable[FileEntry]) -> bytes:
    """Return files.json in canonical form: sorted keys and paths, no spaces, UTF-8."""
    value = {"format": FORMAT, "files": [entry.to_json() for entry in in_order(entries)]}
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def parse(data: bytes) -> tuple[FileEntry, ...]:
    """Return the entries of a files.json, or refuse it.

    data must be the canonical form. Raises TrustError with what was found; who wrote
    it is proven by its digest in the signed manifest.
    """
    if len(data) > FILE_MANIFEST_BYTES_MAX:
        raise TrustError(
            "file manifest refused: too large",
            expected=f"at most {FILE_MANIFEST_BYTES_MAX} bytes",
            found=f"{len(data)} bytes",
        )
    try:
        value = json.loads(data.decode())
        if value["format"] != FORMAT or type(value["format"]) is not int:
            raise RequestError("unknown format", found=repr(value["format"])[:100])
        if len(value["files"]) > FILES_MAX:
            raise RequestError(f"more than {FILES_MAX} files")
        entries = tuple(_entry(item) for item in value["files"])
        canonical = to_bytes(entries) == data
    except (ValueError, KeyError, TypeError, RecursionError, RequestError) as error:
        raise TrustError("file manifest refused", found=str(error)[:200]) from error
    if not canonical or len({entry.path for entry in entries}) != len(entries):
        raise TrustError("file manifest refused: not in canonical form")
    return entries


def differences(expected: Iterable[FileEntry], found: Iterable[FileEntry]) -> list[str]:
    """Return a line for each path that is not what it should be; times do not count.

    A file whose content, mode and owner stay keeps its old time in a build on a
    parent, so that its inode need not move.
    """
    wanted = {entry.path: replace(entry, mtime=0) for entry in expected}
    there = {entry.path: replace(entry, mtime=0) for entry in found}
    lines = []
    for path in sorted(wanted.keys() | there.keys()):
        one, other = wanted.get(path), there.get(path)
        if other is None:
            lines.append(f"{path}: missing")
        elif one is None:
            lines.append(f"{path}: should not be there")
        elif one != other:
            lines.append(f"{path}: {_changes(one, other)}")
    return lines


def boot_file(entries: Iterable[FileEntry], path: str) -> BootFile | None:
    """Return the file that the path means, such as /vmlinuz, following links; None without one."""
    by_path = {entry.path: entry for entry in entries}
    for _ in range(LINKS_MAX):
        entry = by_path.get(path)
        if entry is None or entry.type != "link" or entry.target is None:
            break
        path = posixpath.normpath(posixpath.join(posixpath.dirname(path), entry.target))
    if entry is None or entry.sha256 is None or entry.size is None:
        return None
    return BootFile(entry.path, entry.sha256, entry.size)


def _changes(one: FileEntry, other: FileEntry) -> str:
    return ", ".join(
        f"{key} {_shown(key, getattr(other, key))} instead of {_shown(key, value)}"
        for key, value in vars(one).items()
        if getattr(other, key) != value
    )


def _shown(key: str, value: object) -> str:
    return f"{value:04o}" if key == "mode" else str(value)


def _entry(item: dict[str, Any]) -> FileEntry:
    """Return the entry that one object of files.json is; RequestError for another form."""
    entry = FileEntry(**item)
    if entry.device is not None:
        major, minor = entry.device
        entry = replace(entry, device=(major, minor))
    numbers = [getattr(entry, name) for name in _NUMBERS]
    numbers += [] if entry.size is None else [entry.size]
    numbers += list(entry.device or ())
    texts = (entry.path, entry.target or "", entry.hardlink or "/")
    sound = (
        entry.type in KINDS
        and all(type(number) is int for number in numbers)
        and all(isinstance(text, str) for text in texts)
        and entry.path.startswith("/")
        and isinstance(entry.xattrs, dict)
        and all(isinstance(value, str) for value in entry.xattrs.values())
        and _belongs(entry)
    )
    if not sound:
        raise RequestError(f"{cast(object, item)!r} is not an entry"[:200])
    return entry


def _belongs(entry: FileEntry) -> bool:
    """Say whether the entry has what its type needs, and nothing that another type has."""
    return (
        (entry.size is not None) == (is_digest(entry.sha256)) == (entry.type == "file")
        and (entry.sha256 is None) == (entry.type != "file")
        and (entry.target is not None) == (entry.type == "link")
        and (entry.device is not None) == (entry.type in ("char", "block"))
    )
