"""`image verify` and `image gc`: whether the archive is sound, and what it need not keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from provisioner.errors import RequestError, TrustError

from ..output import output_option, show, size
from ..site import ACTOR, OpenSite, config_option, opened
from ..stages import Stages

if TYPE_CHECKING:
    from provisioner.core.model import ReleaseRow
    from provisioner.imaging.garbage import Collected


@click.command()
@click.argument("releases", nargs=-1, metavar="RELEASE...")
@click.option("--all", "is_all", is_flag=True, help="Every release of the archive or the database.")
@config_option
@output_option
def verify(releases: tuple[str, ...], is_all: bool, config: Path | None, output: str) -> int:
    """Compare all bytes of releases with what was signed, and list what is wrong.

    Reads manifests, signatures, attachments and every chunk; changes nothing. Ends with exit
    code 5 when something is wrong.

    \b
      provisioner image verify web:stable
      provisioner image verify --all
    """
    from provisioner.imaging.verify import verify_release

    if bool(releases) == is_all:
        raise RequestError(
            "no release is named" if not releases else "releases are named beside --all",
            expected="some releases, or --all",
            hint="an empty selection selects nothing",
        )
    with opened(config) as site, Stages() as stages:
        names = {row.digest: row.name for row in site.service.releases.list()}
        # One whose manifest is gone is none that the archive could list.
        everything = sorted({*names, *site.archive.digests()}) if is_all else []
        digests = everything or [site.digest_of(one) for one in releases]
        problems = []
        for number, digest in enumerate(digests, 1):
            name = names.get(digest, digest[:12])
            stages.say(f"{name} ({number} of {len(digests)})")
            found = verify_release(site.archive, digest, stages.progress)
            problems += [replace(one, release=names.get(one.release, one.release)) for one in found]
    if problems or output not in ("table", "wide"):
        show([asdict(one) for one in problems], ["release", "what", "found"], output)
    told = f"{_counted(len(digests), 'release')} checked, {_counted(len(problems), 'problem')}"
    click.echo(told, err=True)
    return TrustError.exit_code if problems else 0


def _counted(count: int, what: str) -> str:
    return f"{count or 'no'} {what}{'' if count == 1 else 's'}"


@click.command()
@click.option(
    "--keep",
    type=click.IntRange(1, 1000),
    metavar="N",
    help="How many of the newest releases of each image stay. [default: releases.keep_newest]",
)
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@config_option
@output_option
def gc(keep: int | None, dry_run: bool, config: Path | None, output: str) -> None:
    """Remove releases that nothing refers to, and the bytes that only they needed.

    Kept are the newest ones of each image, every release that a host runs or ran last, that a
    channel points to or that an operation uses, and whatever is younger than the grace period.

    \b
      provisioner image gc --dry-run
      provisioner image gc --keep 5
    """
    with opened(config) as site:
        rows, found = planned(site, keep) if dry_run else given_up(site, keep)
    names = {row.digest: row.name for row in rows}
    shown = [
        {"name": names.get(digest, "unregistered"), "digest": digest} for digest in found.releases
    ]
    if shown or output not in ("table", "wide"):
        show(shown, ["name", "digest"], output)
    freed = f"{size(found.freed_bytes)} in {found.chunks} chunks"
    what = f"{_counted(len(shown), 'release')} and {freed}" if shown or found.chunks else "nothing"
    click.echo(f"{what} would go" if dry_run else f"removed {what}", err=True)


def planned(site: OpenSite, keep: int | None) -> tuple[Sequence[ReleaseRow], Collected]:
    """Return which releases would go, and what with them."""
    from provisioner.imaging.garbage import collect

    releases = site.service.releases
    rows = releases.unused(keep_newest=keep)
    going = {row.digest for row in rows}
    return rows, collect(site.archive, lambda: releases.kept() - going, dry_run=True)


def given_up(site: OpenSite, keep: int | None) -> tuple[Sequence[ReleaseRow], Collected]:
    """Give up the releases that nothing refers to; return them, and what went with them."""
    from provisioner.imaging.garbage import collect

    releases = site.service.releases
    rows: list[ReleaseRow] = []

    def kept() -> set[str]:
        # With the archive's lock held: who cannot remove the bytes gives up no release.
        rows.extend(releases.remove_unused(actor=ACTOR, keep_newest=keep))
        return releases.kept()

    return rows, collect(site.archive, kept)
