"""Recipes: what shall be in an image, as a YAML file, read strictly. Builds nothing."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Hashable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import yaml

from provisioner.core.manifest import ARCHITECTURES, check_image_name
from provisioner.errors import NotFound, RequestError

RECIPE_FORMAT: Final = 1
RECIPE_BYTES_MAX: Final = 1024 * 1024
SIZE_BYTES_MIN: Final = 512 * 1024 * 1024
SIZE_BYTES_MAX: Final = 64 * 1024**3
RECIPE_FILE: Final = "recipe.yaml"

_PACKAGE: Final = re.compile(r"[a-z0-9][a-z0-9+.-]{1,127}")
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
_SIZE: Final = re.compile(r"([1-9][0-9]{0,5})(MiB|GiB)")
_UNITS: Final = {"MiB": 1024**2, "GiB": 1024**3}


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
class Services:
    """Units to enable, disable and mask, in this order."""

    enable: tuple[str, ...] = ()
    disable: tuple[str, ...] = ()
    mask: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """What shall be in an image. kernel is a package name; size_bytes that of the whole disk.

    kernel_arguments_for holds (kernel package, further arguments) pairs.
    """

    image: str
    architecture: str
    mirrors: tuple[Mirror, ...]
    size_bytes: int
    kernel: str
    kernel_arguments: tuple[str, ...]
    firmware: tuple[str, ...]
    packages: tuple[str, ...]
    exclude: tuple[str, ...]
    files: tuple[RecipeFile, ...]
    services: Services
    kernel_arguments_for: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @property
    def arguments(self) -> tuple[str, ...]:
        """The kernel's arguments: those for every kernel, and then those for this one."""
        return self.kernel_arguments + dict(self.kernel_arguments_for).get(self.kernel, ())

    @property
    def tree_digest(self) -> str:
        """The digest of what decides about the files: without the disk and the boot loader."""
        return replace(self, size_bytes=0, kernel_arguments=(), kernel_arguments_for=()).digest

    @property
    def digest(self) -> str:
        """The sha256 over everything the recipe says; comments and order of keys do not count."""
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def with_kernel(self, kernel: str) -> Recipe:
        """Return the same recipe with another kernel package."""
        return replace(self, kernel=_matching("kernel", kernel, _PACKAGE, "a package name"))


def find_recipe(name: str, folders: tuple[Path, ...] = ()) -> Path:
    """Return the recipe file that name means.

    name is a path (to the file or its folder) when it holds a slash or ends in
    .yaml; otherwise the name of a folder in one of `folders`, or among the recipes
    that come with this program. Raises NotFound with what there is.
    """
    if "/" in name or name.endswith((".yaml", ".yml")) or name in (".", ".."):
        path = Path(name)
        path = path / RECIPE_FILE if path.is_dir() else path
        if path.is_file():
            return path
        raise NotFound(f"there is no recipe at {path}")
    places = (*folders, *_shipped())
    for folder in places:
        if (folder / name / RECIPE_FILE).is_file():
            return folder / name / RECIPE_FILE
    known = sorted({file.parent.name for folder in places for file in folder.glob("*/recipe.yaml")})
    raise NotFound(
        f"there is no recipe named {name}",
        expected=", ".join(known) or "a path to a recipe.yaml",
        hint=_did_you_mean(name, known),
    )


