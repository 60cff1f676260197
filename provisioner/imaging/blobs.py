"""Where the archive keeps its bytes: named blobs that appear whole or not at all.

`FileBlobs` keeps them as files below one folder; `s3_blobs.py` as objects of a bucket. Knows
nothing of releases. Names are relative paths such as `chunks/ab/…`, made by the archive only.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Protocol

from provisioner.errors import NotFound, Unavailable

INCOMING: Final = "incoming"
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)


class Unreadable(Unavailable):
    """One file of the archive cannot be read, while others may: a bad sector, perhaps."""


class Blobs(Protocol):
    """Named blobs. Safe to use from several threads."""

    @property
    def place(self) -> str:
        """How errors call the whole of it: a folder or a URL."""
        ...

    def read(self, name: str, limit_bytes: int) -> bytes:
        """Return the blob, at most limit_bytes of it. Raises NotFound, Unavailable."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Keep a blob, durably when this returns, replacing one that is there as a whole.

        Raises Unavailable when there is no space, or the disk does not take it; the name is
        then as before.
        """
        ...

    def size(self, name: str) -> int | None:
        """Return the bytes a blob takes, or None when there is none."""
        ...

    def sizes(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Yield the name and the bytes of all blobs below a prefix such as `releases/`."""
        ...

    def delete(self, name: str) -> None:
        """Forget a blob, if it is there."""
        ...

    def free_bytes(self) -> int | None:
        """Return the space left, or None where nobody can tell."""
        ...


class FileBlobs:
    """Blobs as files below `root`, written as temporary file, fsync, rename."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def place(self) -> str:
        return str(self.root)

    def path(self, name: str) -> Path:
        """Return where the file is, or would be."""
        return self.root / name

    def read(self, name: str, limit_bytes: int) -> bytes:
        try:
            with self.path(name).open("rb") as file:
                return file.read(limit_bytes)
        except FileNotFoundError as error:
            raise NotFound(f"{name} is missing from {self.root}") from error
        except OSError as error:
            raise Unreadable(
                f"{name} in {self.root} cannot be read",
                found=error.strerror,
                hint="is that disk well, and may this user read there?",
            ) from error

    def write(self, name: str, data: bytes) -> None:
        target, incoming = self.path(name), self.root / INCOMING
        temporary = incoming / secrets.token_hex(16)
        try:
            incoming.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            self.place_whole(temporary, target)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            if error.errno not in _FULL:
                raise self._refused(f"{name} cannot be written", error) from error
            raise Unavailable(
                f"the disk filled up while {name} was written to {self.root}",
                hint="free some space and try again; nothing was left behind",
            ) from error

    def place_whole(self, temporary: Path, target: Path) -> None:
        """Let a file that is written and synced appear under its name."""
        _make_folder(target.parent)
        temporary.rename(target)
        _sync_folder(target.parent)

    def size(self, name: str) -> int | None:
        try:
            return self.path(name).stat().st_size
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._refused(f"{name} cannot be looked at", error) from error

    def sizes(self, prefix: str) -> Iterator[tuple[str, int]]:
        above = len(str(self.root)) + 1
        # What cannot be listed must not pass for what is not there: others would be removed.
        for folder, _, files in os.walk(self.path(prefix), onerror=self._not_listed):
            for file in files:
                path = f"{folder}/{file}"
                # What is deleted meanwhile was not there.
                with contextlib.suppress(FileNotFoundError):
                    yield path[above:], os.stat(path).st_size

    def _not_listed(self, error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise self._refused(f"{error.filename} cannot be listed", error) from error

    def delete(self, name: str) -> None:
        path = self.path(name)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise self._refused(f"{name} cannot be removed", error) from error
        # Its folder goes with the last file in it; a writer that needs it makes it again.
        with contextlib.suppress(OSError):
            path.parent.rmdir()

    def free_bytes(self) -> int | None:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            return shutil.disk_usage(self.root).free
        except OSError as error:
            raise self._refused("nothing can be written", error) from error

    def _refused(self, what: str, error: OSError) -> Unavailable:
        return Unavailable(
            f"{what} in {self.root}",
            found=error.strerror,
            hint="is that disk well and mounted for writing, and may this user write there?",
        )

    def clear_incoming(self) -> None:
        """Remove what killed writers left. Only for who knows that nobody writes now."""
        shutil.rmtree(self.root / INCOMING, ignore_errors=True)


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
