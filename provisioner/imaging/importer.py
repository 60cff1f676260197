"""Bring in disk images that others built: raw, or qcow2 that is converted here.

The format is always named, never guessed. A qcow2 is judged by ourselves before a tool opens
it, and every tool that reads what strangers made runs in a sandbox. Never changes the
image's content.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from io import BufferedReader
from pathlib import Path
from typing import Any, Final

from provisioner.core.manifest import (
    SPDX,
    Partition,
    check_image_name,
    check_version,
    is_release_id,
)
from provisioner.errors import RequestError, Unavailable
from provisioner.imaging.archive import IMAGE_BYTES_MAX, ReleaseFacts
from provisioner.imaging.build import BuiltImage
from provisioner.imaging.foreign_packages import foreign_packages
from provisioner.imaging.foreign_root import last_written_at, read_text
from provisioner.imaging.foreign_spdx import foreign_spdx
from provisioner.imaging.gpt import (
    architectures_of,
    firmware_of,
    read_partitions,
    root_partition,
)
from provisioner.imaging.qcow2 import Qcow2, judge
from provisioner.imaging.rootfs import RELEASE_FILE
from provisioner.imaging.sandbox import SOURCE, TARGET, Limits, run_in_sandbox
from provisioner.imaging.scratch import clear_leftovers, scratch_folder, told_when_full
from provisioner.imaging.tools import ToolFailed
from provisioner.own_identity import own_version

FORMATS: Final = ("raw", "qcow2")
CONVERT_LIMIT: Final = timedelta(minutes=30)
# qemu-img decompresses in four threads. Only a backstop, for when nobody looks at the clock
# any more.
CONVERT_CPU_LIMIT: Final = 4 * CONVERT_LIMIT
# qemu-img 7.2 needed at most 384 MiB of address space (and 41 MiB of memory), with clusters
# from 512 bytes to 2 MiB, packed by zlib and zstd, up to a disk of 1 TiB.
CONVERT_MEMORY_BYTES: Final = 768 * 1024 * 1024
STATUS_BYTES_MAX: Final = 32 * 1024 * 1024
RELEASE_FILE_BYTES_MAX: Final = 64 * 1024
SPACE_RESERVE_BYTES: Final = 256 * 1024 * 1024
# Nobody made these from a recipe of ours.
NO_RECIPE: Final = "0" * 64
# The one that our ramdisks and boot files are for.
ARCHITECTURE: Final = "amd64"
# An image without a root that we can read says of no time when it was made.
_UNKNOWN: Final = datetime.fromtimestamp(0, UTC)
# What Debian has for firmware with Secure Boot on; its own kernels are signed, too.
SIGNED_BOOT_LOADERS: Final = frozenset({"shim-signed", "grub-efi-amd64-signed"})

# What a file begins with that is no raw disk: (place, bytes, what it is, what to do).
_UNPACK: Final = "decompress it first"
_QEMU_IMG: Final = "convert it where it was made: qemu-img convert -O qcow2, or -O raw"
_NOT_RAW: Final = (
    (0, b"QFI\xfb", "a qcow2 image", "name it: --format qcow2"),
    (0, b"KDMV", "a VMDK image", _QEMU_IMG),
    (0, b"COWD", "a VMDK image", _QEMU_IMG),
    (0, b"# Disk DescriptorFile", "a VMDK descriptor", _QEMU_IMG),
    (0, b"vhdxfile", "a VHDX image", _QEMU_IMG),
    (0, b"\x63onectix", "a VHD image", _QEMU_IMG),
    (64, b"\x7f\x10\xda\xbe", "a VDI image", _QEMU_IMG),
    (0, b"QED\0", "a QED image", _QEMU_IMG),
    (0, b"\x1f\x8b", "compressed by gzip", _UNPACK),
    (0, b"\xfd7zXZ\0", "compressed by xz", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "compressed by zstd", _UNPACK),
    (0, b"BZh", "compressed by bzip2", _UNPACK),
    (0, b"\x04\x22\x4d\x18", "compressed by lz4", _UNPACK),
    (0, b"PK\x03\x04", "a zip archive", _UNPACK),
    (257, b"ustar", "a tar archive, perhaps an OVA", "unpack it first"),
)


@dataclass(frozen=True)
class ImportRequest:
    """What the caller says of the file. release_id is needed only where it cannot be read.

    firmware is what the image boots on, as the caller knows it; when it is empty, that is
    read from partitions and packages.
    """

    file: Path
    format: str
    image: str
    version: str
    release_id: str | None = None
    firmware: tuple[str, ...] = ()


@contextlib.contextmanager
def imported_image(request: ImportRequest, *, work: Path, now: datetime) -> Iterator[BuiltImage]:
    """Yield the file as a raw image with what can be read of it; it is removed afterwards.

    work is a folder with space for the image. A raw file is used where it is, and
    stays. Raises RequestError for a format we refuse, an image without a GPT, or one
    that does not say which release it is; Unavailable when space is short; ToolFailed when
    the conversion fails or meets its limits; ConfigError where no sandbox can be made.
    """
    check_image_name(request.image)
    check_version(request.version)
    if request.format not in FORMATS:
        raise RequestError(
            f"{request.format} is not a format we import", expected=" or ".join(FORMATS)
        )
    if not request.file.is_file():
        raise RequestError(f"{request.file} is not a file")
    with _opened(request.file) as source, contextlib.ExitStack() as undo:
        if request.format == "raw":
            # It needs no folder of its own, whose making would do this.
            clear_leftovers(work)
            _refuse_other_formats(source)
            raw = request.file
        else:
            disk = judge(source, size_bytes_max=IMAGE_BYTES_MAX)
            # Nobody else may look in: as root, the file in it is not ours for a while.
            folder = undo.enter_context(scratch_folder(work, "import"))
            raw = folder / "disk.raw"
            with told_when_full(work):
                _convert(source, disk, raw)
        yield BuiltImage(raw, _facts(request, source, raw, now))


def _opened(file: Path) -> BufferedReader:
    try:
        return file.open("rb")
    except OSError as error:
        raise RequestError(f"cannot read {file}: {error.strerror}") from error


def _refuse_other_formats(source: BufferedReader) -> None:
    """Refuse what was called raw and is most likely something else, which no host could boot."""
    start = os.pread(source.fileno(), 512, 0)
    for place, magic, what, hint in _NOT_RAW:
        if start[place : place + len(magic)] == magic:
            raise RequestError(
                f"{Path(source.name).name} is not a raw disk image",
                expected="the bytes of a disk, as they are",
                found=what,
                hint=hint,
            )


def _convert(source: BufferedReader, disk: Qcow2, raw: Path) -> None:
    """Have qemu-img write the disk as a new sparse file, in a sandbox."""
    free = shutil.disk_usage(raw.parent).free
    if free < disk.data_bytes + SPACE_RESERVE_BYTES:
        raise Unavailable(
            f"not enough space in {raw.parent.parent} to convert {Path(source.name).name}",
            expected=f"{disk.data_bytes + SPACE_RESERVE_BYTES} bytes free",
            found=f"{free} bytes free",
        )
    # Named down to the last layer, with nothing behind it: there is nothing to be probed.
    image = {
        "driver": "qcow2",
        "backing": None,
        "read-only": True,
        "file": {"driver": "file", "filename": SOURCE},
    }
    command = ["qemu-img", "convert", "-n", "--target-is-zero", "-O", "raw"]
    with raw.open("xb") as target:
        os.fchmod(target.fileno(), 0o644)
        target.truncate(disk.size_bytes)
        run_in_sandbox(
            [*command, f"json:{json.dumps(image)}", TARGET],
            source=source,
            target=target,
            limits=Limits(
                time=CONVERT_LIMIT,
                cpu_time=CONVERT_CPU_LIMIT,
                memory_bytes=CONVERT_MEMORY_BYTES,
                written_bytes=disk.size_bytes,
                printed_bytes=0,
            ),
        )
        size_bytes = os.fstat(target.fileno()).st_size
    if size_bytes != disk.size_bytes:
        raise ToolFailed(
            "qemu-img made a disk of another size", expected=disk.size_bytes, found=size_bytes
        )


def _facts(
    request: ImportRequest, source: BufferedReader, raw: Path, now: datetime
) -> ReleaseFacts:
    partitions = read_partitions(raw)
    _check_architecture(request, architectures_of(partitions))
    firmware = request.firmware or firmware_of(partitions)
    if not firmware:
        raise RequestError(
            f"{request.file.name} can start by no firmware we know",
            expected="a BIOS boot partition, an EFI system partition, or both",
            found=", ".join(part.name for part in partitions) or "no partitions",
            hint="say what it boots on, if you know: --firmware",
        )
    root = root_partition(partitions)
    release_id = _release_id(request, raw, root)
    status = None
    if root:
        status = read_text(raw, root, "var/lib/dpkg/status", bytes_max=STATUS_BYTES_MAX)
    packages = foreign_packages(status or "")
    if not request.firmware and "uefi" in firmware and packages.keys() >= SIGNED_BOOT_LOADERS:
        firmware = (*firmware, "secure-boot")
    # The image's own date, and not today: to import the same file again gives the same release.
    made_at = last_written_at(raw, root) if root else _UNKNOWN
    attachments = {}
    if root and status:
        spdx = foreign_spdx(
            status,
            image=request.image,
            version=request.version,
            architecture=ARCHITECTURE,
            release_id=release_id,
            created_at=made_at,
        )
        attachments = {SPDX: spdx} if spdx else {}
    record = _record(request, source, now)
    return ReleaseFacts(
        image=request.image,
        version=request.version,
        architecture=ARCHITECTURE,
        firmware=firmware,
        release_id=release_id,
        packages=packages,
        recipe_digest=NO_RECIPE,
        # Without our version, which is in the record: a newer one imports the same release.
        builder=f"provisioner, imported from {request.format}",
        built_at=_written(made_at),
        root_partition=root.number if root else None,
        attachments=attachments,
        log=_log(request, raw, record) + ("" if attachments else "no list of packages in SPDX\n"),
        record=record,
    )


def _check_architecture(request: ImportRequest, found: tuple[str, ...]) -> None:
    """Refuse an image whose root says that it runs on something else than we can boot."""
    if found and ARCHITECTURE not in found:
        raise RequestError(
            f"{request.file.name} is for hosts of another architecture",
            expected=f"a root for {ARCHITECTURE}, the only one that can be netbooted",
            found=f"a root for {', '.join(found)}, by its partition type",
        )


def _record(request: ImportRequest, source: BufferedReader, now: datetime) -> dict[str, Any]:
    """Return what is known of the image's origin: which file it was."""
    source.seek(0)
    return {
        "imported_at": _written(now),
        "imported_by": f"provisioner {own_version()}",
        "imported_from": {
            "file": request.file.name,
            "format": request.format,
            "size_bytes": os.fstat(source.fileno()).st_size,
            "sha256": hashlib.file_digest(source, "sha256").hexdigest(),
        },
    }


