"""The base tree of an image: a Debian root made by mmdebstrap, kept as an archive file.

Holds nothing that belongs to one version, so that all versions of a recipe share it as
long as the package mirrors serve the same.
"""

from __future__ import annotations

import hashlib
import io
import os
import secrets
import shlex
import shutil
import tarfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import Final

from provisioner.imaging.mirrors import MirrorState
from provisioner.imaging.recipe import Recipe
from provisioner.imaging.tools import run

MMDEBSTRAP_LIMIT: Final = timedelta(minutes=40)
BASES_KEPT_MAX: Final = 4
# Bump it when this module makes another tree from the same recipe.
LAYOUT: Final = 1

# In the tree, for the build only; taken out before the file system is made.
BUILD_FOLDER: Final = "provisioner-build"
# The boot loaders come from the same mirror and on the same day as all the rest. shim and
# GRUB are signed by Microsoft's and Debian's keys, as Secure Boot needs them.
BOOT_PACKAGES: Final = {
    "uefi": ("shim-signed", "grub-efi-amd64-signed"),
    "bios": ("grub-pc-bin",),
}

CUSTOMISE: Final = """#!/bin/sh
# Runs in the new root once all packages are configured.
set -eu
export LC_ALL=C.UTF-8
passwd --quiet --lock root
{services}
rm -f /vmlinuz.old /initrd.img.old
cd /var/cache/apt/archives
mkdir -p /{folder}/boot
for package in {packages}; do
    dpkg-deb --extract "$package"_*.deb /{folder}/boot
done
rm /{folder}/customise
"""


def base_tree(
    recipe: Recipe, mirrors: MirrorState, cache: Path, say: Callable[[str], None]
) -> Path:
    """Return the archive of the base tree (.tar.zst), building it unless it is in the cache.

    The key holds the recipe, what the mirrors serve, and this module's layout: a
    package update makes a new tree, and nothing else does. Raises ToolFailed with
    mmdebstrap's last lines; the cache is then as before.
    """
    key = hashlib.sha256(f"{LAYOUT} {recipe.tree_digest} {mirrors.digest}".encode()).hexdigest()
    bases = cache / "bases"
    bases.mkdir(parents=True, exist_ok=True)
    target = bases / f"{recipe.image}-{key[:32]}.tar.zst"
    if target.is_file():
        os.utime(target)
        say("using the base tree from the cache")
        return target
    say("installing packages into a new base tree")
    work = bases / f"incoming-{secrets.token_hex(8)}"
    work.mkdir()
    try:
        _bootstrap(recipe, mirrors, work, cache / "packages")
        (work / "base.tar.zst").rename(target)
    finally:
        shutil.rmtree(work)
    _forget_oldest(bases)
    return target


def _bootstrap(recipe: Recipe, mirrors: MirrorState, work: Path, packages: Path) -> None:
    """Run mmdebstrap, leaving base.tar.zst in work and the fetched packages in packages."""
    with tarfile.open(work / "files.tar", "w") as archive:
        _write_files(archive, recipe, int(mirrors.newest_at.timestamp()))
    fetched = work / "packages"
    fetched.mkdir()
    packages.mkdir(exist_ok=True)
    run(
        [
            "mmdebstrap",
            f"--mode={'root' if os.geteuid() == 0 else 'unshare'}",
            "--variant=minbase",
            "--format=tar",
            f"--architectures={recipe.architecture}",
            f"--include={','.join((*recipe.packages, recipe.kernel))}",
            '--aptopt=APT::Install-Recommends "false"',
            '--aptopt=Acquire::Languages "none"',
            "--dpkgopt=force-confold",
            "--dpkgopt=force-unsafe-io",
            *(f"--dpkgopt=path-exclude={pattern}" for pattern in recipe.exclude),
            # The kernel fills /dev at boot; an unprivileged build could not make devices.
            "--skip=output/dev",
            # Packages stay outside between builds, as mmdebstrap's manual page shows.
            "--skip=download/empty",
            "--skip=essential/unlink",
            '--setup-hook=mkdir -p "$1"/var/cache/apt/archives',
            f"--setup-hook=sync-in {shlex.quote(str(packages))} /var/cache/apt/archives",
            # Before most packages: the kernel's initrd is made by their settings.
            f"--essential-hook=tar-in {shlex.quote(str(work / 'files.tar'))} /",
            f"--customize-hook={_fetch_boot_packages(recipe)}",
            f'--customize-hook=chroot "$1" sh /{BUILD_FOLDER}/customise',
            f"--customize-hook=sync-out /var/cache/apt/archives {shlex.quote(str(fetched))}",
            recipe.mirrors[0].suite,
            str(work / "base.tar.zst"),
            *mirrors.sources,
        ],
        limit=MMDEBSTRAP_LIMIT,
        environment={"SOURCE_DATE_EPOCH": str(int(mirrors.newest_at.timestamp()))},
    )
    # A fresh folder each time, so that outdated packages do not pile up.
    shutil.rmtree(packages)
    for left in ("lock", "partial"):
        path = fetched / left
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    fetched.rename(packages)


def _write_files(archive: tarfile.TarFile, recipe: Recipe, epoch_s: int) -> None:
    """Add the recipe's files and our script, owned by root, folders before what is in them."""
    files = {PurePosixPath(file.path): (file.content, int(file.mode, 8)) for file in recipe.files}
    files[PurePosixPath(f"/{BUILD_FOLDER}/customise")] = (_customise(recipe), 0o755)
    folders = {parent for path in files for parent in path.parents} - {PurePosixPath("/")}
    for folder in sorted(folders):
        entry = _entry(folder, 0o755, epoch_s)
        entry.type = tarfile.DIRTYPE
        archive.addfile(entry)
    for path, (content, mode) in sorted(files.items()):
        data = content.encode()
        entry = _entry(path, mode, epoch_s)
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))


def _entry(path: PurePosixPath, mode: int, epoch_s: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(str(path).lstrip("/"))
    entry.mode = mode
    entry.mtime = epoch_s
    return entry


def _customise(recipe: Recipe) -> str:
    """Return the shell script that finishes the tree from within.

    Every word in it passed the recipe's patterns, which let nothing through that
    a shell would read as more than a word.
    """
    lists = (
        ("enable", recipe.services.enable),
        ("disable", recipe.services.disable),
        ("mask", recipe.services.mask),
    )
    services = "\n".join(
        f"systemctl --quiet {verb} {' '.join(units)}" for verb, units in lists if units
    )
    return CUSTOMISE.format(
        services=services, packages=" ".join(_boot_packages(recipe)), folder=BUILD_FOLDER
    )


def _boot_packages(recipe: Recipe) -> list[str]:
    return [name for kind in recipe.firmware for name in BOOT_PACKAGES[kind]]


def _fetch_boot_packages(recipe: Recipe) -> str:
    """Return the hook that fetches them, and then drops what is outdated from the cache.

    apt runs outside of the new root, as mmdebstrap itself does: in there, no name
    server is configured.
    """
    apt = 'APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" apt-get -qq -o APT::Sandbox::User=root'
    fetch = f"{apt} download {' '.join(_boot_packages(recipe))}"
    return f'cd "$1"/var/cache/apt/archives && {fetch} && {apt} autoclean'


def _forget_oldest(bases: Path) -> None:
    """Keep the most recently used base trees only."""
    kept = sorted(bases.glob("*.tar.zst"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in kept[BASES_KEPT_MAX:]:
        path.unlink()
