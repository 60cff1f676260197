"""What finishes a new tree: the recipe's files and scripts, and the hooks that run in it.

Makes the archive that mmdebstrap unpacks into the tree, and the commands it runs there.
"""

from __future__ import annotations

import io
import shlex
import tarfile
from pathlib import PurePosixPath
from typing import Final

from provisioner.imaging.recipe import Recipe

# In the tree, for the build only; taken out before the file system is made.
BUILD_FOLDER: Final = "provisioner-build"
# The boot loaders come from the same mirror and on the same day as all the rest. shim and
# GRUB are signed by Microsoft's and Debian's keys, as Secure Boot needs them.
_UEFI: Final = ("shim-signed", "grub-efi-amd64-signed")
BOOT_PACKAGES: Final = {"uefi": _UEFI, "secure-boot": _UEFI, "bios": ("grub-pc-bin",)}

_CUSTOMISE: Final = """#!/bin/sh
# Runs in the new root once all packages are configured.
set -eu
export LC_ALL=C.UTF-8
passwd --quiet --lock root
{services}
rm -f /vmlinuz.old /initrd.img.old
# Keys of no host: made when the package was set up, and other ones in each build.
rm -f /etc/ssh/ssh_host_*
# Copies of what was there before the last package, and of what our files stand in for.
rm -f /var/lib/dpkg/*-old /var/cache/debconf/*-old
find /etc -name '*.dpkg-dist' -type f -delete
# It came with the builder's packages, and as the folder they lie in between builds.
chown 0:0 /var/cache/apt/archives
chmod 0755 /var/cache/apt/archives
mkdir -p /{folder}/boot
for archive in /{folder}/boot-packages/*.deb; do
    dpkg-deb --extract "$archive" /{folder}/boot
done
rm -r /{folder}/boot-packages
"""


def write_files(archive: tarfile.TarFile, recipe: Recipe, epoch_s: int) -> None:
    """Add the recipe's files, its scripts and ours, owned by root, folders before their content.

    All times are epoch_s, in seconds since 1970.
    """
    files = {PurePosixPath(file.path): (file.content, int(file.mode, 8)) for file in recipe.files}
    build = PurePosixPath("/", BUILD_FOLDER)
    files[build / "customise"] = (_customise(recipe), 0o755)
    for number, script in enumerate(recipe.scripts):
        files[build / _place(number)] = (script.content, 0o755)
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


def hooks(recipe: Recipe, epoch_s: int) -> list[str]:
    """Return the shell commands that finish the tree, whose path they get as $1, in order."""
    commands = [
        _fetch_boot_packages(recipe),
        f'chroot "$1" sh /{BUILD_FOLDER}/customise',
    ]
    for number, script in enumerate(recipe.scripts):
        commands.append(_script_hook(number, script.name, epoch_s))
    commands.append(f'rm -rf "$1"/{BUILD_FOLDER}/customise "$1"/{BUILD_FOLDER}/script-*')
    return commands


def _place(number: int) -> str:
    return f"script-{number}"


def _script_hook(number: int, name: str, epoch_s: int) -> str:
    """Return the command that runs a script in the tree, without a network.

    What a script fetches would be in no digest, and could differ from build to build.
    """
    variables = {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
        "DEBIAN_FRONTEND": "noninteractive",
        "SOURCE_DATE_EPOCH": str(epoch_s),
    }
    environment = " ".join(f"{key}={shlex.quote(value)}" for key, value in variables.items())
    run = f'unshare --net chroot "$1" env -i {environment} /{BUILD_FOLDER}/{_place(number)}'
    failed = f'{{ echo "the script {name} ended with code $?"; exit 1; }}'
    return f'echo "running the script {name}"; {run} </dev/null || {failed}'


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
    return _CUSTOMISE.format(services=services, folder=BUILD_FOLDER)


def _boot_packages(recipe: Recipe) -> list[str]:
    """Return the packages of boot loaders, each once, whatever firmware shares them."""
    return list(dict.fromkeys(name for kind in recipe.firmware for name in BOOT_PACKAGES[kind]))


def _fetch_boot_packages(recipe: Recipe) -> str:
    """Return the hook that fetches them, and then drops what is outdated from the cache.

    apt runs outside of the new root, as mmdebstrap itself does: in there, no name
    server is configured.

    The cache keeps every version that some suite lists, so which of them is meant is left to
    apt: from an empty folder it tells what it would fetch (lines of address, name, size and
    hash), and just that is put there. Without any, dpkg-deb fails later.
    """
    apt = 'APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" apt-get -qq -o APT::Sandbox::User=root'
    fetch = f"{apt} download {' '.join(_boot_packages(recipe))}"
    own = f'"$1"/{BUILD_FOLDER}/boot-packages'
    cached = '"$1"/var/cache/apt/archives/"$name"'
    choose = f"{fetch} --print-uris | while read -r _ name _; do ln {cached} . || exit 1; done"
    return (
        f'cd "$1"/var/cache/apt/archives && {fetch} && {apt} autoclean'
        f" && mkdir {own} && cd {own} && {choose}"
    )
