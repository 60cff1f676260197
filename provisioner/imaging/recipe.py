"""Recipes: what shall be in an image, as a YAML file and its scripts, read strictly.

A recipe may extend another. What is returned here is always the whole, ready to be built;
nothing is built here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final, TypeVar

from provisioner.errors import NotFound, RequestError
from provisioner.imaging.hardening import parts_of
from provisioner.imaging.recipe_layers import Layer, lacking, parse_layer, services_with_more
from provisioner.imaging.recipe_parts import (
    SCRIPT_BYTES_MAX,
    Mirror,
    RecipeFile,
    Script,
    Services,
    package_name,
    read_kernel,
    read_packages,
    read_script,
)
from provisioner.imaging.strict_yaml import did_you_mean

RECIPE_BYTES_MAX: Final = 1024 * 1024
# A recipe on a recipe on a recipe is as much as anybody can follow.
LAYERS_MAX: Final = 8
RECIPE_FILE: Final = "recipe.yaml"

_T = TypeVar("_T")


@dataclass(frozen=True)
class Recipe:
    """What shall be in an image. kernel is a package name; size_bytes that of the whole disk.

    Holds the whole: with all that the recipes below say, and the files, packages and units
    that hardening consists of. packages are as apt takes them (name, name=version,
    name/suite). kernel_arguments_for holds (kernel package, further arguments) pairs.
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
    scripts: tuple[Script, ...] = ()

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
        content = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()

    def with_kernel(self, kernel: str) -> Recipe:
        """Return the same recipe with another kernel package."""
        return replace(self, kernel=read_kernel(kernel))

    def with_packages(self, *packages: str) -> Recipe:
        """Return the same recipe with more packages, or others of the same name."""
        chosen = {package_name(package): package for package in read_packages(list(packages))}
        known = {package_name(package): package for package in self.packages}
        return replace(self, packages=tuple((known | chosen).values()))


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
        hint=did_you_mean(name, known),
    )


def load_recipe(path: Path) -> Recipe:
    """Return the recipe in this file, together with those that it extends.

    `extends` names a folder beside the recipe's own, or a recipe that comes with this
    program; with a slash in it, a path from the recipe's folder. Raises RequestError and
    NotFound naming the file and the key that is wrong.
    """
    layer = _load_layer(path)
    seen = [path.resolve()]
    while layer.extends is not None:
        below_path = _find_below(layer.extends, seen[-1]).resolve()
        if below_path in seen:
            raise RequestError(
                f"the recipe {path} extends itself",
                expected="recipes that end at one that extends nothing",
                found=" -> ".join(str(each) for each in (*seen, below_path)),
            )
        if len(seen) == LAYERS_MAX:
            raise RequestError(
                f"the recipe {path} stands on too many others",
                expected=f"at most {LAYERS_MAX} on top of each other",
            )
        seen.append(below_path)
        below = _load_layer(below_path)
        layer = replace(below.under(layer), extends=below.extends)
    with _about(path):
        return _complete(layer)


def parse_recipe(content: str) -> Recipe:
    """Return the recipe that this YAML alone says, without files beside it."""
    layer = parse_layer(content)
    if layer.extends is not None or layer.script_names:
        raise RequestError("a recipe that stands alone extends nothing and has no scripts")
    return _complete(layer)


def _complete(layer: Layer) -> Recipe:
    """Return the recipe of all layers, with what its hardening consists of."""
    if missing := lacking(layer):
        raise RequestError(f"the recipe lacks {', '.join(missing)}")
    hardening = parts_of(layer.hardening)
    own = {file.path for file in layer.files}
    if both := sorted(own & {file.path for file in hardening.files}):
        raise RequestError(
            "hardening writes a file that the recipe holds, too",
            found=", ".join(both),
            hint="choose another path, or switch the measure off",
        )
    packages = _given(layer.packages)
    named = {package_name(package) for package in packages}
    return Recipe(
        image=layer.image,
        architecture=_given(layer.architecture),
        mirrors=_given(layer.mirrors),
        size_bytes=_given(layer.size_bytes),
        kernel=_given(layer.kernel),
        kernel_arguments=_given(layer.kernel_arguments),
        firmware=_given(layer.firmware),
        packages=(*packages, *(one for one in hardening.packages if one not in named)),
        exclude=layer.exclude,
        files=(*layer.files, *hardening.files),
        services=services_with_more(hardening.services, layer.services),
        kernel_arguments_for=layer.kernel_arguments_for,
        scripts=(*layer.scripts, *hardening.scripts),
    )


def _given(value: _T | None) -> _T:
    """Return a value that `lacking` found to be there."""
    assert value is not None
    return value


def _load_layer(path: Path) -> Layer:
    """Return what this file alone says, with the scripts beside it."""
    with _about(path):
        data = _read(path, RECIPE_BYTES_MAX)
        if len(data) > RECIPE_BYTES_MAX:
            raise RequestError("the recipe is too large", expected=f"{RECIPE_BYTES_MAX} bytes")
        try:
            layer = parse_layer(data.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise RequestError("the recipe is not UTF-8 text") from error
        scripts = tuple(_load_script(path.parent, name) for name in layer.script_names)
        return replace(layer, scripts=scripts)


def _load_script(folder: Path, name: str) -> Script:
    path = folder / name
    # A link could lead out of the folder, to what nobody sees when reading the recipe.
    if path.is_symlink() or not path.is_file():
        raise RequestError(
            f"there is no script {name} beside the recipe", expected=f"a file {path}"
        )
    return read_script(name, _read(path, SCRIPT_BYTES_MAX))


def _read(path: Path, bytes_max: int) -> bytes:
    """Return the file's bytes; of a larger one, one byte more than bytes_max.

    Raises RequestError when it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(bytes_max + 1)
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}") from error


def _find_below(name: str, path: Path) -> Path:
    """Return the recipe file that the `extends` of the recipe at path means."""
    with _about(path):
        if "/" in name:
            return find_recipe(str(path.parent / name))
        return find_recipe(name, (path.parent.parent,))


def _shipped() -> tuple[Path, ...]:
    """Return the folders of recipes that come with this program: in the wheel, or the clone."""
    package = Path(__file__).resolve().parent.parent
    return (package / "images", package.parent / "images")


@contextlib.contextmanager
def _about(path: Path) -> Iterator[None]:
    """Put the file's name in front of what an error says."""
    try:
        yield
    except RequestError as error:
        raise type(error)(
            f"{path}: {error.message}", expected=error.expected, found=error.found, hint=error.hint
        ) from error
