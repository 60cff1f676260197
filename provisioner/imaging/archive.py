"""The release archive on a file system: signed manifests over a shared store of chunks.

Files appear whole or not at all, and never change. Does not know the database, and does
not delete releases that others may be reading.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from provisioner.core.manifest import MANIFEST_BYTES_MAX, Manifest, is_digest
from provisioner.errors import Conflict, NotFound, RequestError, TrustError, Unavailable
from provisioner.imaging import chunks, signing
from provisioner.imaging.gpt import read_partitions

# Kept free for everything else on that file system, the database above all.
SPACE_RESERVE_BYTES: Final = 256 * 1024 * 1024
RELEASES_MAX: Final = 10_000
IMAGE_BYTES_MAX: Final = 1 << 40

Progress = Callable[[str, int, int], None]
"""Called with (phase, done bytes, total bytes); must return quickly."""


def silent(phase: str, done_bytes: int, total_bytes: int) -> None:
    """Progress for callers that do not want any."""


def unregistered(manifest: Manifest) -> None:
    """Keep the release in the archive only."""


@dataclass(frozen=True)
class ReleaseFacts:
    """What the maker of an image knows of it; the rest of the manifest is read from the bytes.

    root_partition is the number of the partition to digest as root, or None when
    the whole image shall be.
    """

    image: str
    version: str
    architecture: str
    firmware: tuple[str, ...]
    release_id: str
    packages: dict[str, str]
    recipe_digest: str
    builder: str
    built_at: str
    root_partition: int | None = None
    parent: str | None = None
    minimum_version: str | None = None
    expires_at: str | None = None


class Archive:
    """Releases below one directory, trusted by one public key.

    Any number of readers, one publisher at a time (a lock file sees to it, also
    between processes).
    """

    def __init__(
        self,
        root: Path,
        key: Ed25519PublicKey,
        *,
        chunk_bytes: int = chunks.CHUNK_BYTES,
        space_reserve_bytes: int = SPACE_RESERVE_BYTES,
    ) -> None:
        self.root = root
        self._key = key
        self._chunk_bytes = chunk_bytes
        self._space_reserve_bytes = space_reserve_bytes

    def release_dir(self, digest: str) -> Path:
        """Return where the release's manifest.json and manifest.sig are, or would be."""
        return self.root / "releases" / _digest(digest)

    def chunk_path(self, digest: str) -> Path:
        """Return where the chunk is, or would be: one zstd frame of the raw bytes."""
        return self.root / "chunks" / _digest(digest)[:2] / digest

    def load(self, digest: str) -> Manifest:
        """Return the manifest of this release after checking signature and digest.

        Raises NotFound when there is no such release, TrustError when it is not
        the one that was published.
        """
        folder = self.release_dir(digest)
        try:
            data = _read(folder / "manifest.json", MANIFEST_BYTES_MAX + 1)
            signature = _read(folder / "manifest.sig", signing.SIGNATURE_BYTES + 1)
        except FileNotFoundError as error:
            raise NotFound(f"no release {digest} in the archive") from error
        signing.verify(self._key, signature, data, what=f"release {digest}")
        manifest = Manifest.parse(data)
        if manifest.digest != digest:
            raise TrustError(
                "a release stands under another's name", expected=digest, found=manifest.digest
            )
        return manifest

    def releases(self) -> list[Manifest]:
        """Return every release, by image and time; TrustError at the first that is not sound."""
        names = sorted(entry.name for entry in _entries(self.root / "releases"))
        loaded = [self.load(name) for name in names if is_digest(name)]
        return sorted(loaded, key=lambda one: (one.image, one.built_at, one.version))

    def find(self, image: str, version: str) -> Manifest | None:
        """Return the release of this name, if there is one."""
        named = [one for one in self.releases() if (one.image, one.version) == (image, version)]
        return named[0] if named else None

    def publish(
        self,
        raw: Path,
        facts: ReleaseFacts,
        signer: Ed25519PrivateKey,
        *,
        register: Callable[[Manifest], None] = unregistered,
        progress: Progress = silent,
    ) -> Manifest:
        """Chunk and sign the raw disk image, and make it a release. May be repeated.

        raw must not change meanwhile. register is called once the files are
        durable; when it raises, they are taken away again. The same image and
        version with the same bytes is the same release: it is registered again
        and returned as first published.

        Raises Conflict when that version holds other bytes or another publisher
        is at work, Unavailable when the space does not suffice. After any failure
        nothing of the release is left behind.
        """
        if signing.public_pem(signer.public_key()) != signing.public_pem(self._key):
            raise TrustError("the signing key is not the one this archive trusts")
        if raw.stat().st_size > IMAGE_BYTES_MAX:
            raise RequestError(
                f"{raw.name} is too large",
                expected=f"at most {IMAGE_BYTES_MAX} bytes",
                found=f"{raw.stat().st_size} bytes",
            )
        with self._publishing() as staging, contextlib.ExitStack() as undo:
            if len(_entries(self.root / "releases")) >= RELEASES_MAX:
                raise Conflict(f"the archive holds {RELEASES_MAX} releases, its limit")
            self._require_space(raw)
            manifest = self._manifest(raw, facts, staging, progress)
            published = self._same_release(manifest)
            if published is None:
                self._place(manifest, signer.sign(manifest.to_bytes()), staging, undo)
                published = self.load(manifest.digest)
            register(published)
            undo.pop_all()
        return published

    def write_image(self, manifest: Manifest, target: Path, progress: Progress = silent) -> None:
        """Put the release together again as a new sparse raw image, checking every chunk.

        Raises TrustError when a chunk is damaged, NotFound when one is missing;
        target is then removed.
        """
        try:
            with target.open("xb") as disk:
                disk.truncate(manifest.size_bytes)
                for index, digest in manifest.stored_chunks():
                    length = manifest.chunk_length(index)
                    data = chunks.read_chunk(self.chunk_path(digest), digest, length)
                    disk.seek(index * manifest.chunk_bytes)
                    disk.write(data)
                    progress("writing", index * manifest.chunk_bytes, manifest.size_bytes)
        except (TrustError, NotFound, OSError):
            target.unlink(missing_ok=True)
            raise

    @contextlib.contextmanager
    def _publishing(self) -> Iterator[Path]:
        """Hold the publisher's lock, and yield an empty directory to prepare files in."""
        incoming = self.root / "incoming"
        for folder in (incoming, self.root / "releases", self.root / "chunks"):
            folder.mkdir(parents=True, exist_ok=True)
        with (self.root / "publish.lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise Conflict(
                    "another publisher is at work on this archive", hint="try again when it is done"
                ) from error
            # Whatever lies here belongs to a publisher that was killed: we hold the lock.
            for left in _entries(incoming):
                shutil.rmtree(left)
            staging = incoming / secrets.token_hex(8)
            staging.mkdir()
            try:
                yield staging
            finally:
                shutil.rmtree(staging)

    def _require_space(self, raw: Path) -> None:
        """Raise Unavailable unless even chunks that do not compress would fit."""
        needed = chunks.data_bytes(raw) + self._space_reserve_bytes
        free = shutil.disk_usage(self.root).free
        if free < needed:
            raise Unavailable(
                f"not enough space in {self.root} to publish {raw.name}",
                expected=f"{needed} bytes free",
                found=f"{free} bytes free",
                hint="free some space, or remove releases that nothing refers to",
            )

    def _manifest(
        self, raw: Path, facts: ReleaseFacts, staging: Path, progress: Progress
    ) -> Manifest:
        """Store the new chunks in staging and return the manifest of the whole image."""
        partitions = read_partitions(raw)
        root = [part for part in partitions if part.number == facts.root_partition]
        if facts.root_partition is not None and not root:
            raise RequestError(f"{raw.name} has no partition {facts.root_partition}")
        size_bytes = raw.stat().st_size
        span = (root[0].start_bytes, root[0].size_bytes) if root else (0, size_bytes)
        with ThreadPoolExecutor(1) as beside:
            digesting = beside.submit(chunks.digest_of_span, raw, *span)
            chunked = chunks.store_chunks(
                raw,
                chunk_bytes=self._chunk_bytes,
                existing=self.chunk_path,
                staging=staging,
                progress=lambda done: progress("publishing", done, size_bytes),
            )
            root_digest = digesting.result()
        return Manifest(
            image=facts.image,
            version=facts.version,
            architecture=facts.architecture,
            size_bytes=size_bytes,
            chunk_bytes=self._chunk_bytes,
            chunks=chunked.chunks,
            stored_bytes=chunked.stored_bytes,
            firmware=facts.firmware,
            release_id=facts.release_id,
            root_digest=root_digest,
            partitions=partitions,
            packages=facts.packages,
            recipe_digest=facts.recipe_digest,
            builder=facts.builder,
            built_at=facts.built_at,
            parent=facts.parent,
            minimum_version=facts.minimum_version,
            expires_at=facts.expires_at,
        )

    def _same_release(self, manifest: Manifest) -> Manifest | None:
        """Return the release already published with these bytes under this name.

        Raises Conflict when the name stands for other bytes. Who built it, when,
        and how well it compressed may differ: that is not what runs on a host.
        """
        published = self.find(manifest.image, manifest.version)
        if published is None:
            return None
        incidental = {
            "builder": published.builder,
            "built_at": published.built_at,
            "stored_bytes": published.stored_bytes,
        }
        if replace(manifest, **incidental) != published:  # type: ignore[arg-type] # mixed values
            raise Conflict(
                f"{manifest.name} is already published with other content",
                expected=f"the content of release {published.digest}",
                found="other content",
                hint="a release never changes; publish under a new version",
            )
        return published

    def _place(
        self, manifest: Manifest, signature: bytes, staging: Path, undo: contextlib.ExitStack
    ) -> None:
        """Move the new chunks and then the release into view, registering how to undo it."""
        folders = set()
        for digest in manifest.distinct_chunks:
            if (staging / digest).exists():
                target = self.chunk_path(digest)
                target.parent.mkdir(exist_ok=True)
                if not target.exists():
                    undo.callback(target.unlink, missing_ok=True)
                (staging / digest).rename(target)
                folders.add(target.parent)
        for folder in sorted(folders):
            _sync_directory(folder)
        _sync_directory(self.root / "chunks")
        release = staging / "release"
        release.mkdir()
        chunks.write_durably(release / "manifest.json", manifest.to_bytes())
        chunks.write_durably(release / "manifest.sig", signature)
        _sync_directory(release)
        target = self.release_dir(manifest.digest)
        undo.callback(shutil.rmtree, target, ignore_errors=True)
        release.rename(target)
        _sync_directory(target.parent)


def _digest(digest: str) -> str:
    if not is_digest(digest):
        raise RequestError("not a digest", expected="64 hex digits", found=repr(digest)[:100])
    return digest


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _read(path: Path, limit_bytes: int) -> bytes:
    with path.open("rb") as file:
        return file.read(limit_bytes)


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
