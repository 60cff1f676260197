"""`image build`: from a recipe to a published release."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from provisioner.core.manifest import check_version
from provisioner.errors import ProvisionerError, RequestError

from ..output import output_option
from ..site import OpenSite, cache_option, config_option, opened
from ..stages import Stages
from ..termination import ended_by_sigterm
from .publishing import Bounds, bound_options, bounds_of, settled, show_published

if TYPE_CHECKING:
    from provisioner.core.manifest import Manifest
    from provisioner.imaging.recipe import Recipe


@click.command()
@click.argument("recipe")
@click.option("--version", required=True, help="The new version, such as 2026.11.1.")
@click.option(
    "--parent",
    metavar="RELEASE",
    help="Build on the file system of this release. [default: the image's newest]",
)
@click.option("--no-parent", is_flag=True, help="Build from nothing; hosts fetch more then.")
@click.option(
    "--kernel",
    metavar="PACKAGE",
    help="Instead of the recipe's; linux-image-cloud-amd64 starts faster, on virtual hosts only.",
)
@bound_options
@cache_option
@config_option
@output_option
def build(
    recipe: str,
    version: str,
    parent: str | None,
    no_parent: bool,
    kernel: str | None,
    expires_at: str | None,
    expires_in: str | None,
    minimum_version: str | None,
    cache: Path,
    config: Path | None,
    output: str,
) -> None:
    """Build an image from RECIPE, a name such as debian-12 or a path, and publish it.

    It is built on its parent, so that files that stay the same stay where they are on the
    disk, and hosts fetch only what changed; the files are those of a build from nothing. A
    build that fails leaves nothing behind but its log.

    \b
      provisioner image build debian-12 --version 2026.11.1
      provisioner image build debian-12-web --version 2026.11.2 --expires-in 90d
      provisioner image build ./recipes/db --version 7 --parent db:stable
    """
    from provisioner.imaging.recipe import find_recipe, load_recipe

    if parent and no_parent:
        raise RequestError("--parent and --no-parent contradict each other")
    check_version(version)
    source = find_recipe(recipe)
    loaded = load_recipe(source)
    loaded = loaded.with_kernel(kernel) if kernel else loaded
    name = f"{loaded.image}@{version}"
    bounds = bounds_of(name, expires_at, expires_in, minimum_version, now=datetime.now(UTC))
    with ended_by_sigterm(), opened(config) as site, Stages() as stages:
        wanted = Wanted(loaded, source, version, settled(site, name, bounds))
        base = None if no_parent else _parent(site, loaded, parent)
        if site.archive.find(loaded.image, version):
            stages.say(f"{wanted.name} is published already; this must come out the same")
        with _logged(cache / "logs", wanted, stages):
            published = _build(site, wanted, base, cache / "images", stages)
    show_published(published, output)


@dataclass(frozen=True)
class Wanted:
    """What to build: a recipe and where it was read from, and what the options say."""

    recipe: Recipe
    source: Path
    version: str
    bounds: Bounds

    @property
    def name(self) -> str:
        return f"{self.recipe.image}@{self.version}"


def _parent(site: OpenSite, recipe: Recipe, reference: str | None) -> Manifest | None:
    """Return the release to build on: the one named, or else the image's newest that fits."""
    from provisioner.imaging.parent import choose_parent

    if reference is not None:
        return site.archive.load(site.digest_of(reference))
    revoked = [row.digest for row in site.service.releases.list() if row.revoked_at]
    return choose_parent(recipe, site.archive.releases(), revoked)


def _build(
    site: OpenSite, wanted: Wanted, parent: Manifest | None, cache: Path, stages: Stages
) -> Manifest:
    """Build and publish, opening what publishing needs before any work."""
    from provisioner.imaging.build import built_image
    from provisioner.imaging.parent import parent_of

    def fetching(_phase: str, done_bytes: int, total_bytes: int) -> None:
        stages.progress("fetching", done_bytes, total_bytes)

    publisher = site.publisher()
    publisher.archive.wait_for_others()
    with ExitStack() as open_:
        base = None
        if parent is None:
            stages.say("no parent: this is built from nothing")
        else:
            stages.say(f"fetching the parent, {parent.name}")
            base = open_.enter_context(parent_of(site.archive, parent, cache, fetching))
        built = open_.enter_context(
            built_image(
                wanted.recipe,
                wanted.version,
                cache=cache,
                now=datetime.now(UTC),
                say=stages.say,
                parent=base,
                source=wanted.source,
            )
        )
        stages.say(f"publishing {wanted.name}")
        return publisher.publish(built.raw, wanted.bounds.added_to(built.facts), stages.progress)


@contextmanager
def _logged(folder: Path, wanted: Wanted, stages: Stages) -> Iterator[None]:
    """Keep the log of a build that fails, and say where; that of a good one is with the
    release."""
    try:
        yield
    except ProvisionerError as error:
        text = "\n".join([*stages.said, f"Error: {error.message}", str(error.found or "")])
        # A build's last words, in full.
        text += "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / f"{wanted.recipe.image}-{wanted.version}.log"
        log.write_text(text + "\n")
        click.echo(f"{wanted.name} was not built; the log is {log}", err=True)
        raise
