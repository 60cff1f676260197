"""Recipes on top of others: what one file says, and what two say together. Reads no files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

from provisioner.core.manifest import ARCHITECTURES, check_image_name
from provisioner.imaging.hardening import Hardening, read_hardening
from provisioner.imaging.recipe_parts import (
    Mirror,
    RecipeFile,
    Script,
    Services,
    package_name,
    read_arguments,
    read_arguments_for,
    read_exclude,
    read_files,
    read_firmware,
    read_kernel,
    read_mirrors,
    read_packages,
    read_script_names,
    read_services,
    read_size,
)
from provisioner.imaging.strict_yaml import check_keys, load, mapping, one_of, text, wrong

RECIPE_FORMAT: Final = 1
NO_SERVICES: Final = Services()
NO_HARDENING: Final = Hardening()

_T = TypeVar("_T")


@dataclass(frozen=True)
class Layer:
    """What one recipe file says, or several on top of each other.

    None and empty mean that nothing is said. extends is the name of, or the path to,
    the recipe below; scripts are filled in by whoever reads files.
    """

    image: str
    extends: str | None = None
    script_names: tuple[str, ...] = ()
    scripts: tuple[Script, ...] = ()
    architecture: str | None = None
    mirrors: tuple[Mirror, ...] | None = None
    size_bytes: int | None = None
    kernel: str | None = None
    firmware: tuple[str, ...] | None = None
    kernel_arguments: tuple[str, ...] | None = None
    kernel_arguments_for: tuple[tuple[str, tuple[str, ...]], ...] = ()
    packages: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    files: tuple[RecipeFile, ...] = ()
    services: Services = NO_SERVICES
    hardening: Hardening = NO_HARDENING

    def under(self, above: Layer) -> Layer:
        """Return what this says together with a recipe on top of it.

        The upper one's image, architecture, size, kernel, firmware and mirrors replace
        the lower's. Lists grow: the lower's items come first, and a file, package, script
        or unit that both name is as the upper one says.
        """
        return Layer(
            image=above.image,
            scripts=_grown(self.scripts, above.scripts, lambda script: script.name),
            architecture=above.architecture or self.architecture,
            mirrors=above.mirrors or self.mirrors,
            size_bytes=above.size_bytes or self.size_bytes,
            kernel=above.kernel or self.kernel,
            firmware=above.firmware or self.firmware,
            kernel_arguments=_either(
                self.kernel_arguments, above.kernel_arguments, lambda word: word
            ),
            kernel_arguments_for=_arguments_for(self, above),
            packages=_either(self.packages, above.packages, package_name),
            exclude=_added(self.exclude, above.exclude),
            files=_grown(self.files, above.files, lambda file: file.path),
            services=services_with_more(self.services, above.services),
            hardening=self.hardening.with_more(above.hardening),
        )


def parse_layer(content: str) -> Layer:
    """Return what one recipe file says; RequestError for everything it should not."""
    value = mapping("the recipe", load(content))
    check_keys("the recipe", value, required=("format", "image"), optional=("extends", *_READERS))
    if type(value["format"]) is not int or value["format"] != RECIPE_FORMAT:
        raise wrong("format", str(RECIPE_FORMAT), value["format"])
    check_image_name(value["image"])
    layer = Layer(
        image=value["image"],
        extends=text("extends", value["extends"]) if "extends" in value else None,
    )
    said = {field: read(value[key]) for key, (field, read) in _READERS.items() if key in value}
    return replace(layer, **said)


def lacking(layer: Layer) -> list[str]:
    """Return the keys without which nothing can be built, and that nobody gave."""
    return [key for key in REQUIRED if getattr(layer, _READERS[key][0]) is None]


def services_with_more(below: Services, above: Services) -> Services:
    """Return the units of both; what is above has the last word about a unit."""
    decided = {*above.enable, *above.disable, *above.mask}

    def units(lower: tuple[str, ...], upper: tuple[str, ...]) -> tuple[str, ...]:
        return (*(unit for unit in lower if unit not in decided), *upper)

    return Services(
        enable=units(below.enable, above.enable),
        disable=units(below.disable, above.disable),
        mask=units(below.mask, above.mask),
    )


def _added(below: Iterable[str] | None, above: Iterable[str] | None) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*(below or ()), *(above or ()))))


def _either(
    below: tuple[str, ...] | None, above: tuple[str, ...] | None, key: Callable[[str], str]
) -> tuple[str, ...] | None:
    """Return both lists as one, or None where neither recipe has one."""
    return None if below is above is None else _grown(below or (), above or (), key)


def _grown(below: Iterable[_T], above: Iterable[_T], key: Callable[[_T], str]) -> tuple[_T, ...]:
    """Return below and then above; of two with one key, the upper in the lower's place."""
    return tuple(
        ({key(item): item for item in below} | {key(item): item for item in above}).values()
    )


def _arguments_for(below: Layer, above: Layer) -> tuple[tuple[str, tuple[str, ...]], ...]:
    lower, upper = dict(below.kernel_arguments_for), dict(above.kernel_arguments_for)
    kernels = sorted(lower.keys() | upper.keys())
    return tuple((kernel, _added(lower.get(kernel), upper.get(kernel))) for kernel in kernels)


def _architecture(value: object) -> str:
    return one_of("architecture", value, ARCHITECTURES)


# What a key means: the field it fills, and who reads it.
_READERS: Final[Mapping[str, tuple[str, Callable[[Any], Any]]]] = {
    "architecture": ("architecture", _architecture),
    "exclude": ("exclude", read_exclude),
    "files": ("files", read_files),
    "firmware": ("firmware", read_firmware),
    "hardening": ("hardening", read_hardening),
    "kernel": ("kernel", read_kernel),
    "kernel_arguments": ("kernel_arguments", read_arguments),
    "kernel_arguments_for": ("kernel_arguments_for", read_arguments_for),
    "mirrors": ("mirrors", read_mirrors),
    "packages": ("packages", read_packages),
    "scripts": ("script_names", read_script_names),
    "services": ("services", read_services),
    "size": ("size_bytes", read_size),
}
REQUIRED: Final = (
    "architecture",
    "firmware",
    "kernel",
    "kernel_arguments",
    "mirrors",
    "packages",
    "size",
)
