"""Decide how one file system becomes another: what goes, what comes, what is overwritten in place.

Pure: entries in, debugfs(8) commands out. What is equal is not named, so its blocks and
its inode stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from provisioner.errors import RequestError
from provisioner.imaging.file_manifest import FileEntry, Kind

BLOCK_BYTES: Final = 4096
# debugfs reads its commands into a buffer of 8192 bytes and takes the rest for another one.
COMMAND_BYTES_MAX: Final = 8190
# debugfs reads a value from a file of at most one block.
XATTR_BYTES_MAX: Final = BLOCK_BYTES
# Each block that a file grows by is a command; beyond this many, writing it anew is quicker.
GROWTH_BLOCKS_MAX: Final = 4096

_TYPE_BITS: Final[dict[Kind, int]] = {
    "file": 0o100000,
    "dir": 0o040000,
    "link": 0o120000,
    "char": 0o020000,
    "block": 0o060000,
    "fifo": 0o010000,
}

BlocksOf = Callable[[str], int | None]
"""The number of a file's blocks, or None when it has holes."""


@dataclass
class Plan:
    """debugfs commands in order, files whose blocks are then overwritten, and values to lend.

    values holds extended attributes' values by the number in their file's name.
    """

    commands: list[str] = field(default_factory=list)
    overwritten: list[str] = field(default_factory=list)
    values: list[bytes] = field(default_factory=list)

    def add(self, verb: str, *words: str) -> None:
        """Add a command. Raises RequestError for one that debugfs would read wrongly."""
        line = " ".join((verb, *(_quoted(word) for word in words)))
        if len(line.encode()) > COMMAND_BYTES_MAX:
            raise RequestError(
                "a path is too long for the tools that build images",
                expected=f"at most {COMMAND_BYTES_MAX} bytes with its folder on this machine",
                found=line[:200],
            )
        self.commands.append(line)


def plan(
    old: Iterable[FileEntry],
    new: Iterable[FileEntry],
    tree: Path,
    values: Path,
    blocks_of: BlocksOf,
) -> Plan:
    """Return what turns a file system that holds `old` into one that holds `new`.

    tree is the folder with the new files' contents; values the folder where the
    attributes' values will be. blocks_of is asked about old files only.
    """
    there, wanted = _by_path(old), _by_path(new)
    partners_old, partners_new = _partners(there), _partners(wanted)
    kept = {
        path
        for path in there.keys() & wanted.keys()
        if partners_old[path] == partners_new[path] and _stays(there[path], wanted[path], blocks_of)
    }
    made = Plan()
    for path in sorted(there.keys() - kept, key=str.encode, reverse=True):
        _remove(made, there[path])
    for path, entry in wanted.items():
        # Hard links share an inode: its first path speaks for it.
        if path in kept and entry.hardlink is None:
            _change(made, there[path], entry, values, blocks_of)
        elif path not in kept:
            _create(made, entry, len(partners_new[path]), tree, values)
    return made


def _by_path(entries: Iterable[FileEntry]) -> dict[str, FileEntry]:
    """Return the entries by path, in order, folders before what is in them."""
    return {entry.path: entry for entry in sorted(entries, key=lambda one: one.sort_key)}


def _partners(entries: Mapping[str, FileEntry]) -> dict[str, tuple[str, ...]]:
    """Return for each path all paths of its inode."""
    groups: dict[str, list[str]] = {}
    for entry in entries.values():
        groups.setdefault(entry.first_path, []).append(entry.path)
    return {path: tuple(group) for group in groups.values() for path in group}


def _stays(old: FileEntry, new: FileEntry, blocks_of: BlocksOf) -> bool:
    """Say whether the inode can stay, with other content or attributes perhaps."""
    if (old.type, old.target, old.device) != (new.type, new.target, new.device):
        return False
    if old.sha256 == new.sha256:
        return True
    blocks = blocks_of(old.path)
    return blocks is not None and _blocks(new) - blocks <= GROWTH_BLOCKS_MAX


