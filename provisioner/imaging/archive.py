"""The release archive: signed manifests, and what belongs to them, over shared chunks.

A release appears whole or not at all, and never changes; a signature may be added to it.
Does not know the database. What makes releases is in `publish.py`, what gets rid of them in
`garbage.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

import zstandard

from provisioner.core.manifest import (
    MANIFEST_BYTES_MAX,
    BootFile,
    Manifest,
    check_image_name,
    check_version,
    is_digest,
)
from provisioner.core.trust import (
    SIGNATURES_BYTES_MAX,
    TrustPolicy,
    check_release,
    check_signatures,
    parse_signatures,
    signatures_to_bytes,
)
from provisioner.errors import Conflict, NotFound, RequestError, TrustError, Unavailable
from provisioner.imaging import signing
from provisioner.imaging.archive_lock import LOCK_WAIT, lock_held
from provisioner.imaging.blobs import Blobs, FileBlobs, Unreadable
from provisioner.imaging.chunks import (
    read_chunk,
)

# Kept free for everything else on that file system, the database above all.
SPACE_RESERVE_BYTES: Final = 256 * 1024 * 1024
RELEASES_MAX: Final = 10_000
IMAGE_BYTES_MAX: Final = 1 << 40
ATTACHMENT_BYTES_MAX: Final = 256 * 1024 * 1024
LOG_BYTES_MAX: Final = 16 * 1024 * 1024
MANIFEST: Final = "manifest.json"
SIGNATURES: Final = "manifest.sig"
_DIGEST_BYTES: Final = 64
# Where chunks come from a bucket, most of the time of one goes into waiting.
READERS: Final = 8
# Attachments and logs are text, written once and read often.
_TEXT_LEVEL: Final = 12

Progress = Callable[[str, int, int], None]
"""Called with (phase, done bytes, total bytes); must return quickly."""


def silent(phase: str, done_bytes: int, total_bytes: int) -> None:
    """Progress for callers that do not want any."""


@dataclass(frozen=True)
class ReleaseFacts:
    """What the maker of an image knows of it; the rest of the manifest is read from the bytes.

    root_partition is the number of the partition to digest as root, or None when
    the whole image shall be. attachments are signed with the manifest; log (text) and
    record (JSON values) only lie beside it, since they differ from build to build.
    """

    image: str
    version: str
    architecture: str
    firmware: tuple[str, ...]
    release_id: str
    packages: Mapping[str, str]
    recipe_digest: str
    builder: str
    built_at: str
    root_partition: int | None = None
    parent: str | None = None
    minimum_version: str | None = None
    expires_at: str | None = None
    kernel: BootFile | None = None
    initrd: BootFile | None = None
    kernel_arguments: tuple[str, ...] = ()
    attachments: Mapping[str, bytes] = field(default_factory=dict)
    log: str = ""
    record: Mapping[str, Any] = field(default_factory=dict)


class Archive:
    """Releases among blobs, trusted by one policy.

    Any number of readers, one publisher at a time: lock_file sees to it, for all
    publishers that share it (one machine publishes).
    """

    def __init__(
        self,
        blobs: Blobs,
        policy: TrustPolicy,
        lock_file: Path,
        *,
        space_reserve_bytes: int = SPACE_RESERVE_BYTES,
        lock_wait: timedelta = LOCK_WAIT,
    ) -> None:
        self.blobs = blobs
        self.policy = policy
        self._lock_file = lock_file
        self._space_reserve_bytes = space_reserve_bytes
        self._lock_wait = lock_wait

    def load(self, digest: str) -> Manifest:
        """Return the manifest of this release after checking signatures and digest.

        At least one trusted key must have signed it. Raises NotFound when there is no such
        release, TrustError when it is not the one that was published.
        """
        return self._load(digest)[0]

    def by_digest(self, digest: str) -> Manifest:
        """Return the manifest with this digest, whoever signed it.

        For who has the digest from a place to trust, such as the database. Raises NotFound,
        and TrustError when the bytes are others.
        """
        return _parsed(self._manifest_bytes(digest), digest)

    def signed_by(self, digest: str) -> set[str]:
        """Return the ids of the trusted keys that signed this release; raises as `load` does."""
        return self._load(digest)[1]

    def check(self, digest: str, *, channel: str | None, now: datetime) -> Manifest:
        """Return the manifest of a release that may be deployed now, as far as trust goes.

        Raises what `load` raises, TrustError for what the policy forbids, and for an
        attachment that is not the one that was signed. Chunks are checked by who writes them.
        """
        manifest, valid = self._load(digest)
        check_release(manifest, valid, self.policy, channel=channel, now=now)
        for name in manifest.attachments:
            self.attachment(manifest, name)
        return manifest

    def check_signed(self, digest: str) -> Manifest:
        """Return the manifest of a release that a disk may be compared with, also when it
        may be deployed no more.

        Raises what `load` raises, and TrustError for too few signatures.
        """
        manifest, valid = self._load(digest)
        check_signatures(manifest, valid, self.policy, channel=None)
        return manifest

    def releases(self) -> list[Manifest]:
        """Return every sound release, by image and time. `verify` tells of the others."""
        loaded = []
        for digest in self.digests():
            with contextlib.suppress(TrustError, NotFound, Unreadable):
                loaded.append(self.load(digest))
        return sorted(loaded, key=lambda one: (one.image, one.built_at, one.version))

    def digests(self) -> list[str]:
        """Return the digests of all releases, sound or not, sorted."""
        names = (name for name, _ in self.blobs.sizes("releases/"))
        found = {name.split("/")[1] for name in names if name.endswith(f"/{MANIFEST}")}
        return sorted(digest for digest in found if is_digest(digest))

    def find(self, image: str, version: str) -> Manifest | None:
        """Return the release of this name, if there is one."""
        digest = self.digest_under(name_of(image, version))
        try:
            return None if digest is None else self.load(digest)
        except NotFound:
            return None

    def digest_under(self, name: str) -> str | None:
        """Return for which release a name stands, which may be gone; None for no such name."""
        try:
            return self.blobs.read(name, _DIGEST_BYTES).decode("ascii")
        except NotFound:
            return None

    def attachment(self, manifest: Manifest, name: str) -> bytes:
        """Return a signed attachment. Raises NotFound, and TrustError when it was changed."""
        expected = manifest.attachments.get(name)
        if expected is None:
            raise NotFound(f"{manifest.name} has no {name}")
        data = self.unpacked(f"{folder_of(manifest.digest)}/{name}.zst", ATTACHMENT_BYTES_MAX)
        found = hashlib.sha256(data).hexdigest()
        if found != expected:
            raise TrustError(
                f"{name} of {manifest.name} is not the one that was signed",
                expected=expected,
                found=found,
                hint="do not deploy it; restore the archive, or publish a new version",
            )
        return data

    def record(self, digest: str) -> dict[str, Any]:
        """Return what the builder noted of the build; nobody signed it."""
        data = self.blobs.read(f"{folder_of(digest)}/build.json", LOG_BYTES_MAX)
        value: dict[str, Any] = json.loads(data)
        return value

    def log(self, digest: str) -> str:
        """Return the build's log."""
        name = f"{folder_of(digest)}/build.log.zst"
        return self.unpacked(name, LOG_BYTES_MAX).decode("utf-8", "replace")

    def write_image(self, manifest: Manifest, target: Path, progress: Progress = silent) -> None:
        """Put the release together again as a new sparse raw image, checking every chunk.

        Raises TrustError when a chunk is damaged, NotFound when one is missing, Unavailable
        when one cannot be read; target is then removed.
        """
        try:
            with target.open("xb") as disk:
                disk.truncate(manifest.size_bytes)
                for index, data in self._chunks(manifest):
                    disk.seek(index * manifest.chunk_bytes)
                    disk.write(data)
                    progress("writing", index * manifest.chunk_bytes, manifest.size_bytes)
        except (TrustError, NotFound, Unavailable, OSError):
            target.unlink(missing_ok=True)
            raise

    def _chunks(self, manifest: Manifest) -> Iterator[tuple[int, bytes]]:
        """Yield the stored chunks in order, several of them being read at a time."""

        def read(stored: tuple[int, str]) -> tuple[int, bytes]:
            index, digest = stored
            return index, read_chunk(self.blobs, digest, manifest.chunk_length(index))

        stored = manifest.stored_chunks()
        with ThreadPoolExecutor(READERS) as pool:
            while batch := list(itertools.islice(stored, 4 * READERS)):
                yield from pool.map(read, batch)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of whoever changes the archive, after waiting a little for others.

        Raises Unavailable when somebody holds it longer than that.
        """
        with lock_held(self._lock_file, self._lock_wait):
            if isinstance(self.blobs, FileBlobs):
                self.blobs.clear_incoming()
            yield

    def wait_for_others(self) -> None:
        """Raise Unavailable, as `locked` does, before work that could then not be published."""
        with lock_held(self._lock_file, self._lock_wait):
            pass

    def require_space(self, needed_bytes: int, what: str) -> None:
        """Raise Unavailable unless so much fits beside the reserve, where anybody can tell."""
        needed = needed_bytes + self._space_reserve_bytes
        free = self.blobs.free_bytes()
        if free is not None and free < needed:
            raise Unavailable(
                f"not enough space in {self.blobs.place} to publish {what}",
                expected=f"{needed} bytes free",
                found=f"{free} bytes free",
                hint="free some space, or remove releases: provisioner image gc",
            )

    def place(
        self, manifest: Manifest, files: Mapping[str, bytes], undo: contextlib.ExitStack
    ) -> None:
        """Write a release's own files, its manifest last, and then its name.

        What is written is given to undo, to be taken away again.
        """
        if len(self.digests()) >= RELEASES_MAX:
            raise Conflict(f"the archive holds {RELEASES_MAX} releases, its limit")
        folder = folder_of(manifest.digest)
        for file in sorted(files, key=lambda file: file == MANIFEST):
            undo.callback(self.blobs.delete, f"{folder}/{file}")
            self.blobs.write(f"{folder}/{file}", files[file])
        name = name_of(manifest.image, manifest.version)
        undo.callback(self.blobs.delete, name)
        self.blobs.write(name, manifest.digest.encode("ascii"))

    def add_signatures(self, manifest: Manifest, added: Mapping[str, bytes]) -> None:
        """Keep further signatures beside a release. Only for who holds the lock."""
        known = self.signatures(manifest.digest)
        if merged := {**known, **added}:
            name = f"{folder_of(manifest.digest)}/{SIGNATURES}"
            self.blobs.write(name, signatures_to_bytes(merged))

    def signatures(self, digest: str) -> dict[str, bytes]:
        """Return {key id: signature} as they lie beside the manifest. Nothing is verified."""
        name = f"{folder_of(digest)}/{SIGNATURES}"
        return parse_signatures(self.blobs.read(name, SIGNATURES_BYTES_MAX + 1))

    def _load(self, digest: str) -> tuple[Manifest, set[str]]:
        data = self._manifest_bytes(digest)
        valid = signing.valid_keys(data, self.signatures(digest), self.policy)
        if not valid:
            raise TrustError(
                f"release {digest} is signed by no trusted key",
                expected=f"a signature by one of {len(self.policy.keys)} trusted keys",
                found="none",
                hint="was its key dropped? sign it again: provisioner image sign",
            )
        return _parsed(data, digest), valid

    def _manifest_bytes(self, digest: str) -> bytes:
        try:
            return self.blobs.read(f"{folder_of(digest)}/{MANIFEST}", MANIFEST_BYTES_MAX + 1)
        except NotFound as error:
            raise NotFound(f"no release {digest} in the archive") from error

    def unpacked(self, name: str, limit_bytes: int) -> bytes:
        """Return what is in a blob that is one zstd frame, unpacked to at most limit_bytes."""
        data = self.blobs.read(name, limit_bytes + 1)
        try:
            length = zstandard.get_frame_parameters(data).content_size
            # An unknown length is the largest number there is.
            if length > limit_bytes:
                raise TrustError(f"{name} is too large", expected=f"at most {limit_bytes} bytes")
            return zstandard.ZstdDecompressor().decompress(
                data, max_output_size=length, allow_extra_data=False
            )
        except zstandard.ZstdError as error:
            raise TrustError(f"{name} is damaged", found="not a whole zstd frame") from error


def _parsed(data: bytes, digest: str) -> Manifest:
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise TrustError("a release stands under another's name", expected=digest, found=found)
    return Manifest.parse(data)


def folder_of(digest: str) -> str:
    """Return the prefix of a release's own blobs. Raises RequestError for no digest."""
    if not is_digest(digest):
        raise RequestError("not a digest", expected="64 hex digits", found=repr(digest)[:100])
    return f"releases/{digest}"


def name_of(image: str, version: str) -> str:
    """Return the name of the blob that holds the digest of image@version."""
    check_image_name(image)
    check_version(version)
    return f"names/{image}/{version}"


def release_files(
    manifest: Manifest, signatures: Mapping[str, bytes], facts: ReleaseFacts
) -> dict[str, bytes]:
    """Return a release's own files by name, as they are stored."""
    pack = zstandard.ZstdCompressor(level=_TEXT_LEVEL).compress
    return {
        MANIFEST: manifest.to_bytes(),
        f"{MANIFEST}.zst": pack(manifest.to_bytes()),
        SIGNATURES: signatures_to_bytes(signatures),
        "build.json": json.dumps(dict(facts.record), sort_keys=True, indent=1).encode(),
        "build.log.zst": pack(facts.log.encode()[-LOG_BYTES_MAX:]),
        **{f"{name}.zst": pack(data) for name, data in facts.attachments.items()},
    }
