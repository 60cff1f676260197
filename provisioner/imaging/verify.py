"""Compare every byte of a release in the archive with what was signed. Repairs nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from provisioner.core.manifest import MANIFEST_BYTES_MAX, Manifest
from provisioner.errors import NotFound, TrustError
from provisioner.imaging.archive import MANIFEST, Archive, Progress, folder_of, silent
from provisioner.imaging.blobs import Unreadable
from provisioner.imaging.chunks import read_chunk

PROBLEMS_MAX: Final = 100


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where, and what was found."""

    release: str
    what: str
    found: str


def verify_release(archive: Archive, digest: str, progress: Progress = silent) -> list[Problem]:
    """Return what is wrong with a release, at most PROBLEMS_MAX things; [] when nothing is.

    Reads its manifest, all signatures by trusted keys, attachments and chunks.
    """
    try:
        manifest = archive.load(digest)
    except (TrustError, NotFound, Unreadable) as error:
        return [Problem(digest, "manifest", _why(error))]
    found = [*_beside(archive, manifest)]
    done_bytes = 0
    seen: set[str] = set()
    for index, chunk in manifest.stored_chunks():
        done_bytes += manifest.chunk_length(index)
        progress("verifying", done_bytes, manifest.used_bytes)
        if chunk in seen:
            continue
        seen.add(chunk)
        try:
            read_chunk(archive.blobs, chunk, manifest.chunk_length(index))
        except (TrustError, NotFound, Unreadable) as error:
            found.append(Problem(manifest.name, f"chunk {index}", _why(error)))
            if len(found) >= PROBLEMS_MAX:
                break
    return found


def _beside(archive: Archive, manifest: Manifest) -> list[Problem]:
    problems = []
    for name in sorted(manifest.attachments):
        try:
            archive.attachment(manifest, name)
        except (TrustError, NotFound, Unreadable) as error:
            problems.append(Problem(manifest.name, name, _why(error)))
    # Hosts fetch this form; a damaged one costs them a second request.
    name = f"{MANIFEST}.zst"
    try:
        packed = archive.unpacked(f"{folder_of(manifest.digest)}/{name}", MANIFEST_BYTES_MAX)
        if packed != manifest.to_bytes():
            problems.append(Problem(manifest.name, name, "other bytes than manifest.json"))
    except (TrustError, NotFound, Unreadable) as error:
        problems.append(Problem(manifest.name, name, _why(error)))
    return problems


def _why(error: TrustError | NotFound | Unreadable) -> str:
    if isinstance(error, Unreadable):
        return f"cannot be read: {error.found}"
    return f"{error.message}: {error.found}" if error.found else error.message
