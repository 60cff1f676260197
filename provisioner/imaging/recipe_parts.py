"""The parts that a recipe is made of, and how each is read from YAML. Reads no files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from provisioner.imaging.strict_yaml import (
    check_keys,
    items,
    mapping,
    matching,
    strings,
    text,
    wrong,
)

SIZE_BYTES_MIN: Final = 512 * 1024 * 1024
SIZE_BYTES_MAX: Final = 64 * 1024**3
SCRIPTS_MAX: Final = 32
SCRIPT_BYTES_MAX: Final = 256 * 1024

# Debian Policy 5.6.1. Not ending in a minus: apt would take it as the wish to remove.
_NAME: Final = r"[a-z0-9][a-z0-9+.-]{0,126}[a-z0-9+]"
# As apt takes them: a name, or a name with the version or the suite it shall come from.
# Versions: Debian Policy 5.6.12.
_VERSION: Final = r"[0-9A-Za-z][0-9A-Za-z.+:~-]{0,127}"
_SUITE: Final = r"[a-z0-9][a-z0-9.-]{0,63}"
_PACKAGE: Final = re.compile(_NAME)
_CHOSEN_PACKAGE: Final = re.compile(rf"{_NAME}(={_VERSION}|/{_SUITE})?")
_UNIT: Final = re.compile(
    r"[A-Za-z0-9@_.:-]{1,127}\.(service|socket|timer|target|mount|automount|path|slice)"
)
_PATH: Final = re.compile(r"(/[A-Za-z0-9@_.:+-]+)+")
_PATTERN: Final = re.compile(r"(/[A-Za-z0-9@_.:+*?-]+)+")
_URI: Final = re.compile(r"(https?|file)://[A-Za-z0-9._~:/%\[\]-]+")
_WORD: Final = re.compile(r"[a-z0-9][a-z0-9./-]{0,63}")
# What may stand on a kernel command line that a boot loader's script will hold.
_ARGUMENT: Final = re.compile(r"[A-Za-z0-9_.,:=/@+-]{1,255}")
_MODE: Final = re.compile(r"0[0-7]{3}")
_SCRIPT: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_SIZE: Final = re.compile(r"([1-9][0-9]{0,5})(MiB|GiB)")
_UNITS: Final = {"MiB": 1024**2, "GiB": 1024**3}
_FIRMWARE: Final = re.compile("bios|uefi|secure-boot")


@dataclass(frozen=True)
class Mirror:
    """One package source: a suite of a Debian mirror, and components of it.

    Without a uri it is the mirror that this machine's own apt has for the suite.
    """

    uri: str | None
    suite: str
    components: tuple[str, ...]


@dataclass(frozen=True)
class RecipeFile:
    """One file the image holds; owned by root, mode in octal such as 0644."""

    path: str
    content: str
    mode: str = "0644"


@dataclass(frozen=True)
class Script:
    """A program that is run once in the new root; content starts with its `#!` line."""

    name: str
    content: str


@dataclass(frozen=True)
class Services:
    """Units to enable, disable and mask, in this order."""

    enable: tuple[str, ...] = ()
    disable: tuple[str, ...] = ()
    mask: tuple[str, ...] = ()


def package_name(package: str) -> str:
    """Return the name of a package that may carry a version or a suite."""
    return re.split("[=/]", package)[0]


def read_kernel(value: object) -> str:
    """Return a kernel's package."""
    return matching("kernel", value, _PACKAGE, "a package name")


def read_packages(value: object) -> tuple[str, ...]:
    """Return packages as apt takes them: name, name=version or name/suite; each name once."""
    packages = strings(
        "packages", value, _CHOSEN_PACKAGE, "package names, alone or as name=version or name/suite"
    )
    _each_once("packages", [package_name(package) for package in packages])
    return packages


def read_exclude(value: object) -> tuple[str, ...]:
    """Return the patterns of paths that packages shall not unpack."""
    return strings("exclude", value, _PATTERN, "absolute paths")


def read_firmware(value: object) -> tuple[str, ...]:
    """Return the firmware to boot on. Secure Boot is a kind of UEFI, so both must be named."""
    firmware = strings("firmware", value, _FIRMWARE, "bios, uefi, secure-boot")
    _each_once("firmware", firmware)
    if not firmware:
        raise wrong("firmware", "at least one of bios, uefi, secure-boot", [])
    if "secure-boot" in firmware and "uefi" not in firmware:
        raise wrong("firmware", "uefi beside secure-boot", list(firmware))
    return firmware


