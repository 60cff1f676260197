"""Publish an image: into the archive, and into whatever keeps the list of releases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from provisioner.core.manifest import Manifest
from provisioner.imaging.archive import Archive, Progress, ReleaseFacts, silent


class Publisher:
    """Makes releases of raw images.

    register takes the manifest of a release whose files are durable, and makes it
    known. It must be repeatable: after a crash the same release is registered again.
    """

    def __init__(
        self, archive: Archive, register: Callable[[Manifest], None], signer: Ed25519PrivateKey
    ) -> None:
        self._archive = archive
        self._register = register
        self._signer = signer

    @property
    def archive(self) -> Archive:
        """The archive that releases go to, for reading."""
        return self._archive

    def publish(self, raw: Path, facts: ReleaseFacts, progress: Progress = silent) -> Manifest:
        """Make a release of the raw image; see Archive.publish for what it refuses."""
        return self._archive.publish(
            raw, facts, self._signer, register=self._register, progress=progress
        )
