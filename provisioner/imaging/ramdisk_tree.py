"""Lays out the part of the ramdisk that is Debian's: programs, kernel modules, Python, libraries.

Takes everything from a folder of unpacked packages, and runs nothing but that folder's own
Python, module tools and loader. What belongs in there is `ramdisk_contents`'s to say.
"""

import json
import shutil
import subprocess
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from provisioner.errors import ConfigError
from provisioner.imaging import ramdisk_contents as contents
from provisioner.imaging.tools import run

STEP_LIMIT: Final = timedelta(minutes=5)
PYTHON_FOLDER: Final = "usr/lib/python3.11"

CLOSURE: Final = """
import importlib, json, sys
for name in json.load(sys.stdin):
    importlib.import_module(name)
# A frozen module keeps its source on disk, too, and its parent package must be a folder there.
found = [(name, getattr(module, "__file__", None)) for name, module in sys.modules.items()]
print(json.dumps([pair for pair in found if pair[1] and pair[0] != "__main__"]))
"""

COMPILE: Final = """
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


def lay_out(tree: Path, root: Path, programs: Iterable[str], *, kernel_version: str) -> None:
    """Fill `root`, an empty folder, from the packages unpacked in `tree`.

    Raises ConfigError when a program needs a library that no package brings, and ToolFailed
    when one of the tools does.
    """
    wanted = tuple(programs)
    _add_skeleton(root)
    _add_programs(tree, root, wanted)
    _add_modules(tree, root, kernel_version)
    _add_python(tree, root)
    _add_libraries(tree, root, wanted)


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
    answer = run_python(tree, CLOSURE, list(contents.PYTHON_MODULES))
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
    run_python(tree, COMPILE, sorted(set(work)))


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


def run_python(tree: Path, program: str, argument: Any) -> str:
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
