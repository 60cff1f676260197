"""Where the boot listener's immutable files come from. Decides nothing about requests."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Final, Protocol

from provisioner.core.manifest import MANIFEST_BYTES_MAX
from provisioner.errors import NotFound, Unavailable

from .threads import BOOT_THREADS, SCRIPT_THREADS

# A batch is up to 64 chunks, and an object store takes some milliseconds to find each.
READS_AT_ONCE_MAX: Final = 32
# How many requests of one process may wait for a store that is not on this machine.
WAITING_MAX: Final = BOOT_THREADS - SCRIPT_THREADS
BYTES: Final = "application/octet-stream"
# A year: the name is the digest of the content, so it can never be stale.
MAX_AGE_S: Final = 365 * 24 * 3600
IMMUTABLE: Final = f"public, max-age={MAX_AGE_S}, immutable"
_OF_RELEASES: Final = ("releases/", "chunks/")


class FileSource(Protocol):
    """Files by their path in the store, such as `chunks/ab/<digest>`."""

    def local(self, path: str) -> Path | None:
        """Return where the file lies on this machine, or None when it is not here."""

    def read(self, path: str) -> bytes | None:
        """Return the file's bytes, or None when there is no such file."""

    def read_many(self, paths: Sequence[str]) -> list[bytes | None]:
        """Return the bytes of several small files, in order."""

    def turn(self) -> AbstractContextManager[None]:
        """Hold one of the places among those who may wait for `read` and `read_many`.

        Raises Unavailable at once when all are taken.
        """


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

    def read_into(self, path: str, into: memoryview, *, may_wait: bool = True) -> int | None:
        """Read a file into a buffer, and return its length.

        None when it cannot be read or does not fit, or, unless may_wait, when not all of it
        is in memory.
        """
        try:
            file = os.open(f"{self._root}/{path}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            count = os.preadv(file, [into], 0, 0 if may_wait else os.RWF_NOWAIT)
            # What comes may end where the memory does, or the good part of a disk.
            return count if count == os.lseek(file, 0, os.SEEK_END) else None
        except OSError:
            return None
        finally:
            os.close(file)

    def read_many(self, paths: Sequence[str]) -> list[bytes | None]:
        """Return the bytes of several files."""
        return [self.read(path) for path in paths]

    def turn(self) -> AbstractContextManager[None]:
        """Let everybody have a turn: a disk is not waited for."""
        return nullcontext()


class StoredElsewhere:
    """Ramdisks from this machine, and all that belongs to releases from where they are kept.

    read returns a file by its path, at most so many bytes of it, or raises NotFound. Safe to
    use from several threads. Whoever reads what belongs to releases holds a turn: the store
    may take a minute and a half to give up, and boot scripts need threads meanwhile.
    """

    def __init__(self, here: LocalFiles, read: Callable[[str, int], bytes]) -> None:
        self._here = here
        self._read = read
        self._pool = ThreadPoolExecutor(READS_AT_ONCE_MAX, thread_name_prefix="store")
        self._turns = threading.BoundedSemaphore(WAITING_MAX)

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

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Hold one of WAITING_MAX places."""
        if not self._turns.acquire(blocking=False):
            raise Unavailable(
                "the release store is slow, and enough requests wait for it",
                expected=f"at most {WAITING_MAX} at a time",
                hint="ask again in a few seconds",
            )
        try:
            yield
        finally:
            self._turns.release()
