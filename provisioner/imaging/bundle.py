"""A release as one file, for a site without a connection: a tar with the manifest first.

What is imported is trusted by its signatures alone: the manifest is proven before the first
chunk is read, and each chunk and attachment by its digest before it is kept.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

import zstandard

from provisioner.core.manifest import MANIFEST_BYTES_MAX, Manifest
from provisioner.core.trust import SIGNATURES_BYTES_MAX, parse_signatures
from provisioner.errors import Conflict, NotFound, RequestError, TrustError, Unavailable
from provisioner.imaging import signing
from provisioner.imaging.archive import (
    ATTACHMENT_BYTES_MAX,
    LOG_BYTES_MAX,
    MANIFEST,
    SIGNATURES,
    Archive,
    Progress,
    folder_of,
    silent,
)
from provisioner.imaging.chunks import FRAME_OVERHEAD_BYTES_MAX, chunk_name, unpack
from provisioner.imaging.publish import Register, published_as, registered, unregistered

FIRST: Final = (MANIFEST, SIGNATURES)
RECORDS: Final = ("build.json", "build.log.zst")
SUFFIX: Final = ".provisioner-release"


def export_release(
    archive: Archive, digest: str, target: Path, progress: Progress = silent
) -> Manifest:
    """Write a release to a new file, which appears whole or not at all.

    Raises RequestError when the file exists, TrustError and NotFound when the release is
    not sound: what leaves the archive has been checked.
    """
    manifest = archive.load(digest)
    if target.exists():
        raise RequestError(f"{target} exists already", hint="name another file, or remove it")
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    try:
        with partial.open("xb") as file:
            with tarfile.open(fileobj=file, mode="w|") as bundle:
                _write(archive, manifest, bundle, progress)
            file.flush()
            os.fsync(file.fileno())
        _place(partial, target)
    except FileExistsError as error:
        raise RequestError(f"{target} exists already") from error
    except OSError as error:
        raise _not_written(target, error) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    return manifest


def import_release(
    archive: Archive,
    source: Path,
    register: Register = unregistered,
    progress: Progress = silent,
) -> Manifest:
    """Take a release from a file into the archive, and return its manifest. Repeatable.

    Raises TrustError for a release that no key trusted here has signed, and for anything in
    it that its manifest does not name; Conflict when that version is another release here, with
    other bytes or with the same; RequestError when the file is no such bundle, Unavailable when
    the archive takes nothing. Nothing of it stays then. What stays when the registering breaks
    off, `registered` says.
    """
    with archive.locked(), contextlib.ExitStack() as undo, _opened(source) as (bundle, size_bytes):
        members = _members(bundle)
        data = _expect(members, FIRST[0], MANIFEST_BYTES_MAX)
        packed = _expect(members, FIRST[1], SIGNATURES_BYTES_MAX)
        signatures = parse_signatures(packed)
        valid = signing.valid_keys(data, signatures, archive.policy)
        if not valid:
            raise TrustError(
                f"{source.name} is signed by no key that is trusted here",
                expected=f"a signature by one of {len(archive.policy.keys)} trusted keys",
                hint="trust its publisher's key first: provisioner image keys trust FILE",
            )
        manifest = Manifest.parse(data)
        archive.require_space(size_bytes, source.name)
        published = _here_already(archive, manifest)
        files = {FIRST[0]: data, FIRST[1]: packed}
        stored_bytes = _take_chunks(archive, manifest, members, files, undo, progress)
        if published is None:
            files["manifest.json.zst"] = zstandard.ZstdCompressor(level=12).compress(data)
            archive.place(manifest, files, undo)
            published = archive.load(manifest.digest)
        else:
            # Somebody signed it elsewhere, and sends it back.
            archive.add_signatures(published, {key: signatures[key] for key in valid})
        registered(register, published, stored_bytes, undo)
    return published


def _here_already(archive: Archive, manifest: Manifest) -> Manifest | None:
    """Return the bundle's release if it is in the archive. Raises Conflict for another one of
    its name, also for one with the same bytes: what was asked for is this very release."""
    published = published_as(archive, manifest)
    if published is not None and published.digest != manifest.digest:
        raise Conflict(
            f"{manifest.name} was published here as well, as another release with the same bytes",
            expected=f"release {manifest.digest}, which the bundle holds",
            found=f"release {published.digest}",
            hint="use the one that is here: it writes the same to a disk",
        )
    return published


def _place(partial: Path, target: Path) -> None:
    """Give the finished file its name, never another's. Raises FileExistsError."""
    try:
        os.link(partial, target)
    except FileExistsError:
        raise
    except OSError:
        # A stick to carry it on knows no second names; then somebody else's file that came
        # in between these two lines is lost.
        if target.exists():
            raise FileExistsError(target) from None
        partial.rename(target)


def _not_written(target: Path, error: OSError) -> RequestError | Unavailable:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Unavailable(f"the disk filled up while {target} was written", hint="free some space")
    return RequestError(f"{target} cannot be written", found=error.strerror)


