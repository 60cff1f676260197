"""Releases for virtual hosts, built once and kept between runs, each in an archive of its own.

A release is known by what it is made of: the recipe, the version, the parent, and the code
that builds. Sites get copies, signed with their own keys.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import provisioner
from provisioner.core.manifest import Manifest
from provisioner.core.trust import TrustPolicy
from provisioner.imaging.archive import Archive
from provisioner.imaging.blobs import FileBlobs
from provisioner.imaging.build import built_image
from provisioner.imaging.parent import parent_of
from provisioner.imaging.publish import Publisher
from provisioner.imaging.ramdisk import LAB_KERNEL
from provisioner.imaging.recipe import Recipe, find_recipe, load_recipe
from provisioner.imaging.signing import create_signing_key, load_signing_key, public_hex

RECIPE: Final = "debian-12"
# Modules that no byte of a release depends on.
_APART: Final = frozenset({"bundle", "difference", "garbage", "s3_blobs", "verify"})

Say = Callable[[str], None]


def lab_recipe(name: str = RECIPE) -> Recipe:
    """Return a shipped recipe with the kernel for virtual hosts, which starts faster."""
    return load_recipe(find_recipe(name)).with_kernel(LAB_KERNEL)


class Shelf:
    """The kept releases in `folder`; `cache` is where builds keep packages and base trees."""

    def __init__(self, folder: Path, cache: Path, say: Say) -> None:
        self._folder = folder
        self._cache = cache
        self._say = say

    @contextlib.contextmanager
    def release(
        self, recipe: Recipe, version: str, parent: tuple[Archive, Manifest] | None = None
    ) -> Iterator[tuple[Archive, Manifest]]:
        """Yield an archive and the release in it, built now if it never was.

        parent is an archive and a release in it to build on. Nobody else builds or replaces
        it meanwhile.
        """
        text = f"{recipe.digest} {_sources()} {parent[1].digest if parent else ''}"
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        name = f"{recipe.image}-{version}-{key}"
        with self._alone():
            archive = self._archive(self._folder / name)
            if not (self._folder / name / "whole").exists():
                self._remove_stale()
                self._build(archive, recipe, version, parent)
                (self._folder / name / "sources").write_text(_sources())
                (self._folder / name / "whole").touch()
            found = archive.find(recipe.image, version)
            assert found is not None
            yield archive, found

    def _build(
        self,
        archive: Archive,
        recipe: Recipe,
        version: str,
        parent: tuple[Archive, Manifest] | None,
    ) -> None:
        self._say(f"building {recipe.image}@{version} (once; it is cached)")
        publisher = Publisher(archive, [load_signing_key(self._key)])
        with contextlib.ExitStack() as open_:
            base = open_.enter_context(parent_of(*parent, self._cache)) if parent else None
            built = open_.enter_context(
                built_image(
                    recipe,
                    version,
                    cache=self._cache,
                    now=datetime.now(UTC),
                    say=self._say,
                    parent=base,
                )
            )
            publisher.publish(built.raw, built.facts)

    def _archive(self, folder: Path) -> Archive:
        signer = load_signing_key(self._key)
        policy = TrustPolicy((public_hex(signer.public_key()),))
        return Archive(FileBlobs(folder), policy, folder / "lock")

    @property
    def _key(self) -> Path:
        return self._folder / "shelf.key"

    def _remove_stale(self) -> None:
        """Remove what other code built, and what a killed build left."""
        for folder in self._folder.iterdir():
            sources = folder / "sources"
            is_current = sources.is_file() and sources.read_text() == _sources()
            if folder.is_dir() and not is_current:
                shutil.rmtree(folder)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not self._key.exists():
                create_signing_key(self._key)
            yield


def _sources() -> str:
    """Return a digest of the code that builds, so that what it built before is not taken for
    new."""
    digest = hashlib.sha256()
    for path in sorted((Path(provisioner.__file__).parent / "imaging").glob("*.py")):
        if path.stem not in _APART and not path.stem.startswith("ramdisk"):
            digest.update(path.read_bytes())
    return digest.hexdigest()
