"""The group of commands, as a table: none of their modules is imported for its help."""

from typing import Final

import click

from ..lazy import Lazy, LazyGroup

_HERE: Final = "provisioner.cli.image"
COMMANDS: Final[dict[str, Lazy]] = {
    "build": Lazy(f"{_HERE}.making:build", "Build an image from a recipe and publish it."),
    "import": Lazy(f"{_HERE}.importing:import_", "Publish an image or a release from a file."),
    "export": Lazy(f"{_HERE}.exporting:export", "Write a release into one file."),
    "list": Lazy(f"{_HERE}.reading:list_", "List all releases."),
    "show": Lazy(f"{_HERE}.reading:show_", "Show a release, and what belongs to it."),
    "diff": Lazy(f"{_HERE}.comparing:diff", "Say how two releases differ."),
    "test": Lazy(f"{_HERE}.testing:test", "Boot a release in the lab, and keep the result."),
    "promote": Lazy(f"{_HERE}.channels:promote", "Move a channel to a release."),
    "channels": Lazy(f"{_HERE}.channels:channels", "List channels and where they point."),
    "revoke": Lazy(f"{_HERE}.channels:revoke", "Stop every deployment of a release."),
    "verify": Lazy(f"{_HERE}.keeping:verify", "Check all bytes of releases."),
    "gc": Lazy(f"{_HERE}.keeping:gc", "Remove releases that nothing refers to."),
    "sign": Lazy(f"{_HERE}.signing:sign", "Add a signature to a release."),
    "keys": Lazy(f"{_HERE}.signing:keys", "Show and change the keys that releases are trusted by."),
}


@click.group(cls=LazyGroup, table=COMMANDS)
def image() -> None:
    """Build, test, move and remove releases of images."""
