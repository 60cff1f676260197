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

        Raises Unavailable when there is no space; the name is then as before.
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
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
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

    def sizes(self, prefix: str) -> Iterator[tuple[str, int]]:
        above = len(str(self.root)) + 1
        for folder, _, files in os.walk(self.path(prefix)):
            for file in files:
                path = f"{folder}/{file}"
                # What is deleted meanwhile was not there.
                with contextlib.suppress(FileNotFoundError):
                    yield path[above:], os.stat(path).st_size

    def delete(self, name: str) -> None:
        path = self.path(name)
        path.unlink(missing_ok=True)
        # Its folder goes with the last file in it; a writer that needs it makes it again.
        with contextlib.suppress(OSError):
            path.parent.rmdir()

    def free_bytes(self) -> int | None:
        self.root.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(self.root).free

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
