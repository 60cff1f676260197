"""Gathers the boot loaders that TFTP serves: iPXE, for UEFI one that starts the disk, and
what is signed for Secure Boot.

All come from Debian's packages; only the second is put together here, from GRUB's modules.
"""

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from provisioner.errors import ConfigError
from provisioner.netboot.dhcp import BIOS_FILE, SHIM_FILE, UEFI_FILE
from provisioner.netboot.grub import FIRST_CONFIG, first_config

IPXE_FOLDER: Final = Path("/usr/lib/ipxe")
IPXE_FILES: Final = (BIOS_FILE, UEFI_FILE, "ipxe.efi")

# iPXE cannot start a disk on UEFI, as `sanboot` does on BIOS. This loader can.
DISK_FILE: Final = "disk.efi"
BUILD_LIMIT_S: Final = 60

# Signed by Microsoft, and by Debian, whose key is in shim. shim asks for a grubx64.efi
# beside itself; of Debian's GRUBs we need the one that looks for its configuration by TFTP.
SIGNED_FILES: Final = {
    SHIM_FILE: Path("/usr/lib/shim/shimx64.efi.signed"),
    "grubx64.efi": Path("/usr/lib/grub/x86_64-efi-signed/grubnetx64.efi.signed"),
}
SIGNED_HINT: Final = "apt-get install --no-install-recommends shim-signed grub-efi-amd64-signed"

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
    """Return TFTP name to content or file, for every firmware.

    Raises ConfigError when iPXE or GRUB's tools are missing. Without the signed files
    (`missing_signed_files`) all but hosts with Secure Boot on are served. `ipxe.efi` brings
    its own drivers, for a firmware whose network driver fails under `snponly.efi`; a site's
    DHCP may name it.
    """
    files: dict[str, bytes | Path] = {name: folder / name for name in IPXE_FILES}
    missing = [
        str(file) for file in files.values() if isinstance(file, Path) and not file.is_file()
    ]
    if missing:
        raise ConfigError("boot loaders are missing", found=missing, hint="apt-get install ipxe")
    signed = {} if missing_signed_files() else SIGNED_FILES
    return {**files, **signed, FIRST_CONFIG: first_config().encode(), DISK_FILE: disk_loader()}


def missing_signed_files() -> list[Path]:
    """Return what hosts with Secure Boot on need for netboot and this machine lacks."""
    return [file for file in SIGNED_FILES.values() if not file.is_file()]


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
