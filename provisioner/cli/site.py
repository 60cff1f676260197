"""What commands at the service's machine share: its configuration, its archive, its store."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

if TYPE_CHECKING:
    from provisioner.imaging.archive import Archive
    from provisioner.imaging.publish import Publisher, Register
    from provisioner.settings import Settings
    from provisioner.wiring import Service

ACTOR: Final = "cli"
F = TypeVar("F", bound=Callable[..., Any])


def default_cache() -> Path:
    """Return where what is slow to make is kept: $XDG_CACHE_HOME/provisioner."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "provisioner"


def config_option(command: F) -> F:
    """Add `--config`: the command works with the site's own files, at its machine."""
    option = click.option(
        "--config",
        envvar="PROVISIONER_CONFIG",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="The configuration, or its folder; this works at its machine.  "
        "[default: ./provisioner.toml, then /etc/provisioner]",
    )
    return option(command)


def usable_folder(_context: click.Context, _option: click.Parameter, folder: Path) -> Path:
    """Return a folder of an option that exists or can be made; refuse it before any work."""
    absolute = folder.absolute()
    there = next(one for one in (absolute, *absolute.parents) if os.path.exists(one))
    if not os.path.isdir(there) or not os.access(there, os.W_OK | os.X_OK):
        raise click.BadParameter(f"no folder can be written at {folder}")
    return folder


def cache_option(command: F) -> F:
    """Add `--cache`: the command makes something large on the way."""
    option = click.option(
        "--cache",
        type=click.Path(path_type=Path, file_okay=False),
        default=default_cache,
        callback=usable_folder,
        show_default="$XDG_CACHE_HOME/provisioner",
        metavar="DIR",
        help="Where packages and base trees are kept, and images put together.",
    )
    return option(command)


@dataclass(frozen=True)
class OpenSite:
    """The site's use cases and its archive, while a command runs."""

    settings: Settings
    service: Service

    @property
    def archive(self) -> Archive:
        return self.service.archive

    def digest_of(self, reference: str) -> str:
        """Return the digest of IMAGE@VERSION, IMAGE:CHANNEL or the start of a digest."""
        return self.service.releases.show(reference).digest

    def publisher(self, key_file: Path | None = None) -> Publisher:
        """Return what publishes with the site's signing key, or with that in a file."""
        from provisioner import wiring

        return wiring.publisher(self.settings, self.service, actor=ACTOR, key_file=key_file)

    def registrar(self) -> Register:
        """Return what makes a release known that came with its signatures."""
        from provisioner import wiring

        return wiring.registrar(self.service, actor=ACTOR)


@contextmanager
def opened(config: Path | None) -> Iterator[OpenSite]:
    """Yield the site of a configuration, its database at the newest schema."""
    from provisioner import wiring
    from provisioner.settings import find_settings

    settings = find_settings(config)
    # A first image may be published before the service has ever run.
    wiring.prepare(settings)
    service = wiring.build(settings)
    try:
        yield OpenSite(settings, service)
    finally:
        service.close()
