"""Make a raw disk image boot: GRUB for BIOS, shim and GRUB for UEFI. Installs no packages."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Final

from provisioner.core.manifest import Partition
from provisioner.errors import RequestError
from provisioner.imaging.gpt import SECTOR_BYTES
from provisioner.imaging.sparse import copy_into
from provisioner.imaging.tools import run

# Built into the BIOS core image, so that it needs no module files on the root partition.
BIOS_MODULES: Final = ("biosdisk", "part_gpt", "ext2", "normal", "configfile", "linux", "echo")

# GRUB's boot.img, source grub-core/boot/i386/pc/boot.S and include/grub/i386/pc/boot.h.
BOOT_CODE_BYTES: Final = 440
"""The boot sector's code ends here; behind it stand the disk signature and the table."""
_KERNEL_SECTOR: Final = 0x5C
"""Eight bytes: the sector of the core image's first sector (GRUB_BOOT_MACHINE_KERNEL_SECTOR)."""
_DRIVE_CHECK: Final = 0x66
"""Two bytes: a jump over the use of drive 0x80 (GRUB_BOOT_MACHINE_DRIVE_CHECK)."""
_NO_OPERATION: Final = b"\x90\x90"

# The first sector of core.img is diskboot.img (grub-core/boot/i386/pc/diskboot.S): its last
# twelve bytes tell where the rest is: first sector (8), count (2), segment to load it to (2).
_BLOCK_LIST: Final = struct.Struct("<QHH")
_BLOCK_LIST_PLACE: Final = SECTOR_BYTES - _BLOCK_LIST.size
_LOAD_SEGMENT: Final = 0x820

# What the EFI system partition's files are dated by: 1980-01-01, where FAT's calendar starts.
# The partition then only changes when what is in it does.
FAT_EPOCH_S: Final = 315532800

GRUB_CFG: Final = """# Written by the image's builder.
set default=0
set timeout=0
menuentry "{title}" {{
    linux /vmlinuz root=PARTUUID={partuuid} rw {arguments}
    initrd /initrd.img
}}
"""

# $cmdpath is the folder GRUB was started from, such as (hd0,gpt2)/EFI/BOOT. Taking the disk
# from it, and not searching for a label, cannot end up on another disk with an older system.
UEFI_CFG: Final = """# Written by the image's builder.
regexp --set=1:disk '^\\(([^,)]+),' "$cmdpath"
set root=($disk,gpt{root_number})
set prefix=($root)/boot/grub
configfile ($root)/boot/grub/grub.cfg
"""


def grub_cfg(title: str, partuuid: str, arguments: tuple[str, ...]) -> str:
    """Return the boot loader's script for both firmwares, /boot/grub/grub.cfg in the root.

    The root is named by PARTUUID, which no other release shares: a disk with an
    older system is never taken for it.
    """
    return GRUB_CFG.format(title=title, partuuid=partuuid, arguments=" ".join(arguments))


def install_bios(raw: Path, boot: Path, bios: Partition, root: Partition, work: Path) -> None:
    """Write GRUB's boot sector, and its core image into the BIOS boot partition.

    boot holds the unpacked grub-pc-bin. This is what grub-install does, without
    its need for a block device: the two places where one stage holds the sector
    number of the next are filled in (GRUB's util/setup.c does the same).
    """
    modules = boot / "usr/lib/grub/i386-pc"
    core_path = work / "core.img"
    run(
        [
            "grub-mkimage",
            "--format=i386-pc",
            f"--directory={modules}",
            f"--output={core_path}",
            # No disk before the comma: the disk the firmware started.
            f"--prefix=(,gpt{root.number})/boot/grub",
            *BIOS_MODULES,
        ]
    )
    core = patched_core(core_path.read_bytes(), bios.start_bytes // SECTOR_BYTES)
    if len(core) > bios.size_bytes:
        raise RequestError(
            "GRUB does not fit into the BIOS boot partition",
            expected=f"at most {bios.size_bytes} bytes",
            found=f"{len(core)} bytes",
        )
    code = patched_boot_code((modules / "boot.img").read_bytes(), bios.start_bytes // SECTOR_BYTES)
    with raw.open("r+b") as disk:
        disk.write(code)
        disk.seek(bios.start_bytes)
        disk.write(core)


def patched_boot_code(boot: bytes, core_sector: int) -> bytes:
    """Return boot.img's code with the sector where the core image starts."""
    code = bytearray(boot[:BOOT_CODE_BYTES])
    struct.pack_into("<Q", code, _KERNEL_SECTOR, core_sector)
    # As grub-install does for every hard disk: some BIOSes hand over a wrong drive number.
    code[_DRIVE_CHECK : _DRIVE_CHECK + 2] = _NO_OPERATION
    return bytes(code)


def patched_core(core: bytes, core_sector: int) -> bytes:
    """Return core.img, whole sectors, with the place of its second part filled in."""
    sectors = -(-len(core) // SECTOR_BYTES)
    patched = bytearray(core.ljust(sectors * SECTOR_BYTES, b"\0"))
    _BLOCK_LIST.pack_into(patched, _BLOCK_LIST_PLACE, core_sector + 1, sectors - 1, _LOAD_SEGMENT)
    return bytes(patched)


def install_uefi(
    raw: Path, boot: Path, esp: Partition, root: Partition, work: Path, *, volume: int
) -> None:
    """Make the EFI system partition, with shim where firmware looks without being told.

    boot holds the unpacked shim-signed and grub-efi-amd64-signed; volume is the
    file system's 32-bit serial number. shim starts the grubx64.efi beside it, and
    Debian's signed GRUB reads /EFI/debian/grub.cfg.

    Source: UEFI Specification 2.10 §3.5.1.1 (\\EFI\\BOOT\\BOOTX64.EFI).
    """
    config = work / "grub.cfg"
    config.write_text(UEFI_CFG.format(root_number=root.number))
    files = {
        "EFI/BOOT/BOOTX64.EFI": boot / "usr/lib/shim/shimx64.efi.signed",
        "EFI/BOOT/grubx64.efi": boot / "usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed",
        "EFI/debian/grub.cfg": config,
    }
    environment = {"SOURCE_DATE_EPOCH": str(FAT_EPOCH_S)}
    image = work / "esp.img"
    with image.open("xb") as file:
        file.truncate(esp.size_bytes)
    run(
        [
            "mkfs.fat",
            "-F",
            "32",
            "-n",
            "ESP",
            "-i",
            f"{volume:08x}",
            "--invariant",
            str(image),
        ],
        environment=environment,
    )
    run(["mmd", "-i", str(image), "::EFI", "::EFI/BOOT", "::EFI/debian"], environment=environment)
    for name, source in files.items():
        run(["mcopy", "-i", str(image), str(source), f"::{name}"], environment=environment)
    copy_into(image, raw, esp.start_bytes)
