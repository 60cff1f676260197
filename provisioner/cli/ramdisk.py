"""`provisioner ramdisk`: builds the deploy ramdisk of a site, and shows those there are."""

from pathlib import Path

import click

from .output import output_option, show, show_one
from .site import config_option, default_cache, opened, usable_folder

COLUMNS = ("digest", "kernel_package", "kernel_version", "size_bytes")


@click.group()
def ramdisk() -> None:
    """Build and show deploy ramdisks."""


@ramdisk.command()
@config_option
@click.option(
    "--kernel",
    default="linux-image-amd64",
    show_default=True,
    metavar="PACKAGE",
    help="Debian's kernel package; linux-image-cloud-amd64 is smaller and for virtual hosts.",
)
@click.option(
    "--cache",
    type=click.Path(path_type=Path, file_okay=False),
    default=default_cache,
    callback=usable_folder,
    show_default="$XDG_CACHE_HOME/provisioner",
    metavar="DIR",
    help="Where the part that is the same for every site is kept.",
)
@click.option("--refresh", is_flag=True, help="Fetch the packages of today, whatever is cached.")
@output_option
def build(config: Path | None, kernel: str, cache: Path, refresh: bool, output: str) -> None:
    """Build the ramdisk with this site's keys, for new operations to boot.

    It believes the keys, thresholds and minimum versions of today: build it anew when they
    change.

    \b
      provisioner ramdisk build
      provisioner ramdisk build --kernel linux-image-cloud-amd64
    """
    from provisioner import wiring
    from provisioner.imaging.ramdisk import Pins, about, build_base, build_ramdisk

    with opened(config) as site:
        settings = site.settings
        trust = wiring.trust_policy(settings, site.service.releases.minimum_versions())
    pins = Pins(release_trust=trust.to_bytes(), agent_ca=settings.keys.agent_tls_pem.read_bytes())
    base = build_base(kernel, cache, refresh=refresh)
    made = build_ramdisk(base, pins, settings.data_dir / "ramdisks")
    show_one(about(made.folder), output, name="digest")


@ramdisk.command("list")
@config_option
@output_option
def list_(config: Path | None, output: str) -> None:
    """List the ramdisks there are, the newest first: that one boots, unless one is pinned."""
    from provisioner.imaging.ramdisk import about, ramdisks_in
    from provisioner.settings import find_settings

    rows = [about(folder) for folder in ramdisks_in(find_settings(config).data_dir / "ramdisks")]
    show(rows, COLUMNS, output)
