"""`provisioner image`: builds and imports images on the service's machine, and shows releases."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from .connection import connected
from .lazy import SuggestingGroup
from .output import output_option, show, show_one
from .ramdisk import default_cache

if TYPE_CHECKING:
    from provisioner.client import Client
    from provisioner.core.manifest import Manifest
    from provisioner.imaging.build import BuiltImage

COLUMNS: Final = ("name", "digest", "size_bytes", "stored_bytes", "firmware", "published_at")
WIDE_COLUMNS: Final = ("used_bytes", "release_id")
QUARTERS: Final = 4


def _on_the_spot(command: Any) -> Any:
    """Add the options of commands that publish: they need the site's signing key."""
    options = [
        click.option(
            "--config",
            envvar="PROVISIONER_CONFIG",
            type=click.Path(path_type=Path),
            default="provisioner.toml",
            show_default=True,
            metavar="FILE",
            help="The configuration that `provisioner init` wrote.",
        ),
        click.option(
            "--cache",
            type=click.Path(path_type=Path, file_okay=False),
            default=default_cache,
            show_default="$XDG_CACHE_HOME/provisioner",
            metavar="DIR",
            help="Where packages and base trees are kept, and images put together.",
        ),
        output_option,
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.group(cls=SuggestingGroup)
def image() -> None:
    """Build, import and show releases of images."""


@image.command()
@click.argument("recipe")
@click.option("--version", required=True, help="The new version, such as 2026.11.1.")
@click.option(
    "--kernel",
    metavar="PACKAGE",
    help="Instead of the recipe's; linux-image-cloud-amd64 starts faster, on virtual hosts only.",
)
@_on_the_spot
def build(
    recipe: str, version: str, kernel: str | None, config: Path, cache: Path, output: str
) -> None:
    """Build an image from RECIPE, a name such as debian-12 or a path, and publish it."""
    from datetime import UTC, datetime

    from provisioner.imaging.build import built_image
    from provisioner.imaging.recipe import find_recipe, load_recipe

    loaded = load_recipe(find_recipe(recipe))
    loaded = loaded.with_kernel(kernel) if kernel else loaded
    with (
        _publisher(config) as publish,
        built_image(
            loaded, version, cache=cache / "images", now=datetime.now(UTC), say=_say
        ) as built,
    ):
        _show_published(publish(built), output)


@image.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "kind",
    required=True,
    type=click.Choice(["raw", "qcow2"]),
    help="What FILE is; never guessed.",
)
@click.option("--image", "name", required=True, metavar="NAME", help="The image's name.")
@click.option("--version", required=True, help="The new version, such as 2026.11.1.")
@click.option(
    "--release-id", metavar="HEX", help="The id in the image, where it cannot be read from outside."
)
@_on_the_spot
def import_(
    file: Path,
    kind: str,
    name: str,
    version: str,
    release_id: str | None,
    config: Path,
    cache: Path,
    output: str,
) -> None:
    """Publish a whole-disk image that something else built."""
    from datetime import UTC, datetime

    from provisioner.imaging.importer import ImportRequest, imported_image

    request = ImportRequest(file, kind, name, version, release_id=release_id)
    work = cache / "images"
    with (
        _publisher(config) as publish,
        imported_image(request, work=work, now=datetime.now(UTC)) as imported,
    ):
        _show_published(publish(imported), output)


@image.command("list")
@output_option
@connected
def list_(client: "Client", output: str) -> None:
    """List all releases."""
    show(
        [_row(release) for release in client.releases()], COLUMNS, output, wide_columns=WIDE_COLUMNS
    )


@image.command("show")
@click.argument("release")
@output_option
@connected
def show_(client: "Client", release: str, output: str) -> None:
    """Show a release, named IMAGE@VERSION or by its digest."""
    show_one(_row(client.release(release)), output, hidden=("manifest", "chunks", "packages"))


@contextmanager
def _publisher(config: Path) -> Iterator[Callable[["BuiltImage"], "Manifest"]]:
    """Yield what publishes a built image at this site, opening the site before any work."""
    from provisioner import wiring
    from provisioner.settings import load

    settings = load(config)
    # A first image may be published before the service has ever run.
    wiring.prepare(settings)
    service = wiring.build(settings)
    try:
        publisher = wiring.publisher(settings, service, actor="cli")

        def publish(built: "BuiltImage") -> "Manifest":
            _say(f"publishing {built.facts.image}@{built.facts.version}")
            return publisher.publish(built.raw, built.facts, progress=_Quarters())

        yield publish
    finally:
        service.close()


class _Quarters:
    """Says each quarter of a long way, once."""

    def __init__(self) -> None:
        self._said = 0

    def __call__(self, phase: str, done_bytes: int, total_bytes: int) -> None:
        quarter = done_bytes * QUARTERS // total_bytes
        if quarter > self._said:
            self._said = quarter
            _say(f"{phase}: {quarter * 100 // QUARTERS} %")


def _show_published(manifest: "Manifest", output: str) -> None:
    row = {
        "name": manifest.name,
        "digest": manifest.digest,
        "size_bytes": manifest.size_bytes,
        "used_bytes": manifest.used_bytes,
        "stored_bytes": manifest.stored_bytes,
        "firmware": list(manifest.firmware),
        "release_id": manifest.release_id,
    }
    show_one(row, output)


def _row(release: dict[str, Any]) -> dict[str, Any]:
    """Return the release with its name first, whatever the service calls it."""
    return {"name": f"{release['image']}@{release['version']}", **release}


def _say(line: str) -> None:
    """Tell what is going on, where it does not mix with the result."""
    click.echo(line, err=True)
