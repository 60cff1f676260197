"""Ten successive releases, as recipes: from a suite as it was, to all that has been fixed since.

The steps are what the mirrors hold today: a suite without its updates, and the updates, one
source package after the other, the kernel's among them. No mirror of yesterday is needed.
"""

import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from provisioner.errors import Unavailable
from provisioner.imaging.recipe import Recipe
from provisioner.imaging.recipe_parts import RecipeFile

STEPS: Final = 9
APT_LIMIT_S: Final = 60
ADDED_PACKAGE: Final = "rsync"
"""What one of the releases has in addition."""
NOTE: Final = "/etc/bench-release"
"""A file that differs in some of the releases, as a setting would."""


@dataclass(frozen=True)
class Update:
    """Installed packages of one source package that the first suite has in an older version.

    archive_bytes is what their newer archives take together. is_early: one is among the
    packages that every root starts from, and those cannot be held back.
    """

    source: str
    packages: tuple[str, ...]
    archive_bytes: int
    is_early: bool
    text: str

    @property
    def is_kernel(self) -> bool:
        return any(package.startswith("linux-image-") for package in self.packages)


@dataclass(frozen=True)
class Step:
    """One release: its recipe, and in words what is new in it."""

    recipe: Recipe
    text: str


def updates_of(recipe: Recipe, installed: Iterable[str]) -> list[Update]:
    """Return what is newer in the recipe's other suites than in its first, by source package."""
    first = recipe.mirrors[0].suite
    found: dict[str, list[tuple[str, str, str, int]]] = {}
    for name, (newest, older) in _versions(installed, first).items():
        if older is not None and older != newest:
            source, size = _about(name, newest)
            found.setdefault(source, []).append((name, older, newest, size))
    early = _essential()
    return [
        Update(
            source,
            tuple(name for name, *_ in packages),
            sum(size for *_, size in packages),
            any(name in early for name, *_ in packages),
            f"{source} {packages[0][1]} to {packages[0][2]}",
        )
        for source, packages in sorted(found.items())
    ]


def small_update(updates: Sequence[Update]) -> Update:
    """Return the smallest update of a single package that can be held back, not the kernel's."""
    single = [
        one for one in updates if len(one.packages) == 1 and not one.is_kernel and not one.is_early
    ]
    if not single:
        raise Unavailable(
            "no single package has an update",
            expected="a package whose version differs between the recipe's suites",
            hint="is this machine's apt set up for all of them, and was apt-get update run?",
        )
    return min(single, key=lambda one: one.archive_bytes)


def history(recipe: Recipe, updates: Sequence[Update]) -> list[Step]:
    """Return ten releases: the first knows no updates, the last has all, the small one last."""
    small = small_update(updates)
    early = [one for one in updates if one.is_early]
    middle = [one for one in updates if one is not small and not one.is_early]
    slots = [middle[number :: STEPS - 2] for number in range(STEPS - 2)]
    steps = [Step(replace(recipe, mirrors=recipe.mirrors[:1]), "the first suite alone")]
    held = [one for one in updates if not one.is_early]
    changed = recipe
    for number, batch in enumerate([early, *slots, [small]]):
        held = [one for one in held if one not in batch]
        text = ", ".join(one.text for one in batch)
        if not batch and ADDED_PACKAGE not in changed.packages:
            changed, text = changed.with_packages(ADDED_PACKAGE), f"{ADDED_PACKAGE} added"
        elif not batch:
            changed, text = _with_note(changed, number), "a setting"
        steps.append(Step(_holding(changed, held), text))
    return steps


def _holding(recipe: Recipe, updates: Iterable[Update]) -> Recipe:
    """Return the recipe with these packages as its first suite has them."""
    suite = recipe.mirrors[0].suite
    for update in updates:
        if update.is_kernel:
            # The arguments are listed by the kernel's plain name.
            recipe = replace(
                recipe,
                kernel=f"{recipe.kernel}/{suite}",
                kernel_arguments=recipe.arguments,
                kernel_arguments_for=(),
            )
        else:
            recipe = recipe.with_packages(*(f"{name}/{suite}" for name in update.packages))
    return recipe


def _with_note(recipe: Recipe, number: int) -> Recipe:
    return replace(recipe, files=(*recipe.files, RecipeFile(NOTE, f"setting {number}\n")))


def _versions(names: Iterable[str], suite: str) -> Mapping[str, tuple[str, str | None]]:
    """Return {package: (newest version, the suite's newest version)} by this machine's apt."""
    found: dict[str, tuple[str, str | None]] = {}
    for line in _apt("madison", *sorted(names)).splitlines():
        # apt-cache(8), madison: package | version | address suite/component architecture Packages
        name, version, source = (part.strip() for part in line.split("|"))
        newest, older = found.get(name, (version, None))
        if older is None and source.split()[1].split("/")[0] == suite:
            older = version
        found[name] = (newest, older)
    return found


def _about(name: str, version: str) -> tuple[str, int]:
    """Return the source package of a package, and the bytes of its archive."""
    fields = dict(
        line.split(": ", 1)
        for line in _apt("show", f"{name}={version}").split("\n\n")[0].splitlines()
        if ": " in line and not line.startswith(" ")
    )
    return fields.get("Source", name).split(" ")[0], int(fields["Size"])


def _essential() -> set[str]:
    """Return the packages that a root is begun with: the essential ones, apt, what they need."""
    names = {"apt"}
    for paragraph in _apt("dumpavail").split("\n\n"):
        if "\nEssential: yes" in paragraph:
            names.add(paragraph.split("\n", 1)[0].removeprefix("Package: "))
    listed = _apt("depends", "--recurse", "--important", *sorted(names))
    return {line for line in listed.splitlines() if not line.startswith(" ")}


def _apt(*words: str) -> str:
    done = subprocess.run(
        ["apt-cache", *words], capture_output=True, text=True, check=True, timeout=APT_LIMIT_S
    )
    return done.stdout
