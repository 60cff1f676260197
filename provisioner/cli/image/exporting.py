"""`image export`: a release as one file, for a site without a connection."""

from __future__ import annotations

import os
from pathlib import Path

import click

from provisioner.errors import RequestError

from ..output import size
from ..site import config_option, opened
from ..stages import Stages
from ..termination import ended_by_sigterm


@click.command()
@click.argument("release")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@config_option
def export(release: str, file: Path, config: Path | None) -> None:
    """Write RELEASE, with its signatures, into a new FILE, checking every byte on the way.

    FILE appears whole or not at all, and is never replaced. The other site trusts it by its
    signatures: give it the public key, too, when it does not know it yet.

    \b
      provisioner image export web@2026.11.2 web-2026.11.2.release
      provisioner image import web-2026.11.2.release --format release
    """
    from provisioner.imaging.bundle import export_release

    check_new_file(file)
    with ended_by_sigterm(), opened(config) as site, Stages() as stages:
        digest = site.digest_of(release)
        manifest = export_release(site.archive, digest, file, stages.progress)
    click.echo(f"{manifest.name} is in {file} ({size(file.stat().st_size)})")


def check_new_file(file: Path) -> None:
    """Raise RequestError unless a file can be made there, before anything is read for it."""
    folder = file.absolute().parent
    if not os.path.isdir(folder):
        raise RequestError(f"{file} cannot be written", expected=f"a folder {folder}", found="none")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise RequestError(f"{file} cannot be written", expected=f"write access to {folder}")
