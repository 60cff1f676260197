"""Remove what nothing refers to: releases that were given up, and chunks of no release.

Who decides which releases are kept is the service; this only does it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

from provisioner.errors import Conflict, NotFound, TrustError
from provisioner.imaging.archive import Archive, folder_of

_CHUNKS: Final = "chunks/"


@dataclass(frozen=True)
class Collected:
    """What was removed, or would be: digests of releases, a count of chunks, their bytes."""

    releases: tuple[str, ...]
    chunks: int
    freed_bytes: int


def collect(
    archive: Archive,
    keep: Callable[[], Collection[str]],
    *,
    dry_run: bool = False,
) -> Collected:
    """Remove all releases but those to keep, and then every chunk that none of these needs.

    keep is asked for the digests under the archive's lock, so that a release that is being
    published is either seen whole or not begun. A removed release loses its manifest first:
    a kill in the middle leaves chunks of no release, which the next run removes.

    Raises Conflict while somebody publishes, and TrustError when a release to keep is
    damaged or has no trusted signature: what it needs is then not known, so nothing goes.
    """
    with archive.locked():
        kept = set(keep())
        gone = [digest for digest in archive.digests() if digest not in kept]
        needed: set[str] = set()
        for digest in kept & set(archive.digests()):
            needed |= _needed(archive, digest)
        if not dry_run:
            for digest in gone:
                _remove_release(archive, digest)
        count, freed_bytes = _sweep(archive, needed, dry_run=dry_run)
    return Collected(tuple(gone), count, freed_bytes)


def _needed(archive: Archive, digest: str) -> frozenset[str]:
    try:
        return archive.load(digest).distinct_chunks
    except (TrustError, NotFound) as error:
        raise Conflict(
            f"release {digest} is to be kept and cannot be read, so nothing was removed",
            found=error.message,
            hint="provisioner image verify --all",
        ) from error


def _remove_release(archive: Archive, digest: str) -> None:
    folder = folder_of(digest)
    archive.blobs.delete(f"{folder}/manifest.json")
    for name in list(archive.blobs.names(f"{folder}/")):
        archive.blobs.delete(name)


def _sweep(archive: Archive, needed: set[str], *, dry_run: bool) -> tuple[int, int]:
    """Remove the chunks that are not needed; return how many, and their bytes."""
    count, freed_bytes = 0, 0
    for name in list(archive.blobs.names(_CHUNKS)):
        if name.rpartition("/")[2] in needed:
            continue
        count += 1
        freed_bytes += archive.blobs.size(name) or 0
        if not dry_run:
            archive.blobs.delete(name)
    return count, freed_bytes
