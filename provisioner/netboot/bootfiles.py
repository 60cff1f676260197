"""Gathers the boot loaders that TFTP serves: iPXE, and for UEFI one that starts the disk.

All come from Debian's packages; only the second is put together here, from GRUB's modules.
"""

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from provisioner.errors import ConfigError
from provisioner.netboot.dhcp import BIOS_FILE, UEFI_FILE

IPXE_FOLDER: Final = Path("/usr/lib/ipxe")
IPXE_FILES: Final = (BIOS_FILE, UEFI_FILE, "ipxe.efi")

# iPXE cannot start a disk on UEFI, as `sanboot` does on BIOS. This loader can.
DISK_FILE: Final = "disk.efi"
BUILD_LIMIT_S: Final = 60

# GRUB's smallest form, without variables, menu or network: one command after another, and
# one that fails is passed over. When no disk has the file that UEFI prescribes for starting
# one, it comes to `exit`, and the script goes on to the firmware's next entry.
_DISK_CONFIG: Final = """\
search --no-floppy --set=root --file /EFI/BOOT/BOOTX64.EFI
chainloader /EFI/BOOT/BOOTX64.EFI
boot
exit
"""
_DISK_MODULES: Final = (
    *("part_gpt", "part_msdos", "fat"),
    *("search", "search_fs_file", "chain", "boot", "minicmd"),
)


def boot_files(folder: Path = IPXE_FOLDER) -> dict[str, bytes | Path]:
    """Return TFTP name to content or file, for both firmwares.

    Raises ConfigError when a package is missing. `ipxe.efi` brings its own drivers, for a
    firmware whose network driver fails under `snponly.efi`; a site's DHCP may name it.
    """
    files: dict[str, bytes | Path] = {name: folder / name for name in IPXE_FILES}
    missing = [
        str(file) for file in files.values() if isinstance(file, Path) and not file.is_file()
    ]
    if missing:
        raise ConfigError("boot loaders are missing", found=missing, hint="apt-get install ipxe")
    return {**files, DISK_FILE: disk_loader()}


def disk_loader() -> bytes:
    """Build the UEFI program that starts the host's own disk. Takes about 0.1 s.

    Raises ConfigError when GRUB's tools are missing or fail.
    """
    if shutil.which("grub-mkimage") is None:
        raise ConfigError(
            "grub-mkimage is missing", hint="apt-get install grub-common grub-efi-amd64-bin"
        )
    # Files, because grub-mkimage can neither seek in nor sync a pipe.
    with tempfile.TemporaryDirectory() as folder:
        config, image = Path(folder, "grub.cfg"), Path(folder, DISK_FILE)
        config.write_text(_DISK_CONFIG)
        target = ["-O", "x86_64-efi", "-p", "/", "-c", str(config), "-o", str(image)]
        _run(["grub-mkimage", *target, *_DISK_MODULES])
        return image.read_bytes()


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, capture_output=True, check=True, timeout=BUILD_LIMIT_S)
    except subprocess.CalledProcessError as error:
        raise ConfigError(
            "the loader that starts a disk on UEFI cannot be built",
            found=error.stderr.decode(errors="replace")[-500:],
            hint="apt-get install grub-efi-amd64-bin",
        ) from error