def _write(
    archive: Archive, manifest: Manifest, bundle: tarfile.TarFile, progress: Progress
) -> None:
    folder = folder_of(manifest.digest)
    for name in FIRST:
        _add(bundle, name, archive.blobs.read(f"{folder}/{name}", MANIFEST_BYTES_MAX))
    for name in sorted(manifest.attachments):
        archive.attachment(manifest, name)  # proves it
        packed = f"{name}.zst"
        _add(bundle, packed, archive.blobs.read(f"{folder}/{packed}", ATTACHMENT_BYTES_MAX))
    for name in RECORDS:
        with contextlib.suppress(NotFound):
            _add(bundle, name, archive.blobs.read(f"{folder}/{name}", LOG_BYTES_MAX))
    done: set[str] = set()
    for index, digest in manifest.stored_chunks():
        if digest not in done:
            done.add(digest)
            length = manifest.chunk_length(index)
            frame = archive.blobs.read(chunk_name(digest), length + FRAME_OVERHEAD_BYTES_MAX)
            unpack(frame, digest, length)
            _add(bundle, chunk_name(digest), frame)
        progress("exporting", index * manifest.chunk_bytes, manifest.size_bytes)


def _take_chunks(
    archive: Archive,
    manifest: Manifest,
    members: Iterator[tuple[str, IO[bytes], int]],
    files: dict[str, bytes],
    undo: contextlib.ExitStack,
    progress: Progress,
) -> int:
    """Keep the chunks, put the other files into `files`; return the bytes of the chunks."""
    lengths = {digest: manifest.chunk_length(i) for i, digest in manifest.stored_chunks()}
    missing, stored_bytes = set(lengths), 0
    for name, content, size in members:
        digest = name.rpartition("/")[2]
        if digest in missing and name == chunk_name(digest):
            frame = _read(content, size, lengths[digest] + FRAME_OVERHEAD_BYTES_MAX, name)
            unpack(frame, digest, lengths[digest])
            if archive.blobs.size(name) is None:
                undo.callback(archive.blobs.delete, name)
            # Also when it is there: what is there may be damaged, and this is not.
            archive.blobs.write(name, frame)
            missing.discard(digest)
            stored_bytes += len(frame)
            done = len(lengths) - len(missing)
            progress("importing", done, len(lengths))
        elif name in RECORDS:
            files[name] = _read(content, size, LOG_BYTES_MAX, name)
        elif name.removesuffix(".zst") in manifest.attachments and name not in files:
            files[name] = _attachment(manifest, name, content, size)
        else:
            raise TrustError(f"the bundle holds {name!r}, which its manifest does not name")
    absent = manifest.attachments.keys() - {name.removesuffix(".zst") for name in files}
    if missing or absent:
        what = sorted(absent) or [f"{len(missing)} chunks, such as {min(missing)}"]
        raise TrustError(f"the bundle of {manifest.name} is not whole", found=f"without {what[0]}")
    return stored_bytes


def _attachment(manifest: Manifest, name: str, content: IO[bytes], size: int) -> bytes:
    packed = _read(content, size, ATTACHMENT_BYTES_MAX, name)
    expected = manifest.attachments[name.removesuffix(".zst")]
    digest = hashlib.sha256()
    try:
        reader = zstandard.ZstdDecompressor().stream_reader(packed)
        while part := reader.read(1024 * 1024):
            digest.update(part)
            if reader.tell() > ATTACHMENT_BYTES_MAX:
                raise TrustError(f"{name} is too large")
    except zstandard.ZstdError as error:
        raise TrustError(f"{name} is damaged", found="not a zstd frame") from error
    if digest.hexdigest() != expected:
        raise TrustError(f"{name} is not the one that was signed", expected=expected)
    return packed


class _Source(io.FileIO):
    """The file as the tar reader reads it; only errors of its own are blamed on it."""

    def read(self, size: int | None = -1, /) -> bytes:
        with _blamed_on(str(self.name)):
            return super().read(size)


@contextlib.contextmanager
def _blamed_on(source: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RequestError(f"{source} cannot be read", found=error.strerror) from error


@contextlib.contextmanager
def _opened(source: Path) -> Iterator[tuple[tarfile.TarFile, int]]:
    """Yield a bundle and its size; what the tar reader makes of other files is our error."""
    with contextlib.ExitStack() as closing:
        with _blamed_on(str(source)):
            file = closing.enter_context(_Source(source))
        try:
            with tarfile.open(fileobj=file, mode="r|") as bundle:
                yield bundle, os.fstat(file.fileno()).st_size
        except (tarfile.TarError, EOFError) as error:
            raise RequestError(
                f"{source.name} is not a whole release bundle",
                expected="a file written by `provisioner image export`",
                found=str(error),
            ) from error


def _members(bundle: tarfile.TarFile) -> Iterator[tuple[str, IO[bytes], int]]:
    for member in bundle:
        content = bundle.extractfile(member) if member.isreg() else None
        if content is None:
            raise TrustError(f"the bundle holds {member.name!r}, which is no file")
        yield member.name, content, member.size


def _expect(members: Iterator[tuple[str, IO[bytes], int]], wanted: str, limit_bytes: int) -> bytes:
    name, content, size = next(members, ("nothing", io.BytesIO(), 0))
    if name != wanted:
        raise RequestError(
            "this is not a release bundle",
            expected=f"{wanted} first" if wanted == FIRST[0] else f"{wanted} second",
            found=name,
        )
    return _read(content, size, limit_bytes, name)


def _read(content: IO[bytes], size: int, limit_bytes: int, name: str) -> bytes:
    if size > limit_bytes:
        raise TrustError(f"{name} is too large", expected=f"at most {limit_bytes} bytes")
    data = content.read(size)
    if len(data) != size:
        raise tarfile.ReadError(f"{name} was cut")
    return data


def _add(bundle: tarfile.TarFile, name: str, data: bytes) -> None:
    # No time and no owner: the same release is the same file.
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    bundle.addfile(entry, io.BytesIO(data))
