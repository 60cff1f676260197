"""Publish an image: into the archive, and into whatever keeps the list of releases."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from provisioner.core.manifest import CHUNKS_MAX, Manifest
from provisioner.errors import Conflict, RequestError, TrustError
from provisioner.imaging import signing
from provisioner.imaging.archive import (
    IMAGE_BYTES_MAX,
    Archive,
    Progress,
    ReleaseFacts,
    release_files,
    silent,
)
from provisioner.imaging.chunks import CHUNK_BYTES, ChunkWriter, data_bytes, digest_of_span
from provisioner.imaging.gpt import read_partitions

Register = Callable[[Manifest, int], None]
"""Makes a release known, given its manifest and the bytes that its chunks take in the archive.

Called when everything is durable. Must be repeatable: after a crash the same release is
registered again. Raises RequestError or TrustError only when it is not registered.
"""


def unregistered(manifest: Manifest, stored_bytes: int) -> None:
    """Keep the release in the archive only."""


class Publisher:
    """Makes releases of raw images, signed by each of the signers."""

    def __init__(
        self,
        archive: Archive,
        signers: Sequence[Ed25519PrivateKey],
        register: Register = unregistered,
        *,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        """chunk_bytes is the size of chunks, where an image is not so large that it has to be
        more. Raises TrustError for a signer that the archive does not trust.
        """
        own = {signing.public_hex(one.public_key()) for one in signers}
        if not own or not own <= set(archive.policy.keys):
            raise TrustError(
                "the signing key is not one that this archive trusts",
                hint="provisioner image keys list: the trusted ones",
            )
        self.archive = archive
        self.register = register
        self._signers = signers
        self._chunk_bytes = chunk_bytes

    def publish(
        self,
        raw: Path,
        facts: ReleaseFacts,
        progress: Progress = silent,
    ) -> Manifest:
        """Chunk and sign the raw disk image, and make it a release. May be repeated.

        raw must not change meanwhile. When the registering is refused, all is taken away again.
        The same image and version with the same bytes is the same release: it is registered
        again and returned as first published.

        Raises Conflict when that version holds other bytes, Unavailable when another publisher
        is at work or the space does not suffice. After a failure nothing of the release is left
        behind, unless it may be registered all the same: see `registered`.
        """
        if raw.stat().st_size > IMAGE_BYTES_MAX:
            raise RequestError(
                f"{raw.name} is too large",
                expected=f"at most {IMAGE_BYTES_MAX} bytes",
                found=f"{raw.stat().st_size} bytes",
            )
        with self.archive.locked(), contextlib.ExitStack() as undo:
            self.archive.require_space(data_bytes(raw), raw.name)
            manifest, stored_bytes = self._store(raw, facts, undo, progress)
            published = published_as(self.archive, manifest)
            if published is None:
                signatures = signing.sign(manifest.to_bytes(), self._signers)
                files = release_files(manifest, signatures, facts)
                self.archive.place(manifest, files, undo)
                published = self.archive.load(manifest.digest)
            registered(self.register, published, stored_bytes, undo)
        return published

    def sign(self, digest: str) -> Manifest:
        """Add the signers' signatures to the release with this digest, whoever signed it.

        The digest must come from a place to trust. Raises as `Archive.by_digest` does.
        """
        with self.archive.locked():
            manifest = self.archive.by_digest(digest)
            added = signing.sign(manifest.to_bytes(), self._signers)
            self.archive.add_signatures(manifest, added)
        return manifest

    def _store(
        self, raw: Path, facts: ReleaseFacts, undo: contextlib.ExitStack, progress: Progress
    ) -> tuple[Manifest, int]:
        """Store the chunks; return the manifest, and the bytes that its chunks take."""
        partitions = read_partitions(raw)
        root = [part for part in partitions if part.number == facts.root_partition]
        if facts.root_partition is not None and not root:
            raise RequestError(f"{raw.name} has no partition {facts.root_partition}")
        size_bytes = raw.stat().st_size
        span = (root[0].start_bytes, root[0].size_bytes) if root else (0, size_bytes)
        chunk_bytes = chunk_bytes_for(size_bytes, self._chunk_bytes)
        writer = ChunkWriter(raw, self.archive.blobs, chunk_bytes)
        undo.callback(self._forget, writer)
        with ThreadPoolExecutor(1) as beside:
            digesting = beside.submit(digest_of_span, raw, *span)
            chunked = writer.store(lambda done: progress("publishing", done, size_bytes))
            root_digest = digesting.result()
        kept = {one: getattr(facts, one) for one in _COPIED}
        manifest = Manifest(
            size_bytes=size_bytes,
            chunk_bytes=chunk_bytes,
            chunks=tuple(chunked.chunks),
            root_digest=root_digest,
            partitions=partitions,
            attachments={
                name: hashlib.sha256(data).hexdigest() for name, data in facts.attachments.items()
            },
            **kept,
        )
        return manifest, chunked.stored_bytes

    def _forget(self, writer: ChunkWriter) -> None:
        for name in writer.result.added:
            self.archive.blobs.delete(name)


def registered(
    register: Register, manifest: Manifest, stored_bytes: int, undo: contextlib.ExitStack
) -> None:
    """Make a release known; when that is refused, and then only, undo takes its bytes away.

    The database may hold it although this raises: a signal comes behind the commit, or the
    answer to the commit is lost. Then the bytes stay. If it is not registered, it is by doing
    the same again, or the next `image gc` removes it.
    """
    written = undo.pop_all()
    try:
        register(manifest, stored_bytes)
    except _REFUSED:
        written.close()
        raise


def chunk_bytes_for(size_bytes: int, wanted: int) -> int:
    """Return the size of chunks for an image: what is wanted, doubled until they are few enough."""
    while -(-size_bytes // wanted) > CHUNKS_MAX:
        wanted *= 2
    return wanted


def published_as(archive: Archive, manifest: Manifest) -> Manifest | None:
    """Return the release already published with these bytes under this name.

    Raises Conflict when the name stands for other bytes. Who built it, when, and on
    which parent may differ: that is not what runs on a host.
    """
    published = archive.find(manifest.image, manifest.version)
    if published is None:
        return None
    same = replace(
        manifest,
        builder=published.builder,
        built_at=published.built_at,
        parent=published.parent,
    )
    if same != published:
        raise Conflict(
            f"{manifest.name} is already published with other content",
            expected=f"the content of release {published.digest}",
            found="other content",
            hint="a release never changes; publish under a new version. (Is none listed under this "
            "one? Its publisher was killed: provisioner image gc frees it.)",
        )
    return published


# What a registering raises that decided against it, and has saved nothing.
_REFUSED: Final = (RequestError, TrustError)
# Taken over from the facts as they are.
_COPIED: Final = (
    *("image", "version", "architecture", "firmware", "release_id", "packages"),
    *("recipe_digest", "builder", "built_at", "parent", "minimum_version", "expires_at"),
    *("kernel", "initrd", "kernel_arguments"),
)
