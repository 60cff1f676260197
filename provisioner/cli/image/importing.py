"""`image import`: publish what was made elsewhere: a disk image, or a release of another site."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from provisioner.errors import RequestError

from ..output import output_option
from ..site import OpenSite, cache_option, config_option, opened
from ..stages import Stages
from ..termination import ended_by_sigterm
from .publishing import Bounds, bound_options, bounds_of, settled, show_published

if TYPE_CHECKING:
    from provisioner.core.manifest import Manifest
    from provisioner.imaging.importer import ImportRequest

RELEASE: Final = "release"
FIRMWARE: Final = ("bios", "uefi", "secure-boot")


@click.command("import")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "--format",
    "kind",
    required=True,
    type=click.Choice(["raw", "qcow2", RELEASE]),
    help="What FILE is; never guessed. `release` is what `image export` wrote.",
)
@click.option("--image", "name", metavar="NAME", help="The image's name; a release has its own.")
@click.option("--version", help="The new version, such as 2026.11.1; a release has its own.")
@click.option(
    "--release-id", metavar="HEX", help="The id in the image, where it cannot be read from outside."
)
@click.option(
    "--firmware",
    multiple=True,
    type=click.Choice(FIRMWARE),
    help="What the image boots on, where that cannot be read from its partitions and packages; "
    "may be given several times, and then this alone counts.",
)
@bound_options
@cache_option
@config_option
@output_option
def import_(
    file: Path,
    kind: str,
    name: str | None,
    version: str | None,
    release_id: str | None,
    firmware: tuple[str, ...],
    expires_at: str | None,
    expires_in: str | None,
    minimum_version: str | None,
    cache: Path,
    config: Path | None,
    output: str,
) -> None:
    """Publish a whole-disk image that something else built, or a release from another site.

    A release keeps its name, digest and signatures, and is refused unless a key that is
    trusted here has signed it.

    \b
      provisioner image import disk.qcow2 --format qcow2 --image web --version 2026.11.1
      provisioner image import web.release --format release
    """
    from provisioner.imaging.importer import ImportRequest

    given = {"--image": name, "--version": version}
    further = {"--release-id": release_id, "--firmware": ", ".join(firmware)}
    further |= {"--expires-at": expires_at, "--expires-in": expires_in}
    further["--minimum-version"] = minimum_version
    _check_options(kind, given, further)
    wanted = f"{name}@{version}"
    bounds = bounds_of(wanted, expires_at, expires_in, minimum_version, now=datetime.now(UTC))
    with ended_by_sigterm(), opened(config) as site, Stages() as stages:
        if kind == RELEASE:
            published = _take_over(site, file, stages)
        else:
            assert name is not None
            assert version is not None
            request = ImportRequest(
                file, kind, name, version, release_id=release_id, firmware=firmware
            )
            bounds = settled(site, wanted, bounds)
            published = _publish(site, request, bounds, cache / "images", stages)
    show_published(published, output)


def _check_options(
    kind: str, needed: dict[str, str | None], further: dict[str, str | None]
) -> None:
    """Raise RequestError for what is missing, or contradicts the file."""
    if kind == RELEASE:
        said = [option for option, value in {**needed, **further}.items() if value]
        if said:
            raise RequestError(
                "a release brings its own name, version and bounds",
                expected="--format release alone",
                found=", ".join(said),
            )
    elif missing := [option for option, value in needed.items() if not value]:
        raise RequestError(
            f"a {kind} image does not say what it is", expected=" and ".join(missing)
        )


def _take_over(site: OpenSite, file: Path, stages: Stages) -> Manifest:
    from provisioner.imaging.bundle import import_release

    stages.say(f"importing {file.name}")
    return import_release(site.archive, file, site.registrar(), stages.progress)


def _publish(
    site: OpenSite, request: ImportRequest, bounds: Bounds, work: Path, stages: Stages
) -> Manifest:
    from provisioner.imaging.importer import imported_image

    publisher = site.publisher()
    publisher.archive.wait_for_others()
    with imported_image(request, work=work, now=datetime.now(UTC)) as imported:
        stages.say(f"publishing {request.image}@{request.version}")
        return publisher.publish(imported.raw, bounds.added_to(imported.facts), stages.progress)
