"""Hand a whole release from one archive to another on this machine, without unpacking it."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from provisioner.core.trust import signatures_to_bytes
from provisioner.imaging import signing
from provisioner.imaging.archive import ATTACHMENT_BYTES_MAX, Archive, folder_of
from provisioner.imaging.blobs import Blobs, FileBlobs
from provisioner.imaging.chunks import chunk_name

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from provisioner.core.manifest import Manifest

Place = Callable[[Path, Path], object]
_SIGNATURES: Final = "manifest.sig"


def linked(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where that is on another file system.

    For those who only read: what is written in place changes both.
    """
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def lend(
    source: Archive,
    manifest: Manifest,
    target: Archive,
    *,
    place: Place = linked,
    signers: Sequence[Ed25519PrivateKey] = (),
) -> int:
    """Put a release of one archive into another; return the bytes that its chunks take.

    It keeps its signatures, or gets those of the signers instead. Chunks are not read: whoever
    writes them to a disk checks them.
    """
    folder, stored_bytes = folder_of(manifest.digest), 0
    for digest in manifest.distinct_chunks:
        name = chunk_name(digest)
        _hand_over(source.blobs, target.blobs, name, place)
        stored_bytes += target.blobs.size(name) or 0
    files = {
        name.rpartition("/")[2]: source.blobs.read(name, ATTACHMENT_BYTES_MAX)
        for name, _ in list(source.blobs.sizes(f"{folder}/"))
    }
    if signers:
        signatures = signing.sign(manifest.to_bytes(), signers)
        files[_SIGNATURES] = signatures_to_bytes(signatures)
    with target.locked(), contextlib.ExitStack() as undo:
        target.place(manifest, files, undo)
        undo.pop_all()
    return stored_bytes


def _hand_over(source: Blobs, target: Blobs, name: str, place: Place) -> None:
    if target.size(name) is not None:
        return
    if isinstance(source, FileBlobs) and isinstance(target, FileBlobs):
        target.path(name).parent.mkdir(parents=True, exist_ok=True)
        place(source.path(name), target.path(name))
    else:
        target.write(name, source.read(name, ATTACHMENT_BYTES_MAX))
