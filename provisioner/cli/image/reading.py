"""`image list` and `image show`: releases as the service knows them."""

from typing import TYPE_CHECKING, Any, Final

import click

from ..connection import connected
from ..output import output_option, show, show_one, text_of

if TYPE_CHECKING:
    from provisioner.client import Client

COLUMNS: Final = (
    *("name", "state", "channels", "size_bytes", "stored_bytes", "firmware", "published_at"),
)
WIDE_COLUMNS: Final = ("digest", "used_bytes", "release_id", "expires_at", "revoked_reason")
# What `image show` tells a person, in this order; wide tells every key.
SHOWN: Final = (
    *("name", "state", "revoked_reason", "channels", "digest", "size_bytes", "used_bytes"),
    *("stored_bytes", "firmware", "architecture", "parent", "recipe_digest", "source_commit"),
    *("builder", "built_at", "published_at", "minimum_version", "expires_at", "package_count"),
    *("attachments", "signed_by", "tested"),
)
# Told only where there is one.
NOT_WHEN_EMPTY: Final = frozenset(
    {"revoked_reason", "minimum_version", "expires_at", "source_commit"}
)


@click.command("list")
@click.option("--image", "name", metavar="NAME", help="Releases of this image only.")
@click.option("--removed", is_flag=True, help="Those that `image gc` removed, too.")
@output_option
@connected
def list_(client: "Client", name: str | None, removed: bool, output: str) -> None:
    """List all releases, with the channels that point to them.

    \b
      provisioner image list
      provisioner image list --image web -o wide
    """
    found = client.releases(with_removed=removed)
    rows = [_row(one) for one in found if name in (None, one["image"])]
    show(rows, COLUMNS, output, wide_columns=WIDE_COLUMNS)


@click.command("show")
@click.argument("release")
@click.option("--log", "part", flag_value="log", help="Print the log of its build instead.")
@click.option("--files", "part", flag_value="files", help="Print its list of files (JSON).")
@click.option("--spdx", "part", flag_value="spdx", help="Print its SPDX list of packages (JSON).")
@output_option
@connected
def show_(client: "Client", release: str, part: str | None, output: str) -> None:
    """Show RELEASE: who built it from what, who signed it, how its tests went.

    RELEASE is IMAGE@VERSION, IMAGE:CHANNEL, or the start of a digest; -o json and yaml hold
    the packages, too.

    \b
      provisioner image show web@2026.11.2
      provisioner image show web:stable --log
      provisioner image show web:stable --spdx > web.spdx.json
    """
    if part is not None:
        for block in client.release_part(release, part):
            click.echo(block, nl=False)
        return
    shown = _row(client.release(release))
    show_one(_told(shown) if output == "table" else shown, output)


def _row(release: dict[str, Any]) -> dict[str, Any]:
    """Return the release with its name first, and in one word whether it may be deployed."""
    return {"name": release["name"], "state": _state(release), **release}


def _state(release: dict[str, Any]) -> str:
    if release["removed_at"]:
        return "removed"
    return "revoked" if release["revoked_at"] else "published"


def _told(release: dict[str, Any]) -> dict[str, Any]:
    """Return what a person wants to know of a release, in lines that are not too long."""
    record = release["record"]
    told = {
        **release,
        "parent": (record.get("parent") or {}).get("name") or release["parent"],
        "source_commit": _commit(record.get("source")),
        "package_count": len(release["packages"]),
        "attachments": sorted(release["attachments"]),
        "tested": [_outcome(test) for test in release["tests"]],
    }
    return {key: told[key] for key in SHOWN if told[key] or key not in NOT_WHEN_EMPTY}


def _commit(source: dict[str, Any] | None) -> str | None:
    if not source:
        return None
    return f"{source['commit']}{', with changes' if source['is_changed'] else ''}"


def _outcome(test: dict[str, Any]) -> str:
    word = "healthy" if test["is_healthy"] else "not healthy"
    where = f"on {'+'.join(test['firmware'])} with profile {test['profile']}"
    return f"{word} {where} at {text_of('at', test['at'])}"
