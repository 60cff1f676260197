"""Folders for work under way: locked while they are in use, and cleared once nobody works there.

A process that is killed cannot clean up. Its folder's lock goes with it, and whoever needs
the next folder in the same place removes what it left.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from provisioner.errors import ConfigError, Unavailable
from provisioner.imaging.tools import ToolFailed, as_root_of_a_namespace, run

PREFIX: Final = "provisioner-work-"
# strerror(3) in the locale that programs run in.
_FULL: Final = ("No space left on device", "Disk quota exceeded")


@contextlib.contextmanager
def scratch_folder(place: Path, purpose: str, *, mode: int = 0o700) -> Iterator[Path]:
    """Yield a new folder in place, and remove it with all that is in it.

    Leftovers there of processes that were killed go first, whatever their purpose, so that
    their space counts as free. mode is the folder's, whatever the umask.
    """
    place.mkdir(parents=True, exist_ok=True)
    clear_leftovers(place)
    name = f"{purpose}-{secrets.token_hex(8)}"
    unlocked, folder = place / f".new-{name}", place / f"{PREFIX}{name}"
    unlocked.mkdir(mode=0o700)
    unlocked.chmod(mode)
    with _locked(unlocked):
        # Only now it has the name of what may be a leftover.
        unlocked.rename(folder)
        try:
            yield folder
        finally:
            _remove(folder)


def clear_leftovers(place: Path) -> None:
    """Remove the folders of processes that were killed; one that is in use stays.

    What belongs to somebody else stays as well: place may be a folder for everybody.
    """
    for folder in place.glob(f"{PREFIX}*"):
        # OSError: in use, or of another user, or gone meanwhile, or not a folder.
        with contextlib.suppress(OSError, ToolFailed, ConfigError), _locked(folder) as its:
            if os.fstat(its).st_uid == os.geteuid():
                _remove(folder)


@contextlib.contextmanager
def told_when_full(place: Path) -> Iterator[None]:
    """Raise Unavailable where the block, or a program that it ran, found the disk full.

    place is the folder that the block mostly writes to.
    """
    try:
        yield
    except (OSError, ToolFailed) as error:
        if not _is_full(error):
            raise
        told = Unavailable(
            f"the disk filled up while an image was made in {place}",
            found=error.found if isinstance(error, ToolFailed) else str(error),
            hint="free some space there and in the folder for temporary files ($TMPDIR or /tmp), "
            "or name another folder with --cache; nothing but the cache was left behind",
        )
        # The log of what was done until then.
        for note in getattr(error, "__notes__", ()):
            told.add_note(note)
        raise told from error


def _is_full(error: OSError | ToolFailed) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return any(words in str(error.found) for words in _FULL)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Hold a folder's lock as long as this process lives, and yield its descriptor.

    Raises BlockingIOError when somebody else holds it.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(folder, flags)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield descriptor
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        # Without root, the files of a tree belong to subordinate ids.
        run(as_root_of_a_namespace(["rm", "-rf", "--one-file-system", str(folder)]))