def _log(request: ImportRequest, raw: Path, record: dict[str, Any]) -> str:
    origin = record["imported_from"]
    return (
        f"{record['imported_at']} imported {origin['file']}, named as {origin['format']}\n"
        f"{origin['size_bytes']} bytes, sha256 {origin['sha256']}\n"
        f"a disk of {raw.stat().st_size} bytes, as {request.image}@{request.version}\n"
    )


def _written(now: datetime) -> str:
    return now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _release_id(request: ImportRequest, raw: Path, root: Partition | None) -> str:
    """Return the id that the image carries; the caller's, where the image cannot be read.

    A deployed host proves with it what it runs, and says what stands in its own file.
    """
    given = request.release_id
    if given is not None and not is_release_id(given):
        raise RequestError("not a release id", expected="32 hex digits", found=given[:100])
    text = None
    if root:
        text = read_text(raw, root, RELEASE_FILE, bytes_max=RELEASE_FILE_BYTES_MAX)
    if text is None and given is not None:
        return given
    try:
        content = json.loads(text or "null")
    except (ValueError, RecursionError) as error:
        raise _no_release_id(request, "a file that is not JSON") from error
    if not isinstance(content, dict):
        raise _no_release_id(request, "no such file that can be read")
    wanted = {"image": request.image, "version": request.version}
    if {key: content.get(key) for key in wanted} != wanted:
        raise RequestError(
            f"{request.file.name} says that it is another release",
            expected=f"{request.image}@{request.version}",
            found=f"{content.get('image')}@{content.get('version')}"[:200],
        )
    release_id = content.get("release_id")
    if not is_release_id(release_id):
        raise _no_release_id(request, repr(release_id)[:100])
    if given not in (None, release_id):
        raise RequestError(
            f"{request.file.name} holds another release id than --release-id, "
            "so no host could prove that it runs it",
            expected=given,
            found=f"{release_id} in /{RELEASE_FILE}",
            hint="leave --release-id away: the id is read from the image",
        )
    return str(release_id)


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
