"""Builds the releases that are compared, and puts them into one store. What was built stays in
the cache."""

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from provisioner.core.manifest import Manifest
from provisioner.core.trust import TrustPolicy
from provisioner.imaging.archive import Archive, folder_of
from provisioner.imaging.blobs import FileBlobs
from provisioner.imaging.chunks import chunk_name
from provisioner.imaging.recipe import Recipe
from provisioner.imaging.signing import create_signing_key, load_signing_key, public_hex
from provisioner.lab.lending import lend
from provisioner.lab.shelf import Shelf, lab_recipe
from provisioner.lab.site import cache_directory
from script.bench_parts.figures import Say
from script.bench_parts.release_history import Step, Update, history, small_update, updates_of

OTHER_IMAGE: Final = "debian-12-web"
# What the references are compressed with.
REFERENCE_LEVEL: Final = 3
ZSTD_LIMIT_S: Final = 300


@dataclass(frozen=True)
class Store:
    """An archive with all releases of the bench.

    successive are ten, each built on the one before. month is what the first of them becomes
    with all updates at once, built on it. other is another image, built from nothing.
    """

    archive: Archive
    steps: Sequence[Step]
    successive: Sequence[Manifest]
    month: Manifest
    other: Manifest
    small: Update
    updates: Sequence[Update]

    def chunk_bytes(self, releases: Sequence[Manifest]) -> int:
        """Return what the chunks of these releases take, those they share counted once."""
        digests = {digest for release in releases for digest in release.distinct_chunks}
        return sum(self.archive.blobs.size(chunk_name(digest)) or 0 for digest in digests)

    def bytes(self, releases: Sequence[Manifest]) -> int:
        """Return what these releases take in the store, with all their own files."""
        blobs = self.archive.blobs
        own = [
            size for release in releases for _, size in blobs.sizes(f"{folder_of(release.digest)}/")
        ]
        return self.chunk_bytes(releases) + sum(own)


def build_store(folder: Path, say: Say) -> Store:
    """Return the store, after building what the cache does not have."""
    say("releases (the first time they are built: about 25 minutes)")
    builder = _Builder(folder, say)
    recipe = lab_recipe()
    current = builder.release(recipe, "bench-now")
    updates = updates_of(recipe, current.packages)
    steps = history(recipe, updates)
    successive: list[Manifest] = []
    for number, step in enumerate(steps):
        parent = successive[-1] if successive else None
        successive.append(builder.release(step.recipe, f"bench-{number}", parent))
    return Store(
        archive=builder.archive,
        steps=steps,
        successive=successive,
        month=builder.release(recipe, "bench-month", successive[0]),
        other=builder.release(lab_recipe(OTHER_IMAGE), "bench-other"),
        small=small_update(updates),
        updates=updates,
    )


class _Builder:
    def __init__(self, folder: Path, say: Say) -> None:
        folder.mkdir()
        create_signing_key(folder / "bench.key")
        self._signer = load_signing_key(folder / "bench.key")
        policy = TrustPolicy((public_hex(self._signer.public_key()),))
        self.archive = Archive(FileBlobs(folder / "store"), policy, folder / "lock")
        # Apart from the lab's: a dozen base trees would push its own out.
        cache = cache_directory() / "bench"
        self._shelf = Shelf(cache / "releases", cache, say)

    def release(self, recipe: Recipe, version: str, parent: Manifest | None = None) -> Manifest:
        base = (self.archive, parent) if parent else None
        with self._shelf.release(recipe, version, base) as (kept, manifest):
            lend(kept, manifest, self.archive, signers=[self._signer])
        return manifest


def whole_bytes(raw: Path) -> int:
    """Return the length of the whole image as one zstd stream: what a plain pipe fetches."""
    compress = ["zstd", "-q", f"-{REFERENCE_LEVEL}", "-T0", "--stdout", str(raw)]
    with subprocess.Popen(compress, stdout=subprocess.PIPE) as zstd:
        assert zstd.stdout is not None
        counted = subprocess.run(
            ["wc", "-c"],
            stdin=zstd.stdout,
            capture_output=True,
            check=True,
            text=True,
            timeout=ZSTD_LIMIT_S,
        )
    if zstd.returncode:
        raise subprocess.CalledProcessError(zstd.returncode, compress)
    return int(counted.stdout)
