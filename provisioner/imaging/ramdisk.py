"""Builds the deploy ramdisk: Debian's kernel, and an initramfs with Python and the agent.

The base (everything that is Debian's) is kept in a cache. A site's ramdisk is the base and a
small second archive with the agent's code and the site's public keys, made in an instant.
Needs neither root nor a network beyond the package mirror. It does not sign or publish.
"""

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import zstandard

import provisioner
from provisioner.errors import ConfigError
from provisioner.imaging import cpio
from provisioner.imaging import ramdisk_contents as contents
from provisioner.imaging.tools import run

DEFAULT_KERNEL: Final = "linux-image-amd64"
LAB_KERNEL: Final = contents.VIRTUAL_KERNEL
MIB: Final = 1024 * 1024
# Kernel and initrd together: what a host fetches, and what it must hold in memory.
SIZE_MAX_BYTES: Final = {LAB_KERNEL: 48 * MIB, DEFAULT_KERNEL: 128 * MIB}
FETCH_LIMIT: Final = timedelta(minutes=15)
STEP_LIMIT: Final = timedelta(minutes=5)
# Level 19 makes it a tenth smaller, and takes three times as long to unpack at each boot.
BASE_LEVEL: Final = 12
PINS_LEVEL: Final = 9
# Raise it when the way a base is made changes, so that cached ones are made again.
BASE_FORMAT: Final = 1

AGENT_CORE: Final = ("__init__.py", "disks.py", "manifest.py")
PYTHON_FOLDER: Final = "usr/lib/python3.11"

_CLOSURE: Final = """
import importlib, json, sys
for name in json.load(sys.stdin):
    importlib.import_module(name)
# A frozen module keeps its source on disk, too, and its parent package must be a folder there.
found = [(name, getattr(module, "__file__", None)) for name, module in sys.modules.items()]
print(json.dumps([pair for pair in found if pair[1] and pair[0] != "__main__"]))
"""

_COMPILE: Final = """
import _frozen_importlib_external, _imp, json, marshal, sys
magic = _frozen_importlib_external.MAGIC_NUMBER
# Hash-based and unchecked (PEP 552): the file carries no date, and nothing is looked up to use it.
flags = (0b01).to_bytes(4, "little")
for source, target, shown in json.load(sys.stdin):
    with open(source, "rb") as file:
        text = file.read()
    code = compile(text, shown, "exec", dont_inherit=True, optimize=0)
    with open(target, "wb") as file:
        file.write(magic + flags + _imp.source_hash(int.from_bytes(magic, "little"), text))
        file.write(marshal.dumps(code))
"""

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
    """What a site's ramdisk trusts, as PEM: public keys of releases, the agent listener's CA."""

    release_keys: bytes
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
    with tempfile.TemporaryDirectory(prefix=".new-", dir=cache_dir) as scratch:
        made = Path(scratch) / "base"
        tree = Path(scratch) / "tree"
        packages = _fetch(kernel_package, tree)
        _fill_base(tree, made, kernel_package, packages)
        for number, old in enumerate(sorted(cache_dir.glob(f"base-{kernel_package}-*"))):
            os.rename(old, Path(scratch) / f"old-{number}")
        os.rename(made, folder)
    return _read_base(folder)


