"""Where the boot listener's immutable files come from. Decides nothing about requests."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, Protocol

from provisioner.core.manifest import MANIFEST_BYTES_MAX
from provisioner.errors import NotFound

# A batch is up to 64 chunks, and an object store takes some milliseconds to find each.
READS_AT_ONCE_MAX: Final = 32
_OF_RELEASES: Final = ("releases/", "chunks/")


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


class StoredElsewhere:
    """Ramdisks from this machine, and all that belongs to releases from where they are kept.

    read returns a file by its path, at most so many bytes of it, or raises NotFound. Safe to
    use from several threads.
    """

    def __init__(self, here: LocalFiles, read: Callable[[str, int], bytes]) -> None:
        self._here = here
        self._read = read
        self._pool = ThreadPoolExecutor(READS_AT_ONCE_MAX, thread_name_prefix="store")

    def local(self, path: str) -> Path | None:
        """Return the path of a file on this machine; what belongs to a release is not here."""
        return None if path.startswith(_OF_RELEASES) else self._here.local(path)

    def read(self, path: str) -> bytes | None:
        """Return the file's bytes. Raises Unavailable when the store does not answer."""
        if not path.startswith(_OF_RELEASES):
            return self._here.read(path)
        try:
            return self._read(path, MANIFEST_BYTES_MAX)
        except NotFound:
            return None

    def read_many(self, paths: Sequence[str]) -> list[bytes | None]:
        """Return the bytes of several files, fetched side by side."""
        return list(self._pool.map(self.read, paths))
