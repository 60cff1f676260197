"""Fetches a release's manifest and signatures, and has them proven. Writes nothing."""

import hashlib

import zstandard

from provisioner.agent.client import FileClient
from provisioner.agent.console import say
from provisioner.agent.http import lazy_buffer
from provisioner.agent.problems import FileMissing
from provisioner.agent.progress import Progress
from provisioner.agent.trust import Asked, trusted_manifest
from provisioner.core.batches import frame_bytes_max
from provisioner.core.manifest import MANIFEST_BYTES_MAX, Manifest
from provisioner.core.trust import POLICY_BYTES_MAX, SIGNATURES_BYTES_MAX, TrustPolicy


def fetch_manifest(
    files: FileClient, asked: Asked, trust_file: str, progress: Progress
) -> Manifest:
    """Fetch the manifest of the release asked for, and prove it.

    Raises what `trusted_manifest` raises, and ChunkUnavailable.
    """
    with open(trust_file, "rb") as file:
        policy = TrustPolicy.parse(file.read(POLICY_BYTES_MAX + 1))
    folder = f"/releases/{asked.release}"
    signatures = _fetch(files, f"{folder}/manifest.sig", SIGNATURES_BYTES_MAX, progress)
    data = _fetch_packed(files, folder, asked.release, progress)
    if data is None:
        data = _fetch(files, f"{folder}/manifest.json", MANIFEST_BYTES_MAX, progress)
    return trusted_manifest(data, signatures, asked, policy)


def _fetch_packed(files: FileClient, folder: str, release: str, progress: Progress) -> bytes | None:
    """Return the manifest from its compressed form, or None when that is missing or damaged."""
    path = f"{folder}/manifest.json.zst"
    try:
        packed = _fetch(files, path, frame_bytes_max(MANIFEST_BYTES_MAX), progress)
    except FileMissing:
        return None
    data = unpack_manifest(packed)
    if data is None or hashlib.sha256(data).hexdigest() != release:
        say(f"{path} is damaged; fetching the manifest itself")
        return None
    return data


def unpack_manifest(packed: bytes) -> bytes | None:
    """Return what is in a zstd frame that says its size, or None when it is not a sound one.

    A frame that claims more than MANIFEST_BYTES_MAX is not unpacked.
    """
    try:
        if zstandard.get_frame_parameters(packed).content_size > MANIFEST_BYTES_MAX:
            return None
        return zstandard.ZstdDecompressor().decompress(packed)
    except zstandard.ZstdError:
        return None


def _fetch(files: FileClient, path: str, limit_bytes: int, progress: Progress) -> bytes:
    into = lazy_buffer(limit_bytes)
    length = files.fetch(path, into)
    progress.add(fetched=length)
    return into[:length]
