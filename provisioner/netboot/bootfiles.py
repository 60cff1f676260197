"""Finds the boot loaders that Debian's `ipxe` package installs. Builds and changes none."""

from pathlib import Path
from typing import Final

from provisioner.errors import ConfigError
from provisioner.netboot.dhcp import BIOS_FILE, UEFI_FILE

IPXE_FOLDER: Final = Path("/usr/lib/ipxe")


def boot_files(folder: Path = IPXE_FOLDER) -> dict[str, Path]:
    """Return TFTP name to file for both firmwares.

    Raises ConfigError when one is missing. `snponly.efi` is there for firmwares whose own
    network driver works where iPXE's does not; a site's DHCP server may name it.
    """
    files = {name: folder / name for name in (BIOS_FILE, UEFI_FILE, "snponly.efi")}
    missing = [str(file) for file in files.values() if not file.is_file()]
    if missing:
        raise ConfigError("boot loaders are missing", found=missing, hint="apt-get install ipxe")
    return files