def _remove(made: Plan, entry: FileEntry) -> None:
    # debugfs frees a file's blocks, but not the one that holds its attributes.
    if entry.hardlink is None:
        for name in entry.xattrs:
            made.add("ea_rm", entry.path, name)
    made.add("rmdir" if entry.type == "dir" else "rm", entry.path)


def _change(made: Plan, old: FileEntry, new: FileEntry, values: Path, blocks_of: BlocksOf) -> None:
    """Add what differs between two entries of the same type."""
    if replace(old, mtime=new.mtime) == new:
        return
    if old.sha256 != new.sha256:
        blocks = blocks_of(old.path) or 0
        for number in range(blocks, _blocks(new)):
            made.add("bmap -a", new.path, str(number))
        if _blocks(new) < blocks:
            made.add("punch", new.path, str(_blocks(new)))
        made.add("sif", new.path, "size", str(new.size))
        made.add("sif", new.path, "mtime", f"@{new.mtime}")
        made.overwritten.append(new.path)
    _attributes(made, old, new)
    _xattrs(made, old.xattrs, new, values)


def _create(made: Plan, entry: FileEntry, links: int, tree: Path, values: Path) -> None:
    path = entry.path
    if entry.hardlink is not None:
        # `ln` does not make room in a full folder; making and removing a pipe does.
        _make_special(made, path, "p")
        made.add("rm", path)
        made.add("ln", entry.hardlink, path)
        return
    if entry.type == "dir":
        made.add("mkdir", path)
    elif entry.type == "file":
        made.add("write", f"{tree}{path}", path)
    elif entry.type == "link":
        made.add("symlink", path, entry.target or "")
    else:
        numbers = [str(number) for number in entry.device or ()]
        _make_special(made, path, entry.type[0] if numbers else "p", *numbers)
    _attributes(made, _as_created(entry), entry)
    made.add("sif", path, "mtime", f"@{entry.mtime}")
    _xattrs(made, {}, entry, values)
    if links > 1:
        made.add("sif", path, "links_count", str(links))


def _make_special(made: Plan, path: str, *words: str) -> None:
    # `mknod` takes a name for the current folder, and would put a slash into it.
    folder, _, name = path.rpartition("/")
    made.add("cd", folder or "/")
    made.add("mknod", name, *words)
    made.add("cd", "/")


def _as_created(entry: FileEntry) -> FileEntry:
    """Return the entry as debugfs makes it: root's, with a mode of its own choice."""
    modes = {"dir": 0o755, "link": 0o777, "file": entry.mode}
    return replace(entry, mode=modes.get(entry.type, 0), uid=0, gid=0)


def _attributes(made: Plan, old: FileEntry, new: FileEntry) -> None:
    if old.mode != new.mode:
        made.add("sif", new.path, "mode", f"0{_TYPE_BITS[new.type] | new.mode:o}")
    for name in ("uid", "gid"):
        if getattr(old, name) != getattr(new, name):
            made.add("sif", new.path, name, str(getattr(new, name)))


def _xattrs(made: Plan, old: Mapping[str, str], new: FileEntry, values: Path) -> None:
    for name in sorted(old.keys() - new.xattrs.keys()):
        made.add("ea_rm", new.path, name)
    for name, value in sorted(new.xattrs.items()):
        if old.get(name) == value:
            continue
        data = bytes.fromhex(value)
        if len(data) > XATTR_BYTES_MAX:
            raise RequestError(
                f"the extended attribute {name} of {new.path} is too large",
                expected=f"at most {XATTR_BYTES_MAX} bytes",
                found=f"{len(data)} bytes",
            )
        made.add("ea_set", "-f", str(values / str(len(made.values))), new.path, name)
        made.values.append(data)


def _blocks(entry: FileEntry) -> int:
    return -(-(entry.size or 0) // BLOCK_BYTES)


def _quoted(word: str) -> str:
    """Return the word as debugfs's command line takes it; two quotes stand for one."""
    return '"' + word.replace('"', '""') + '"'