def read_mirrors(value: object) -> tuple[Mirror, ...]:
    """Return the package sources, of which there must be one."""
    mirrors = []
    for item in items("mirrors", value):
        entry = mapping("a mirror", item)
        check_keys("a mirror", entry, required=("suite", "components"), optional=("uri",))
        mirrors.append(
            Mirror(
                _uri(entry["uri"]) if "uri" in entry else None,
                matching("suite", entry["suite"], _WORD, "a suite such as bookworm"),
                strings("components", entry["components"], _WORD, "components such as main"),
            )
        )
    if not mirrors:
        raise wrong("mirrors", "at least one", [])
    return tuple(mirrors)


def read_arguments(value: object, where: str = "kernel_arguments") -> tuple[str, ...]:
    """Return words of a kernel command line."""
    return strings(where, value, _ARGUMENT, "words without blanks")


def read_arguments_for(value: object) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return (kernel package, further arguments) pairs, sorted by package."""
    where = "kernel_arguments_for"
    entries = mapping(where, value)
    for package in entries:
        matching(where, package, _PACKAGE, "package names")
    return tuple((package, read_arguments(entries[package], where)) for package in sorted(entries))


def read_files(value: object) -> tuple[RecipeFile, ...]:
    """Return the files, each path once."""
    files = []
    for item in items("files", value):
        entry = mapping("a file", item)
        check_keys("a file", entry, required=("path", "content"), optional=("mode",))
        path = matching("path", entry["path"], _PATH, "an absolute path")
        if {"..", "."} & set(path.split("/")):
            raise wrong("path", "no '.' or '..' in it", path)
        mode = matching("mode", entry.get("mode", "0644"), _MODE, 'four octal digits, "0644"')
        files.append(RecipeFile(path, text(f"content of {path}", entry["content"]), mode))
    _each_once("files", [file.path for file in files])
    return tuple(files)


def read_script_names(value: object) -> tuple[str, ...]:
    """Return the names of scripts that lie beside the recipe; none leads anywhere else."""
    names = strings("scripts", value, _SCRIPT, "names of files beside the recipe")
    _each_once("scripts", names)
    if len(names) > SCRIPTS_MAX:
        raise wrong("scripts", f"at most {SCRIPTS_MAX}", len(names))
    return names


def read_script(name: str, data: bytes) -> Script:
    """Return the script of this name that a file holds; data may be a byte too long."""
    where = f"the script {name}"
    if len(data) > SCRIPT_BYTES_MAX:
        raise wrong(where, f"at most {SCRIPT_BYTES_MAX} bytes", f"{len(data)} bytes or more")
    if not data.startswith(b"#!"):
        raise wrong(where, "a first line such as #!/bin/sh", data[:40].decode("utf-8", "replace"))
    try:
        return Script(name, data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise wrong(where, "UTF-8 text", str(error)) from error


def read_services(value: object) -> Services:
    """Return the units; the same unit may stand in one list only."""
    entry = mapping("services", value)
    check_keys("services", entry, optional=("enable", "disable", "mask"))
    lists = {key: strings(key, entry[key], _UNIT, "unit names with their suffix") for key in entry}
    _each_once("services", [unit for units in lists.values() for unit in units])
    return Services(**lists)


def read_size(value: object) -> int:
    """Return a disk's size in bytes."""
    match = _SIZE.fullmatch(matching("size", value, _SIZE, "a size such as 2GiB or 1536MiB"))
    assert match is not None
    size_bytes = int(match[1]) * _UNITS[match[2]]
    if not SIZE_BYTES_MIN <= size_bytes <= SIZE_BYTES_MAX:
        raise wrong("size", "512MiB to 64GiB", value)
    return size_bytes


def _uri(value: object) -> str:
    return matching("uri", value, _URI, "an http(s) address").rstrip("/")


def _each_once(where: str, values: tuple[str, ...] | list[str]) -> None:
    if twice := sorted({value for value in values if values.count(value) > 1}):
        raise wrong(where, "each once", twice)
