"""Small files that are there whole or not at all, also when the process or the power ends."""

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from .errors import Conflict

FOR_ITS_OWNER: Final = 0o600
FOR_ALL: Final = 0o666  # as far as the umask lets
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def write_new(path: Path, text: str, mode: int) -> None:
    """Write a new file, and wait until it is on the disk. Raises FileExistsError.

    After any other error, such as that of a full disk, there is no file.
    """
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(file, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
    except (OSError, ValueError):
        path.unlink(missing_ok=True)
        raise


def write_secret(path: Path, text: str) -> None:
    """Write a new file that only its owner may read, as `write_new` does."""
    write_new(path, text, FOR_ITS_OWNER)


def replace_whole(path: Path, text: str, mode: int = FOR_ALL) -> None:
    """Let a file have this content, or keep the one it had; wait until that is on the disk."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        write_new(aside, text, mode)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or what a folder says of its files' names, is on the disk."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextmanager
def alone_in(folder: Path, otherwise: str) -> Iterator[None]:
    """Hold the folder against others who do so; the lock dies with the process.

    Raises Conflict, which says `otherwise`, when somebody has it.
    """
    file = os.open(folder, _FOLDER)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Conflict(otherwise) from error
        yield
    finally:
        os.close(file)


@contextmanager
def one_after_another_in(folder: Path) -> Iterator[None]:
    """Hold the folder as `alone_in` does, as soon as nobody else has it."""
    file = os.open(folder, _FOLDER)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)