def build_ramdisk(base: Base, pins: Pins, ramdisks: Path) -> Ramdisk:
    """Write base, agent and pins as `ramdisks/<digest>/{vmlinuz,initrd,ramdisk.json}`.

    The digest is that of ramdisk.json, which names the digests of the other two. The same
    inputs give the same digest, and an existing one is left as it is. Raises ConfigError
    when the pins are not PEM, or when the ramdisk is larger than its kernel's limit.
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
        return _publish(made, base, ramdisks)


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


def _publish(made: Path, base: Base, ramdisks: Path) -> Ramdisk:
    sizes = {name: (made / name).stat().st_size for name in ("vmlinuz", "initrd")}
    total = sum(sizes.values())
    _check_size(base.kernel_package, total)
    about = {
        "format": 1,
        "kernel_package": base.kernel_package,
        "kernel_version": base.kernel_version,
        "packages": base.packages,
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
    wanted = (
        ("release keys", pins.release_keys, b"-----BEGIN PUBLIC KEY-----"),
        ("agent CA", pins.agent_ca, b"-----BEGIN CERTIFICATE-----"),
    )
    for name, pem, start in wanted:
        if start not in pem:
            raise ConfigError(f"the {name} for the ramdisk are not PEM", expected=start.decode())
        if b"PRIVATE KEY" in pem:
            raise ConfigError(f"the {name} for the ramdisk hold a private key")


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
    _add_skeleton(root)
    programs = contents.programs_for(kernel_package)
    _add_programs(tree, root, programs)
    _add_modules(tree, root, version)
    _add_python(tree, root)
    _add_libraries(tree, root, programs)
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


def _add_skeleton(root: Path) -> None:
    for name in ("bin", "dev", "etc/provisioner", "lib", "lib64", "proc", "run", "sbin"):
        (root / name).mkdir(parents=True)
    for name in ("sys", "tmp", "root", "usr/bin", "usr/lib", "usr/sbin"):
        (root / name).mkdir(parents=True)
    for name in contents.BUSYBOX_LINKS:
        (root / "bin" / name).symlink_to("busybox")
    for name in contents.KMOD_LINKS:
        (root / "sbin" / name).symlink_to("../bin/kmod")


def _add_programs(tree: Path, root: Path, programs: Iterable[str]) -> None:
    for name in programs:
        shutil.copy(tree / name, root / name)
    (root / "usr/lib/ssl").mkdir()
    # A host's disks are all there when the driver is loaded, not some time later.
    options = root / "etc/modprobe.d/scan.conf"
    options.parent.mkdir()
    options.write_text("options scsi_mod scan=sync\n")
    # An empty configuration: OpenSSL would look for one, and loads nothing it does not name.
    (root / "usr/lib/ssl/openssl.cnf").write_text("")


def _add_modules(tree: Path, root: Path, version: str) -> None:
    """Copy the wanted kernel modules and what they depend on, with a fresh index."""
    run([*_loader(tree, "depmod"), str(tree / "bin/kmod"), "-b", str(tree), version])
    source = tree / "lib/modules" / version
    target = root / "lib/modules" / version
    target.mkdir(parents=True)
    for name in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
        shutil.copy(source / name, target / name)
    for name in sorted(_wanted_modules(source)):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / name, target / name)
    run([*_loader(tree, "depmod"), str(tree / "bin/kmod"), "-b", str(root), version])
    # The kernel module tools read the binary index; the text is for people.
    for name in ("alias", "dep", "symbols", "symbols.bin", "builtin.modinfo", "order", "devname"):
        (target / f"modules.{name}").unlink(missing_ok=True)


def _wanted_modules(source: Path) -> set[str]:
    needs: dict[str, list[str]] = {}
    for line in (source / "modules.dep").read_text().splitlines():
        name, _, rest = line.partition(":")
        needs[name] = rest.split()
    wanted: set[str] = set()
    for module, depends_on in needs.items():
        if _is_wanted(module):
            wanted |= {module, *depends_on}
    return wanted


def _is_wanted(name: str) -> bool:
    path = name.removeprefix("kernel/")
    if any(path.startswith(prefix) for prefix in contents.MODULES_LEFT_OUT):
        return False
    stem = Path(path).name.partition(".ko")[0]
    folders = (f"{folder}/" for folder in contents.MODULE_FOLDERS)
    return stem in contents.MODULES or any(path.startswith(folder) for folder in folders)


def _add_python(tree: Path, root: Path) -> None:
    """Add the part of the standard library that the agent imports, compiled, and zstandard."""
    library = tree / PYTHON_FOLDER
    answer = _python(tree, _CLOSURE, list(contents.PYTHON_MODULES))
    work: list[tuple[str, str, str]] = []
    for _, file in json.loads(answer):
        path = Path(file)
        shown = PYTHON_FOLDER / path.relative_to(library)
        target = root / shown
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".so":
            shutil.copy(path, target)
        else:
            work.append((str(path), str(target.with_suffix(".pyc")), f"/{shown}"))
    (root / PYTHON_FOLDER / "lib-dynload").mkdir(exist_ok=True)
    package = root / PYTHON_FOLDER / "zstandard"
    package.mkdir()
    shutil.copy(tree / contents.ZSTANDARD_BACKEND, package)
    init = tree / "zstandard_init.py"
    init.write_text(contents.ZSTANDARD_INIT)
    shown_init = f"/{PYTHON_FOLDER}/zstandard/__init__.py"
    work.append((str(init), str(package / "__init__.pyc"), shown_init))
    _python(tree, _COMPILE, sorted(set(work)))


def _add_libraries(tree: Path, root: Path, programs: Iterable[str]) -> None:
    """Add the shared libraries that the programs and Python's extensions are linked with."""
    linked = [root / name for name in programs]
    linked += sorted((root / PYTHON_FOLDER).rglob("*.so"))
    found: set[Path] = set()
    for program in linked:
        found |= set(_libraries(tree, program))
    for library in sorted(found):
        target = root / library.relative_to(tree)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library.resolve(), target)
    loader = root / "lib64/ld-linux-x86-64.so.2"
    if not loader.exists():
        shutil.copy((tree / "lib64/ld-linux-x86-64.so.2").resolve(), loader)


