"""Builds the deploy ramdisk: Debian's kernel, and an initramfs with Python and the agent.

The base (everything that is Debian's) is kept in a cache. A site's ramdisk is the base and a
small second archive with the agent's code and what the site trusts, made in an instant.
Needs neither root nor a network beyond the package mirror. It does not sign or publish.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import zstandard

import provisioner
from provisioner.core.trust import TrustPolicy
from provisioner.errors import ConfigError, TrustError
from provisioner.imaging import cpio
from provisioner.imaging import ramdisk_contents as contents
from provisioner.imaging.ramdisk_tree import CLOSURE, COMPILE, PYTHON_FOLDER, lay_out, run_python
from provisioner.imaging.tools import run
from provisioner.whole_files import one_after_another_in, sync

DEFAULT_KERNEL: Final = "linux-image-amd64"
LAB_KERNEL: Final = contents.VIRTUAL_KERNEL
MIB: Final = 1024 * 1024
# Kernel and initrd together: what a host fetches, and what it must hold in memory.
SIZE_MAX_BYTES: Final = {LAB_KERNEL: 48 * MIB, DEFAULT_KERNEL: 128 * MIB}
FETCH_LIMIT: Final = timedelta(minutes=15)
# Level 19 makes it a tenth smaller, and takes three times as long to unpack at each boot.
BASE_LEVEL: Final = 12
PINS_LEVEL: Final = 9
# Raise it when the way a base is made changes, so that cached ones are made again.
BASE_FORMAT: Final = 1

AGENT_CORE: Final = (
    *("__init__.py", "batches.py", "disks.py", "manifest.py", "manifest_fields.py"),
    *("trust.py", "versions.py"),
)

_TRY_AGENT: Final = """
import json, sys
sys.path.append(json.load(sys.stdin))
import provisioner.agent.main
"""


@dataclass(frozen=True)
class Base:
    """A cached base: `vmlinuz`, `initrd` and the unpacked `root` in one folder."""

    folder: Path
    kernel_package: str
    kernel_version: str
    packages: dict[str, str]

    @property
    def kernel(self) -> Path:
        return self.folder / "vmlinuz"

    @property
    def initrd(self) -> Path:
        return self.folder / "initrd"

    @property
    def root(self) -> Path:
        return self.folder / "root"


@dataclass(frozen=True)
class Pins:
    """What a site's ramdisk trusts: releases by a `TrustPolicy`, the agent listener's CA as PEM."""

    release_trust: bytes
    agent_ca: bytes


@dataclass(frozen=True)
class Ramdisk:
    """A finished ramdisk: a folder named by its digest, never changed."""

    digest: str
    folder: Path
    size_bytes: int


def build_base(kernel_package: str, cache_dir: Path, *, refresh: bool = False) -> Base:
    """Return the base for a Debian kernel package, from the cache where it is there.

    refresh makes it anew, with the packages of today. Raises ToolFailed when the packages
    cannot be fetched, and ConfigError for a package that holds no kernel.
    """
    folder = cache_dir / f"base-{kernel_package}-{_recipe_digest(kernel_package)[:16]}"
    if not refresh and (folder / "base.json").exists():
        return _read_base(folder)
    cache_dir.mkdir(parents=True, exist_ok=True)
    # Of two that made it at once, one would take away what the other reads.
    with one_after_another_in(cache_dir):
        if refresh or not (folder / "base.json").exists():
            _make_base(kernel_package, folder)
        return _read_base(folder)


def _make_base(kernel_package: str, folder: Path) -> None:
    """Make a base, in the place of every other one for the same package."""
    cache_dir = folder.parent
    with tempfile.TemporaryDirectory(prefix=".new-", dir=cache_dir) as scratch:
        made = Path(scratch) / "base"
        tree = Path(scratch) / "tree"
        packages = _fetch(kernel_package, tree)
        _fill_base(tree, made, kernel_package, packages)
        for number, old in enumerate(sorted(cache_dir.glob(f"base-{kernel_package}-*"))):
            os.rename(old, Path(scratch) / f"old-{number}")
        os.rename(made, folder)


def build_ramdisk(base: Base, pins: Pins, ramdisks: Path) -> Ramdisk:
    """Write base, agent and pins as `ramdisks/<digest>/{vmlinuz,initrd,ramdisk.json}`.

    The digest is that of ramdisk.json, which names the digests of the other two. The same
    inputs give the same digest, and an existing one is left as it is. Raises ConfigError
    when the pins are not what they should be, or the ramdisk is larger than its kernel's limit.
    """
    _check_pins(pins)
    ramdisks.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=ramdisks) as scratch:
        site = Path(scratch) / "site"
        _fill_site(base, pins, site)
        made = Path(scratch) / "ramdisk"
        made.mkdir()
        shutil.copyfile(base.kernel, made / "vmlinuz")
        packed = zstandard.ZstdCompressor(level=PINS_LEVEL).compress(cpio.archive(site))
        (made / "initrd").write_bytes(base.initrd.read_bytes() + packed)
        return _publish(made, base, pins, ramdisks)


def ramdisks_in(ramdisks: Path) -> list[Path]:
    """Return the folders of finished ramdisks, the newest first."""
    found = [path.parent for path in ramdisks.glob("*/ramdisk.json")]
    return sorted(found, key=lambda folder: folder.stat().st_mtime_ns, reverse=True)


def about(folder: Path) -> dict[str, Any]:
    """Return what a ramdisk is: digest, kernel_package, kernel_version, size_bytes, folder."""
    value = json.loads((folder / "ramdisk.json").read_text())
    return {
        "digest": folder.name,
        "kernel_package": value["kernel_package"],
        "kernel_version": value["kernel_version"],
        "size_bytes": sum(value["size_bytes"].values()),
        "folder": str(folder),
    }


def _publish(made: Path, base: Base, pins: Pins, ramdisks: Path) -> Ramdisk:
    sizes = {name: (made / name).stat().st_size for name in ("vmlinuz", "initrd")}
    total = sum(sizes.values())
    _check_size(base.kernel_package, total)
    about = {
        "format": 1,
        "kernel_package": base.kernel_package,
        "kernel_version": base.kernel_version,
        "packages": base.packages,
        # For `doctor`, which says what hosts that boot this believe otherwise than the site.
        "release_trust": json.loads(pins.release_trust),
        "sha256": {name: _sha256(made / name) for name in sizes},
        "size_bytes": sizes,
    }
    text = json.dumps(about, sort_keys=True, separators=(",", ":")).encode()
    (made / "ramdisk.json").write_bytes(text)
    digest = hashlib.sha256(text).hexdigest()
    folder = ramdisks / digest
    if folder.exists():
        # The newest is the one that boots, and this is what was asked for last.
        os.utime(folder)
    else:
        _flush(made)
        made.chmod(0o755)
        os.rename(made, folder)
        _flush(ramdisks, files=())
    return Ramdisk(digest, folder, total)


def _check_size(kernel_package: str, size_bytes: int) -> None:
    limit = SIZE_MAX_BYTES.get(kernel_package, SIZE_MAX_BYTES[DEFAULT_KERNEL])
    if size_bytes > limit:
        raise ConfigError(
            f"the ramdisk with {kernel_package} is too large",
            expected=f"at most {limit} bytes",
            found=f"{size_bytes} bytes",
        )


def _check_pins(pins: Pins) -> None:
    try:
        TrustPolicy.parse(pins.release_trust)
    except TrustError as error:
        raise ConfigError(f"the ramdisk's trust in releases: {error.message}") from error
    if b"-----BEGIN CERTIFICATE-----" not in pins.agent_ca:
        raise ConfigError(
            "the agent CA for the ramdisk is not PEM", expected="-----BEGIN CERTIFICATE-----"
        )
    if b"PRIVATE KEY" in pins.agent_ca:
        raise ConfigError("the agent CA for the ramdisk holds a private key")


def _fetch(kernel_package: str, tree: Path) -> dict[str, str]:
    """Unpack the packages and what they need below tree; return their versions by name.

    Nothing is installed: no script of a package runs.
    """
    listing = tree.parent / "packages"
    include = ",".join(contents.packages_for(kernel_package))
    hook = f'ls "$1/var/cache/apt/archives" > {listing}'
    command = ["mmdebstrap", "--quiet", "--variant=extract", f"--include={include}"]
    command += ["--skip=cleanup/apt/cache", f"--extract-hook={hook}", contents.SUITE, str(tree)]
    run(command, limit=FETCH_LIMIT)
    names = [name for name in listing.read_text().split() if name.endswith(".deb")]
    pairs = (name.removesuffix(".deb").split("_")[:2] for name in names)
    return {name: version.replace("%3a", ":") for name, version in sorted(pairs)}


def _fill_base(tree: Path, made: Path, kernel_package: str, packages: dict[str, str]) -> None:
    kernels = sorted((tree / "boot").glob("vmlinuz-*"))
    if len(kernels) != 1:
        raise ConfigError(
            f"the package {kernel_package} holds no kernel", found=[k.name for k in kernels]
        )
    version = kernels[0].name.removeprefix("vmlinuz-")
    root = made / "root"
    root.mkdir(parents=True)
    lay_out(tree, root, contents.programs_for(kernel_package), kernel_version=version)
    shutil.copyfile(kernels[0], made / "vmlinuz")
    packer = zstandard.ZstdCompressor(level=BASE_LEVEL, threads=-1)
    (made / "initrd").write_bytes(packer.compress(cpio.archive(root)))
    about = {
        "kernel_package": kernel_package,
        "kernel_version": version,
        "packages": packages,
    }
    (made / "base.json").write_text(json.dumps(about, sort_keys=True, indent=1))


def _read_base(folder: Path) -> Base:
    return Base(folder=folder, **json.loads((folder / "base.json").read_text()))


def _fill_site(base: Base, pins: Pins, site: Path) -> None:
    """Lay out what a site adds: /init, the agent compiled, and what it trusts."""
    etc = site / "etc/provisioner"
    etc.mkdir(parents=True)
    (etc / "release-trust.json").write_bytes(pins.release_trust)
    (etc / "agent-ca.pem").write_bytes(pins.agent_ca)
    package = Path(provisioner.__file__).parent
    for script, target in (("init.sh", site / "init"), ("udhcpc.sh", etc / "udhcpc.sh")):
        shutil.copyfile(package / "agent" / script, target)
        target.chmod(0o755)
    sources = [package / "__init__.py", package / "errors.py"]
    sources += [package / "core" / name for name in AGENT_CORE]
    sources += sorted((package / "agent").glob("*.py"))
    work: list[tuple[str, str, str]] = []
    for source in sources:
        shown = Path(PYTHON_FOLDER) / "provisioner" / source.relative_to(package)
        target = site / shown.with_suffix(".pyc")
        target.parent.mkdir(parents=True, exist_ok=True)
        work.append((str(source), str(target), f"/{shown}"))
    run_python(base.root, COMPILE, work)
    # A module that the base lacks shows here, and not on the first host.
    run_python(base.root, _TRY_AGENT, str(site / PYTHON_FOLDER))


def _recipe_digest(kernel_package: str) -> str:
    """Return a digest over all that decides what a base is, but the packages' versions."""
    parts = [str(BASE_FORMAT), kernel_package, CLOSURE, COMPILE]
    parts += [Path(contents.__file__).read_text(), Path(cpio.__file__).read_text()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(folder: Path, files: Iterable[Path] | None = None) -> None:
    for path in (*(sorted(folder.iterdir()) if files is None else files), folder):
        sync(path)
