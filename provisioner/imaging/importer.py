"""Bring in disk images that others built: raw, or qcow2 that is converted here.

The format is always named, never guessed, and a qcow2 that refers to any other file is
refused before a tool reads it. Never changes the image's content.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from provisioner.core.manifest import (
    Partition,
    check_image_name,
    check_version,
    is_release_id,
)
from provisioner.errors import RequestError, Unavailable
from provisioner.imaging.archive import IMAGE_BYTES_MAX, ReleaseFacts
from provisioner.imaging.build import BuiltImage, own_version
from provisioner.imaging.gpt import firmware_of, read_partitions, root_partition
from provisioner.imaging.rootfs import RELEASE_FILE, installed_packages
from provisioner.imaging.tools import ToolFailed, output_of, run

FORMATS: Final = ("raw", "qcow2")
CONVERT_LIMIT: Final = timedelta(minutes=30)
INSPECT_LIMIT: Final = timedelta(minutes=1)
SPACE_RESERVE_BYTES: Final = 256 * 1024 * 1024
INSPECTED_BYTES_MAX: Final = 32 * 1024 * 1024
# Nobody made these from a recipe of ours.
NO_RECIPE: Final = "0" * 64

# The qcow2 header: magic, version, backing file's offset and length, cluster bits, virtual
# size, encryption, L1 size; then for version 3, after 64 further bytes up to 72, the
# features one must understand. Source: QEMU's docs/interop/qcow2.txt.
_QCOW2: Final = struct.Struct(">4sIQIIQII")
_QCOW2_INCOMPATIBLE_PLACE: Final = 72
_QCOW2_MAGIC: Final = b"QFI\xfb"
_DATA_FILE: Final = 4
_COMPRESSION: Final = 8
_CLUSTER_BITS: Final = range(9, 22)


@dataclass(frozen=True)
class ImportRequest:
    """What the caller says of the file. release_id is needed only where it cannot be read."""

    file: Path
    format: str
    image: str
    version: str
    architecture: str = "amd64"
    release_id: str | None = None


@contextlib.contextmanager
def imported_image(request: ImportRequest, *, work: Path, now: datetime) -> Iterator[BuiltImage]:
    """Yield the file as a raw image with what can be read of it; it is removed afterwards.

    work is a folder with space for the image. A raw file is used where it is, and
    stays. Raises RequestError for a format we refuse, an image without a GPT, or one
    that does not say which release it is; ToolFailed when the conversion fails.
    """
    check_image_name(request.image)
    check_version(request.version)
    if not request.file.is_file():
        raise RequestError(f"{request.file} is not a file")
    if request.format == "raw":
        yield BuiltImage(request.file, _facts(request, request.file, now))
        return
    if request.format != "qcow2":
        raise RequestError(
            f"{request.format} is not a format we import", expected=" or ".join(FORMATS)
        )
    folder = work / f"import-{secrets.token_hex(8)}"
    folder.mkdir(parents=True)
    try:
        raw = folder / "disk.raw"
        _convert(request.file, raw)
        yield BuiltImage(raw, _facts(request, raw, now))
    finally:
        shutil.rmtree(folder)


def check_qcow2(file: Path) -> int:
    """Return the virtual size in bytes of a qcow2 that stands alone.

    Read from the header by ourselves, since a hostile image could make a tool open
    any file of this machine: as backing file or as external data file. Raises
    RequestError for those, encryption, damage, and sizes beyond the limit.
    """
    with file.open("rb") as image:
        header = image.read(512)
    if len(header) < _QCOW2.size or header[:4] != _QCOW2_MAGIC:
        raise _refused(file, "a qcow2 header", "none")
    fields = _QCOW2.unpack_from(header)
    _, version, backing_offset, backing_length, cluster_bits, size_bytes, encryption, _ = fields
    if version not in (2, 3):
        raise _refused(file, "qcow2 version 2 or 3", version)
    if backing_offset or backing_length:
        raise _refused(file, "no backing file", "one")
    if encryption:
        raise _refused(file, "no encryption", "some")
    if cluster_bits not in _CLUSTER_BITS:
        raise _refused(file, "clusters of 512 bytes to 2 MiB", f"2^{cluster_bits} bytes")
    if not 0 < size_bytes <= IMAGE_BYTES_MAX:
        raise _refused(file, f"a virtual size up to {IMAGE_BYTES_MAX} bytes", size_bytes)
    if version == 3:
        (incompatible,) = struct.unpack_from(">Q", header, _QCOW2_INCOMPATIBLE_PLACE)
        if incompatible & _DATA_FILE:
            raise _refused(file, "no external data file", "one")
        if incompatible & ~_COMPRESSION:
            raise _refused(file, "a clean image without unknown features", f"{incompatible:#x}")
    return int(size_bytes)


def _convert(file: Path, raw: Path) -> None:
    size_bytes = check_qcow2(file)
    free = shutil.disk_usage(raw.parent).free
    # The raw file is sparse, but a compressed image may be full of data.
    if free < size_bytes + SPACE_RESERVE_BYTES:
        raise Unavailable(
            f"not enough space in {raw.parent.parent} to convert {file.name}",
            expected=f"{size_bytes + SPACE_RESERVE_BYTES} bytes free",
            found=f"{free} bytes free",
        )
    run(
        ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(file.absolute()), str(raw)],
        limit=CONVERT_LIMIT,
    )


def _facts(request: ImportRequest, raw: Path, now: datetime) -> ReleaseFacts:
    partitions = read_partitions(raw)
    firmware = firmware_of(partitions)
    if not firmware:
        raise RequestError(
            f"{request.file.name} can start by no firmware we know",
            expected="a BIOS boot partition, an EFI system partition, or both",
            found=", ".join(part.name for part in partitions) or "no partitions",
        )
    root = root_partition(partitions)
    status = _read_from_root(raw, root, "var/lib/dpkg/status") if root else None
    return ReleaseFacts(
        image=request.image,
        version=request.version,
        architecture=request.architecture,
        firmware=firmware,
        release_id=request.release_id or _release_id(request, raw, root),
        packages=installed_packages(status) if status else {},
        recipe_digest=NO_RECIPE,
        builder=f"provisioner {own_version()}, imported from {request.format}",
        built_at=now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        root_partition=root.number if root else None,
    )


def _release_id(request: ImportRequest, raw: Path, root: Partition | None) -> str:
    """Return the id the image carries; a deployed host proves with it what it runs."""
    text = _read_from_root(raw, root, RELEASE_FILE) if root else None
    try:
        content = json.loads(text or "null")
    except ValueError as error:
        raise _no_release_id(request, "a file that is not JSON") from error
    if not isinstance(content, dict):
        raise _no_release_id(request, "no such file that can be read")
    wanted = {"image": request.image, "version": request.version}
    if {key: content.get(key) for key in wanted} != wanted:
        raise RequestError(
            f"{request.file.name} says that it is another release",
            expected=f"{request.image}@{request.version}",
            found=f"{content.get('image')}@{content.get('version')}",
        )
    release_id = content.get("release_id")
    if not is_release_id(release_id):
        raise _no_release_id(request, repr(release_id)[:100])
    return str(release_id)


def _read_from_root(raw: Path, root: Partition, path: str) -> str | None:
    """Return a text file of an ext2/3/4 root, read without mounting it; None if there is none."""
    place = f"{raw.absolute()}?offset={root.start_bytes}"
    command = ["debugfs", "-R", f"cat /{path}", place]
    with contextlib.suppress(ToolFailed, UnicodeDecodeError):
        data = output_of(command, bytes_max=INSPECTED_BYTES_MAX, limit=INSPECT_LIMIT)
        return data.decode("utf-8") or None
    return None


def _no_release_id(request: ImportRequest, found: str) -> RequestError:
    example = {"image": request.image, "version": request.version}
    example["release_id"] = secrets.token_hex(16)
    return RequestError(
        f"{request.file.name} does not say which release it is, so no host could prove it runs it",
        expected=f"a file /{RELEASE_FILE} in an ext4 root",
        found=found,
        hint=f"put this into it when the image is made: {json.dumps(example)}; "
        "or name the id that stands there with --release-id",
    )


def _refused(file: Path, expected: str, found: object) -> RequestError:
    return RequestError(f"{file.name} is refused", expected=expected, found=str(found))