def load_recipe(path: Path) -> Recipe:
    """Return the recipe in this file. Raises RequestError naming the key that is wrong."""
    with path.open("rb") as file:
        data = file.read(RECIPE_BYTES_MAX + 1)
    if len(data) > RECIPE_BYTES_MAX:
        raise RequestError(f"{path} is too large", expected=f"at most {RECIPE_BYTES_MAX} bytes")
    try:
        return parse_recipe(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text") from error
    except RequestError as error:
        raise RequestError(
            f"{path}: {error.message}", expected=error.expected, found=error.found, hint=error.hint
        ) from error


def parse_recipe(text: str) -> Recipe:
    """Return the recipe that this YAML says; RequestError for everything it should not."""
    value = _mapping("the recipe", _load(text))
    _keys("the recipe", value, _REQUIRED, _OPTIONAL)
    if type(value["format"]) is not int or value["format"] != RECIPE_FORMAT:
        raise _wrong("format", str(RECIPE_FORMAT), value["format"])
    check_image_name(value["image"])
    if value["architecture"] not in ARCHITECTURES:
        raise _wrong("architecture", " or ".join(sorted(ARCHITECTURES)), value["architecture"])
    firmware = _strings("firmware", value["firmware"], re.compile("bios|uefi"), "bios, uefi")
    if not firmware:
        raise _wrong("firmware", "bios, uefi or both", [])
    return Recipe(
        image=value["image"],
        architecture=value["architecture"],
        mirrors=_mirrors(value["mirrors"]),
        size_bytes=_size(value["size"]),
        kernel=_matching("kernel", value["kernel"], _PACKAGE, "a package name"),
        kernel_arguments=_strings(
            "kernel_arguments", value["kernel_arguments"], _ARGUMENT, "words without blanks"
        ),
        kernel_arguments_for=_arguments_for(value.get("kernel_arguments_for", {})),
        firmware=firmware,
        packages=_strings("packages", value["packages"], _PACKAGE, "package names"),
        exclude=_strings("exclude", value.get("exclude", []), _PATTERN, "absolute paths"),
        files=_files(value.get("files", [])),
        services=_services(value.get("services", {})),
    )


_REQUIRED: Final = frozenset(
    {
        "format",
        "image",
        "architecture",
        "mirrors",
        "size",
        "kernel",
        "kernel_arguments",
        "firmware",
        "packages",
    }
)
_OPTIONAL: Final = frozenset({"exclude", "files", "kernel_arguments_for", "services"})


class _StrictLoader(yaml.SafeLoader):
    """A safe loader that refuses a key that stands in a mapping twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable) or key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands there twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _load(text: str) -> object:
    try:
        return yaml.load(text, Loader=_StrictLoader)  # it is a SafeLoader
    except (yaml.YAMLError, RecursionError) as error:
        raise RequestError("the recipe is not YAML we accept", found=str(error)) from error


def _shipped() -> tuple[Path, ...]:
    """Return the folders of recipes that come with this program: in the wheel, or the clone."""
    package = Path(__file__).resolve().parent.parent
    return (package / "images", package.parent / "images")


def _mirrors(value: object) -> tuple[Mirror, ...]:
    mirrors = []
    for item in _list("mirrors", value):
        entry = _mapping("a mirror", item)
        _keys("a mirror", entry, frozenset({"suite", "components"}), frozenset({"uri"}))
        mirrors.append(
            Mirror(
                _uri(entry["uri"]) if "uri" in entry else None,
                _matching("suite", entry["suite"], _WORD, "a suite such as bookworm"),
                _strings("components", entry["components"], _WORD, "components such as main"),
            )
        )
    if not mirrors:
        raise _wrong("mirrors", "at least one", [])
    return tuple(mirrors)


def _arguments_for(value: object) -> tuple[tuple[str, tuple[str, ...]], ...]:
    where = "kernel_arguments_for"
    return tuple(
        (
            _matching(where, package, _PACKAGE, "package names"),
            _strings(where, words, _ARGUMENT, "words without blanks"),
        )
        for package, words in sorted(_mapping(where, value).items())
    )


def _uri(value: object) -> str:
    return _matching("uri", value, _URI, "an http(s) address").rstrip("/")


def _files(value: object) -> tuple[RecipeFile, ...]:
    files = []
    for item in _list("files", value):
        entry = _mapping("a file", item)
        _keys("a file", entry, frozenset({"path", "content"}), frozenset({"mode"}))
        path = _matching("path", entry["path"], _PATH, "an absolute path")
        if {"..", "."} & set(path.split("/")):
            raise _wrong("path", "no '.' or '..' in it", path)
        if not isinstance(entry["content"], str):
            raise _wrong(f"content of {path}", "text", entry["content"])
        mode = _matching("mode", entry.get("mode", "0644"), _MODE, 'four octal digits, "0644"')
        files.append(RecipeFile(path, entry["content"], mode))
    paths = [file.path for file in files]
    if twice := sorted({path for path in paths if paths.count(path) > 1}):
        raise _wrong("files", "each path once", twice)
    return tuple(files)


def _services(value: object) -> Services:
    entry = _mapping("services", value)
    _keys("services", entry, frozenset(), frozenset({"enable", "disable", "mask"}))
    lists = {key: _strings(key, entry[key], _UNIT, "unit names with their suffix") for key in entry}
    return Services(**lists)


def _size(value: object) -> int:
    text = _matching("size", value, _SIZE, "a size such as 2GiB or 1536MiB")
    match = _SIZE.fullmatch(text)
    assert match is not None
    size_bytes = int(match[1]) * _UNITS[match[2]]
    if not SIZE_BYTES_MIN <= size_bytes <= SIZE_BYTES_MAX:
        raise _wrong("size", "512MiB to 64GiB", value)
    return size_bytes


def _keys(
    where: str, value: Mapping[str, object], required: frozenset[str], optional: frozenset[str]
) -> None:
    """Raise RequestError for a missing key, or one that means nothing, with a likely spelling."""
    for key in value:
        if key not in required | optional:
            raise RequestError(
                f"{where} has a key of no known meaning: {key!r}",
                expected=", ".join(sorted(required | optional)),
                hint=_did_you_mean(str(key), sorted(required | optional)),
            )
    if missing := required - value.keys():
        raise RequestError(f"{where} lacks {', '.join(sorted(missing))}")


def _did_you_mean(word: str, known: list[str]) -> str | None:
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else None


def _mapping(where: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(where, "keys and values", value)
    return value


def _list(where: str, value: object) -> list[Any]:
    if not isinstance(value, list):
        raise _wrong(where, "a list", value)
    return value


def _strings(where: str, value: object, pattern: re.Pattern[str], expected: str) -> tuple[str, ...]:
    return tuple(_matching(where, item, pattern, expected) for item in _list(where, value))


def _matching(where: str, value: object, pattern: re.Pattern[str], expected: str) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise _wrong(where, expected, value)
    return value


def _wrong(where: str, expected: str, found: object) -> RequestError:
    return RequestError(f"{where} is wrong", expected=expected, found=repr(found)[:200])
