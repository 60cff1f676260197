"""`provisioner host`: enrol, show and change hosts. Decides nothing."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from provisioner.errors import DeviceError, RequestError

from .connection import connected
from .given_files import documents_in
from .lazy import SuggestingGroup
from .messages import clean
from .output import output_option, show, show_one, show_row, tell_of_more
from .passwords import bmc_of, bmc_options, read_password

if TYPE_CHECKING:
    from provisioner.client import Client

COLUMNS = ["name", "state", "release_name", "operation.phase", "flags", "profile", "firmware"]
WIDE = ["id", "macs", "bmc.address", "local_boot", "serial", "generation", "created_at"]
EVENT_COLUMNS = ["at", "source", "text"]
HIDDEN = ["inventory"]
_LOCAL_BOOT = click.Choice(("auto", "exit", "sanboot", "404"))
_FIRMWARE = click.Choice(("bios", "uefi", "secure-boot"))
_profile_option = click.option("--profile", help="Profile that deployments of it use.")


@click.group(cls=SuggestingGroup)
def host() -> None:
    """Enrol, show and change hosts."""


@host.command("add")
@click.argument("name")
@click.option("--mac", "macs", multiple=True, required=True, help="MAC address; repeatable.")
@bmc_options
@_profile_option
@click.option(
    "--firmware",
    type=_FIRMWARE,
    help="Learnt when left out, but secure-boot has to be named: it netboots another way.",
)
@click.option(
    "--local-boot",
    type=_LOCAL_BOOT,
    default="auto",
    show_default=True,
    help="How it is told to boot its disk.",
)
@click.option("--uuid", help="Learnt from its first boot when left out.")
@click.option("--serial", help="Learnt from its first boot when left out.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="Repeatable.")
@output_option
@connected
def add(
    client: "Client",
    name: str,
    macs: tuple[str, ...],
    bmc: str | None,
    bmc_user: str | None,
    bmc_password_file: str | None,
    profile: str | None,
    firmware: str | None,
    local_boot: str,
    uuid: str | None,
    serial: str | None,
    labels: tuple[str, ...],
    output: str,
) -> None:
    """Enrol a host."""
    spec: dict[str, Any] = {
        "name": name,
        "macs": list(macs),
        "bmc": bmc_of(bmc, bmc_user, bmc_password_file, name),
        "profile": profile,
        "firmware": firmware,
        "local_boot": local_boot,
        "uuid": uuid,
        "serial": serial,
        "labels": _labels(labels),
    }
    added = client.add_host(_given(spec))
    show_row(_row(added), COLUMNS, output, wide_columns=WIDE)
    if bmc is not None:
        _warn_of_bmc(client, name)


def _warn_of_bmc(client: "Client", name: str) -> None:
    """Say when the BMC lets people in without a password. One that does not answer is no
    error: it may not be cabled yet."""
    try:
        findings = client.check_bmc(name)
    except DeviceError as error:
        click.echo(clean(f"warning: {error.message}, so far"), err=True)
        click.echo(f"  hint: provisioner host power {name} status asks it again", err=True)
        return
    for one in findings:
        click.echo(f"warning: the BMC of {name} {one['message']}", err=True)
        click.echo(f"  hint: {one['hint']}", err=True)


@host.command("import")
@click.argument("file", metavar="FILE")
@output_option
@connected
def import_(client: "Client", file: str, output: str) -> None:
    """Enrol all hosts of a YAML or JSON file, or none; - is standard input.

    The file holds a list of hosts, each with name, macs, and bmc: address, user, and
    password or password_file (relative to the file).
    """
    found = documents_in(file)
    listed = found.get("hosts") if isinstance(found, dict) else found
    if not isinstance(listed, list) or not all(isinstance(item, dict) for item in listed):
        raise RequestError(
            "the file holds no hosts", expected="a list of hosts", found=type(listed).__name__
        )
    folder = Path() if file == "-" else Path(file).parent
    added = client.import_hosts([_with_password(item, folder) for item in listed])
    show([_row(item) for item in added], COLUMNS, output, wide_columns=WIDE)
    bmcs = sum(item["bmc"] is not None for item in added)
    if bmcs:
        # Asking hundreds that may not be cabled yet would take longer than the import.
        click.echo(f"none of their {bmcs} BMCs was asked whether it answers", err=True)
        click.echo(
            "  hint: at the service, `provisioner doctor --bmcs` asks all, also who may log in",
            err=True,
        )


@host.command("list")
@output_option
@connected
def list_(client: "Client", output: str) -> None:
    """List all hosts."""
    show([_row(item) for item in client.hosts()], COLUMNS, output, wide_columns=WIDE)


@host.command("show")
@click.argument("name")
@output_option
@connected
def show_(client: "Client", name: str, output: str) -> None:
    """Show one host; -o wide adds its inventory."""
    show_one(client.host(name), output, hidden=HIDDEN)


@host.command("change")
@click.argument("name")
@_profile_option
@click.option("--firmware", type=_FIRMWARE, help="As its setup says now.")
@click.option("--local-boot", type=_LOCAL_BOOT, help="How it is told to boot its disk.")
@bmc_options
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="Replaces all.")
@output_option
@connected
def change(
    client: "Client",
    name: str,
    profile: str | None,
    firmware: str | None,
    local_boot: str | None,
    bmc: str | None,
    bmc_user: str | None,
    bmc_password_file: str | None,
    labels: tuple[str, ...],
    output: str,
) -> None:
    """Change what is given; the rest stays.

    Credentials without --bmc are for the BMC that the host has.
    """
    changes = {
        "profile": profile,
        "firmware": firmware,
        "local_boot": local_boot,
        "bmc": bmc_of(
            bmc, bmc_user, bmc_password_file, name, known=lambda: client.host(name)["bmc"]
        ),
        "labels": _labels(labels) or None,
    }
    given = _given(changes)
    if not given:
        raise RequestError(
            "nothing to change was given",
            host=name,
            expected="--profile, --firmware, --local-boot, --bmc or --label",
        )
    show_row(_row(client.change_host(name, given)), COLUMNS, output, wide_columns=WIDE)
    if bmc is not None:
        _warn_of_bmc(client, name)


@host.command("delete")
@click.argument("name")
@connected
def delete(client: "Client", name: str) -> None:
    """Stop managing a host. Its disk stays as it is."""
    client.delete_host(name)
    click.echo(f"{name} is no longer managed")


@host.command("power")
@click.argument("name")
@click.argument("action", type=click.Choice(("status", "on", "off", "soft-off", "reset")))
@connected
def power(client: "Client", name: str, action: str) -> None:
    """Ask or tell the BMC of a host, once."""
    state = client.power(name, action)
    click.echo(state if state is not None else f"{name}: the BMC accepted {action}")


@host.command("protect")
@click.argument("name")
@connected
def protect(client: "Client", name: str) -> None:
    """Refuse every rebuild and deletion of a host."""
    client.set_flags(name, is_protected=True)
    click.echo(f"{name} is protected")


@host.command("unprotect")
@click.argument("name")
@connected
def unprotect(client: "Client", name: str) -> None:
    """Allow rebuilds of a host again."""
    client.set_flags(name, is_protected=False)
    click.echo(f"{name} is not protected")


@host.command("maintenance")
@click.argument("name")
@click.option("--on/--off", "is_on", default=None, help="Hands off, or free again.")
@connected
def maintenance(client: "Client", name: str, is_on: bool | None) -> None:
    """Keep operations off a host while somebody works on it, or allow them again."""
    if is_on is None:
        raise RequestError("say which", host=name, expected="--on or --off")
    client.set_flags(name, in_maintenance=is_on)
    click.echo(f"{name} is {'in' if is_on else 'out of'} maintenance")


@host.command("release")
@click.argument("name")
@connected
def release(client: "Client", name: str) -> None:
    """Take a host out of quarantine."""
    client.set_flags(name, release_quarantine=True)
    click.echo(f"{name} is not quarantined")


@host.command("confirm")
@click.argument("name")
@click.option("--name", "new_name", help="What it shall be called from now on.")
@bmc_options
@_profile_option
@output_option
@connected
def confirm(
    client: "Client",
    name: str,
    new_name: str | None,
    bmc: str | None,
    bmc_user: str | None,
    bmc_password_file: str | None,
    profile: str | None,
    output: str,
) -> None:
    """Take a discovered host into management."""
    changes = {
        "new_name": new_name,
        "bmc": bmc_of(bmc, bmc_user, bmc_password_file, name),
        "profile": profile,
    }
    show_row(_row(client.confirm_host(name, _given(changes))), COLUMNS, output, wide_columns=WIDE)


@host.command("inspect")
@click.argument("name")
@click.option("--wait", is_flag=True, help="Watch it until it has ended.")
@connected
def inspect(client: "Client", name: str, wait: bool) -> int:
    """Netboot a host to take its inventory, and return it to its disk."""
    queued = client.inspect_host(name)
    if not wait:
        click.echo(queued["id"])
        return 0
    from .watch import watch

    return watch(client, [queued])


@host.command("events")
@click.argument("name")
@click.option("--after", type=click.IntRange(0), help="Events after this number, not the newest.")
@click.option("--limit", type=click.IntRange(1, 1000), default=200, help="At most so many.")
@output_option
@connected
def events(client: "Client", name: str, after: int | None, limit: int, output: str) -> None:
    """Show the newest events of a host's timeline, in their order."""
    found = client.host_events(name, after=after, limit=limit)
    show(found, EVENT_COLUMNS, output, wide_columns=["number", "operation", "mac", "detail"])
    tell_of_more(found, after, limit)


def _row(item: dict[str, Any]) -> dict[str, Any]:
    """Return the host with its flags gathered under one key, for the table."""
    flags = {
        "protected": item["is_protected"],
        "maintenance": item["in_maintenance"],
        "quarantined": item["quarantine_reason"] is not None,
        "unconfirmed": not item["is_confirmed"],
    }
    return {**item, "flags": [name for name, is_set in flags.items() if is_set]}


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


def _labels(given: tuple[str, ...]) -> dict[str, str]:
    labels = {}
    for text in given:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise RequestError("a label is not usable", expected="KEY=VALUE", found=text)
        labels[key] = value
    return labels


def _with_password(item: dict[str, Any], folder: Path) -> dict[str, Any]:
    bmc = item.get("bmc")
    if not isinstance(bmc, dict) or "password_file" not in bmc:
        return item
    file = str(folder / str(bmc["password_file"]))
    plain = {key: value for key, value in bmc.items() if key != "password_file"}
    password = read_password(file, f"the BMC of {item.get('name')}")
    return {**item, "bmc": {**plain, "password": password}}
