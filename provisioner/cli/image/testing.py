"""`image test`: boots a release in the lab, and keeps the result with it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from provisioner.errors import DeviceError

from ..messages import clean
from ..output import output_option, show
from ..site import ACTOR, OpenSite, cache_option, config_option, opened
from ..stages import Stages
from ..termination import ended_by_sigterm
from ..watch import show_ended, until_final

if TYPE_CHECKING:
    from provisioner.core.manifest import Manifest
    from provisioner.core.model import ReleaseTest
    from provisioner.lab.trial import Trial
    from provisioner.service.releases import Releases

LAB_PROFILE: Final = "lab"
CONSOLE_LINES: Final = 15
# How a console moves its cursor, which a log has no use for.
_ESCAPES: Final = re.compile(r"\x1b(\[[0-9;?=]*[A-Za-z]|c)")
_KEPT_OF_A_HOST: Final = ("phase", "phase_seconds", "error")


@dataclass(frozen=True)
class Wanted:
    """What to try: the release, on which firmware, with whose checks (None: the lab's)."""

    manifest: Manifest
    firmware: tuple[str, ...]
    profile_name: str
    profile: dict[str, Any] | None


@click.command()
@click.argument("release")
@click.option(
    "--profile", metavar="NAME", help="Try with this profile's cloud-config and health checks."
)
@click.option(
    "--firmware",
    multiple=True,
    type=click.Choice(["bios", "uefi", "secure-boot"]),
    help="May be given several times.  [default: all that the release boots on]",
)
@click.option("--keep", is_flag=True, help="Leave the rack running, to look around.")
@cache_option
@config_option
@output_option
def test(
    release: str,
    profile: str | None,
    firmware: tuple[str, ...],
    keep: bool,
    cache: Path,
    config: Path | None,
    output: str,
) -> int:
    """Deploy RELEASE to virtual hosts, run the checks, and keep the result with the release.

    A rack with one host for each firmware comes up beside a temporary service, which trusts
    the same keys and serves the same bytes; network and disk are the rack's own. Ends with 0
    when every host proved itself healthy and with 4 otherwise; each firmware's result is kept
    by itself, and a channel may ask for them (releases.channels). Nothing is left behind.
    Needs QEMU, and root or user namespaces.

    \b
      provisioner image test web@2026.11.2
      provisioner image test web:candidate --profile web --firmware uefi
    """
    with ended_by_sigterm(), opened(config) as site:
        wanted = _wanted(site, release, profile, firmware)
        ended = _try(site, wanted, cache=cache, keep=keep)
        kept = record(site.service.releases, wanted, ended)
    if output in ("table", "wide"):
        show_ended(ended, output)
        for word, is_healthy in (("healthy", True), ("not healthy", False)):
            where = [name for one in kept if one.is_healthy is is_healthy for name in one.firmware]
            if where:
                click.echo(f"{wanted.manifest.name} is {word} on {', '.join(where)}", err=True)
    else:
        show([{"name": wanted.manifest.name, **asdict(one)} for one in kept], ["name"], output)
    return 0 if all(one.is_healthy for one in kept) else DeviceError.exit_code


def record(
    releases: Releases, wanted: Wanted, ended: Sequence[dict[str, Any]]
) -> list[ReleaseTest]:
    """Keep the result of each host, which is named by its firmware: a test of its own, so
    that what fails on one firmware says nothing of the others."""
    return [
        releases.record_test(
            wanted.manifest.digest,
            profile=wanted.profile_name,
            firmware=(one["host"],),
            is_healthy=one["phase"] == "succeeded",
            detail={"hosts": {one["host"]: _kept(one)}},
            actor=ACTOR,
        )
        for one in ended
    ]


def _wanted(site: OpenSite, release: str, profile: str | None, firmware: Sequence[str]) -> Wanted:
    manifest = site.archive.load(site.digest_of(release))
    document = None if profile is None else dict(site.service.profiles.show(profile).document)
    chosen = tuple(dict.fromkeys(firmware)) or manifest.firmware
    return Wanted(manifest, chosen, profile or LAB_PROFILE, document)


def _try(site: OpenSite, wanted: Wanted, *, cache: Path, keep: bool) -> list[dict[str, Any]]:
    """Deploy to every host of a temporary rack, and return the operations as they ended."""
    from provisioner.lab.trial import trial
    from provisioner.release_keys import trusted_keys

    trusted = [key.pem for key in trusted_keys(site.settings.keys.folder)]
    with (
        Stages() as stages,
        trial(
            site.archive,
            wanted.manifest,
            firmware=wanted.firmware,
            trusted=trusted,
            profile=wanted.profile,
            place=site.settings.data_dir / "trials",
            cache=cache,
            say=stages.say,
        ) as running,
        running.site.client() as client,
    ):
        stages.say(f"deploying {wanted.manifest.name}")
        stages.pause()
        ended = until_final(client, client.deploy(wanted.firmware, wanted.manifest.digest))
        for one in ended:
            if one["phase"] != "succeeded":
                _tell_console(running, one["host"])
        if keep:
            running.is_kept = True
            _tell_way_in(running)
    return ended


def _kept(operation: dict[str, Any]) -> dict[str, Any]:
    """Return what stays on record of one host."""
    checks = operation["evidence"].get("checks", {})
    return {**{key: operation[key] for key in _KEPT_OF_A_HOST}, "checks": checks}


def _tell_console(running: Trial, host: str) -> None:
    lines = _ESCAPES.sub("", running.lab.console(host)).splitlines()[-CONSOLE_LINES:]
    click.echo(f"the console of {host} ends with:", err=True)
    for line in lines:
        click.echo(f"  {clean(line)}", err=True)


def _tell_way_in(running: Trial) -> None:
    site = running.site
    pids = " ".join(str(process.pid) for process in site.processes)
    click.echo(f"the service: {site.api_url}, context {site.directory / 'client.toml'}", err=True)
    click.echo(
        f"take it down: kill {pids}; provisioner lab down --dir {running.lab.directory}; "
        f"rm -r {running.directory}",
        err=True,
    )