def _libraries(tree: Path, program: Path) -> Iterable[Path]:
    command = [*_loader(tree, "list"), "--list", str(program)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=STEP_LIMIT.total_seconds(), check=False
    )
    # A static program has nothing to list, and the loader says so by failing.
    for line in done.stdout.splitlines():
        name, arrow, rest = line.strip().partition(" => ")
        if arrow and rest.startswith("/"):
            yield Path(rest.split(" (")[0])
        elif arrow:
            raise ConfigError(f"{program.name} needs {name}, which no package brings")


def _fill_site(base: Base, pins: Pins, site: Path) -> None:
    """Lay out what a site adds: /init, the agent compiled, and what it trusts."""
    etc = site / "etc/provisioner"
    etc.mkdir(parents=True)
    (etc / "release-keys.pem").write_bytes(pins.release_keys)
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
    _python(base.root, _COMPILE, work)
    # A module that the base lacks shows here, and not on the first host.
    _python(base.root, _TRY_AGENT, str(site / PYTHON_FOLDER))


def _python(tree: Path, program: str, argument: Any) -> str:
    """Run a program in the Python below tree, with an argument as JSON on its stdin."""
    python = [*_loader(tree, "python3.11"), str(tree / "usr/bin/python3.11")]
    command = [*python, "-I", "-S", "-B", "-c", program]
    return run(command, stdin=json.dumps(argument).encode(), limit=STEP_LIMIT).decode()


def _loader(tree: Path, name: str) -> list[str]:
    """Return how to run a program of the tree with the tree's own libraries, without a chroot."""
    folders = ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu", "usr/sbin", "lib64")
    libraries = ":".join(str(tree / folder) for folder in folders)
    loader = str(tree / "lib64/ld-linux-x86-64.so.2")
    if name == "list":
        return [loader, "--library-path", libraries]
    return [loader, "--library-path", libraries, "--argv0", _argv0(tree, name)]


def _argv0(tree: Path, name: str) -> str:
    # Python finds its library from its own path, kmod what it is to do from its name.
    return str(tree / "usr/bin" / name) if name.startswith("python") else name


def _recipe_digest(kernel_package: str) -> str:
    """Return a digest over all that decides what a base is, but the packages' versions."""
    parts = [str(BASE_FORMAT), kernel_package, _CLOSURE, _COMPILE]
    parts += [Path(contents.__file__).read_text(), Path(cpio.__file__).read_text()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(folder: Path, files: Iterable[Path] | None = None) -> None:
    for path in (*(sorted(folder.iterdir()) if files is None else files), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
