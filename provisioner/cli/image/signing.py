"""`image sign` and `image keys`: who vouches for releases, and whom this site believes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from provisioner.errors import RequestError

from ..lazy import SuggestingGroup
from ..output import output_option, show, show_one
from ..site import ACTOR, config_option, opened

if TYPE_CHECKING:
    from provisioner.release_keys import ReleaseKey
    from provisioner.settings import Settings

COLUMNS: Final = ("id", "is_in_use")
KEY_BYTES_MAX: Final = 65536


@click.command()
@click.argument("release")
@click.option(
    "--key-file",
    "--key",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="Another private key (Ed25519, PEM) instead of the site's own; it must be trusted here.",
)
@config_option
@output_option
def sign(release: str, key_file: Path | None, config: Path | None, output: str) -> None:
    """Add a signature to RELEASE; those that it has stay.

    A channel may ask for several: releases.channels in the configuration.

    \b
      provisioner image sign web@2026.11.2 --key-file /media/usb/second.key
    """
    with opened(config) as site:
        digest = site.digest_of(release)
        manifest = site.publisher(key_file).sign(digest)
        signers = list(site.service.releases.signed(digest, actor=ACTOR))
    show_one({"name": manifest.name, "digest": digest, "signed_by": signers}, output)


@click.group(cls=SuggestingGroup)
def keys() -> None:
    """Show and change the keys that releases are trusted by."""


@keys.command("list")
@config_option
@output_option
def list_(config: Path | None, output: str) -> None:
    """List the trusted keys; the one in use signs what this site publishes.

    \b
      provisioner image keys list
    """
    from provisioner.release_keys import trusted_keys

    rows = [_row(key) for key in trusted_keys(_settings(config).keys.folder)]
    show(rows, COLUMNS, output, wide_columns=["public_hex"])


@keys.command("new")
@config_option
@output_option
def new(config: Path | None, output: str) -> None:
    """Make a new signing key and put it to use; the present one stays trusted.

    Build a new ramdisk before publishing with it: hosts believe the keys in their ramdisk.

    \b
      provisioner image keys new
      provisioner ramdisk build
    """
    from provisioner.release_keys import new_release_key

    show_one(_row(new_release_key(_settings(config).keys.folder)), output, name="id")
    _remind_of_the_ramdisk()


@keys.command("trust")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@config_option
@output_option
def trust(file: Path, config: Path | None, output: str) -> None:
    """Trust the public keys in FILE (Ed25519, PEM), such as another site's keys/release.pub.

    \b
      provisioner image keys trust second.pub
    """
    from provisioner.release_keys import parse, trust_key

    folder = _settings(config).keys.folder
    text = _text_of(file)
    # A private key is refused by who would trust it, with what to do instead.
    given = [text] if "PRIVATE KEY" in text else [key.pem for key in parse(text)]
    show([_row(trust_key(folder, pem)) for pem in given], COLUMNS, output)
    _remind_of_the_ramdisk()


@keys.command("drop")
@click.argument("key_id", metavar="ID")
@config_option
@output_option
def drop(key_id: str, config: Path | None, output: str) -> None:
    """Trust a key no more, named by its id or eight digits or more of its start.

    Its signatures then count for nothing, on releases that are published already, too.

    \b
      provisioner image keys drop 3f9a1c04
    """
    from provisioner.release_keys import drop_key

    settings = _settings(config)
    rules = settings.releases.channels
    needed = max([settings.releases.threshold, *(rule.threshold for rule in rules)])
    show_one(_row(drop_key(settings.keys.folder, key_id, needed=needed)), output, name="id")
    _remind_of_the_ramdisk()


def _settings(config: Path | None) -> Settings:
    from provisioner.settings import find_settings

    return find_settings(config)


def _text_of(file: Path) -> str:
    """Return what a file of keys holds. Raises RequestError for what is none."""
    try:
        with file.open("rb") as source:
            text = source.read(KEY_BYTES_MAX).decode("ascii", "replace")
    except OSError as error:
        raise RequestError(f"cannot read {file}: {error.strerror}") from error
    if "-----BEGIN " not in text:
        raise RequestError(f"{file} holds no key", expected="public keys in PEM")
    return text


def _row(key: ReleaseKey) -> dict[str, Any]:
    return {"id": key.id, "is_in_use": key.is_in_use, "public_hex": key.public_hex}


def _remind_of_the_ramdisk() -> None:
    click.echo(
        "hosts believe the keys in their ramdisk: provisioner ramdisk build; "
        "a running service reads them at its next start",
        err=True,
    )
