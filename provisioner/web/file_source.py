"""Where the boot listener's immutable files come from. Decides nothing about requests."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol


class FileSource(Protocol):
    """Files by their path in the store, such as `chunks/ab/<digest>`."""

    def local(self, path: str) -> Path | None:
        """Return where the file lies on this machine, or None when it is not here."""

    def read(self, path: str) -> bytes | None:
        """Return the file's bytes, or None when there is no such file."""

    def read_many(self, paths: Sequence[str]) -> list[bytes | None]:
        """Return the bytes of several small files, in order."""


class LocalFiles:
    """The files below one directory."""

    def __init__(self, root: Path) -> None:
        # Joining texts is many times as fast as joining paths, 64 times for each request.
        self._root = str(root)

    def local(self, path: str) -> Path | None:
        """Return the file's path on this machine."""
        found = Path(self._root, path)
        return found if found.is_file() else None

    def read(self, path: str) -> bytes | None:
        """Return the file's bytes."""
        try:
            with open(f"{self._root}/{path}", "rb", buffering=0) as file:
                return file.readall()
        except (FileNotFoundError, IsADirectoryError):
            return None

    def read_many(self, paths: Sequence[str]) -> list[bytes | None]:
        """Return the bytes of several files."""
        return [self.read(path) for path in paths]
