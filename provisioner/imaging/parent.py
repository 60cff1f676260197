"""Choose and fetch the release that a new one is built on."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from provisioner.core.manifest import Manifest, Partition
from provisioner.core.versions import version_key
from provisioner.imaging.archive import Archive, Progress, silent
from provisioner.imaging.recipe import Recipe
from provisioner.imaging.scratch import scratch_folder, told_when_full


@dataclass(frozen=True)
class Parent:
    """A release to build on: its digest and name, its raw disk image, and what is where in it."""

    digest: str
    name: str
    raw: Path
    partitions: tuple[Partition, ...]


def choose_parent(
    recipe: Recipe, releases: Iterable[Manifest], revoked: Collection[str] = ()
) -> Manifest | None:
    """Return the newest release of the recipe's image that a new one can be built on, if any.

    revoked holds the digests of releases that shall not be. One of another architecture
    or size cannot be built on.
    """
    fitting = [
        one
        for one in releases
        if (one.image, one.architecture) == (recipe.image, recipe.architecture)
        and one.size_bytes == recipe.size_bytes
        and one.digest not in revoked
    ]
    return max(fitting, key=lambda one: (one.built_at, version_key(one.version)), default=None)


@contextlib.contextmanager
def parent_of(
    archive: Archive, manifest: Manifest, work: Path, progress: Progress = silent
) -> Iterator[Parent]:
    """Put the release's disk together in a folder, yield it, and remove it again.

    Raises TrustError when a chunk is damaged, NotFound when one is missing, Unavailable
    when the disk fills up.
    """
    with scratch_folder(work, "parent") as folder:
        raw = folder / "disk.raw"
        with told_when_full(work):
            archive.write_image(manifest, raw, progress)
        yield Parent(manifest.digest, manifest.name, raw, manifest.partitions)
