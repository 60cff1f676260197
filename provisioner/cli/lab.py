"""`provisioner lab`: a rack of virtual hosts with BMCs, to try and to test with.

Decides nothing; the lab's own modules are imported only when a command runs.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

if TYPE_CHECKING:
    from provisioner.lab import Lab, LabHost

FIRMWARES: Final = ("bios", "uefi", "secure-boot")
CONSOLE_POLL_S: Final = 0.1


def default_directory() -> Path:
    """Return where the lab lives unless told otherwise: $XDG_STATE_HOME/provisioner/lab."""
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(state) / "provisioner" / "lab"


def _directory_option(command: Any) -> Any:
    return click.option(
        "--dir",
        "directory",
        type=click.Path(file_okay=False, path_type=Path),
        default=default_directory,
        show_default="$XDG_STATE_HOME/provisioner/lab",
        help="Where the lab keeps its disks, consoles and lab.json.",
    )(command)


def _output_option(command: Any) -> Any:
    return click.option(
        "-o",
        "--output",
        type=click.Choice(["table", "json"]),
        default="table",
        show_default=True,
        help="How to print it.",
    )(command)


def _opened(directory: Path) -> "Lab":
    from provisioner.lab import Lab

    return Lab.open(directory)


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


@click.group()
def lab() -> None:
    """Run a rack of virtual hosts that behave like hardware."""


@lab.command()
@click.option(
    "--hosts",
    "count",
    type=click.IntRange(1, 64),
    default=2,
    show_default=True,
    help="How many hosts.",
)
@click.option(
    "--firmware",
    default="bios,uefi",
    show_default=True,
    help="bios, uefi or secure-boot, or a list that the hosts take turns with: bios,uefi.",
)
@click.option(
    "--disk-gib",
    type=click.FloatRange(0.01),
    default=4.0,
    show_default=True,
    help="Size of each disk.",
)
@click.option(
    "--disks", type=click.IntRange(0, 8), default=1, show_default=True, help="Disks in each host."
)
@click.option(
    "--memory-mib",
    type=click.IntRange(128),
    default=1024,
    show_default=True,
    help="Memory of each host.",
)
@click.option(
    "--boot-order",
    type=click.Choice(["disk-first", "network-first"]),
    default="disk-first",
    show_default=True,
    help="What the firmware does when the BMC says nothing.",
)
@click.option(
    "--nic-rom",
    type=click.Choice(["firmware", "ipxe"]),
    default="firmware",
    show_default=True,
    help="Who netboots a UEFI host: its firmware by TFTP, or iPXE in the NIC.",
)
@click.option(
    "--accel",
    type=click.Choice(["auto", "kvm", "tcg"]),
    default="auto",
    show_default=True,
    help="auto takes KVM only where it was seen to boot Linux.",
)
@click.option(
    "--kernel",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A Linux kernel to find out with whether KVM works.",
)
@_directory_option
def up(
    count: int,
    firmware: str,
    disk_gib: float,
    disks: int,
    memory_mib: int,
    boot_order: Any,
    nic_rom: Any,
    accel: Any,
    kernel: Path | None,
    directory: Path,
) -> None:
    """Bring up a rack: every host off, every BMC listening."""
    from provisioner.errors import Conflict
    from provisioner.lab import Lab, LabHost

    hosts = [
        LabHost(
            firmware=kind,
            name=f"lab-{number}",
            disks_mib=(round(disk_gib * 1024),) * disks,
            memory_mib=memory_mib,
            boot_order=boot_order,
            nic_rom=nic_rom,
        )
        for number, kind in enumerate(_firmwares(firmware, count), start=1)
    ]
    try:
        rack = Lab.up(directory, hosts, accel=accel, kernel=kernel)
    except Conflict:
        rack = _the_same(directory, hosts)
        click.echo(f"the lab in {rack.directory} is already up")
    else:
        click.echo(f"the lab in {rack.directory} is up ({rack.accel})")
    _print_status(rack, "table")


def _firmwares(text: str, count: int) -> list[Any]:
    kinds = text.split(",")
    for kind in kinds:
        if kind not in FIRMWARES:
            raise click.BadParameter(f"{kind!r} is not one of {', '.join(FIRMWARES)}")
    return [kinds[number % len(kinds)] for number in range(count)]


def _the_same(directory: Path, hosts: "Sequence[LabHost]") -> "Lab":
    """Return the lab that is up there. Raises Conflict when it has other hosts."""
    from provisioner.errors import Conflict

    rack = _opened(directory)
    if not rack.is_as(hosts):
        raise Conflict(
            f"a lab with other hosts is already up in {directory}",
            expected=[host.firmware for host in hosts],
            found=[host.firmware for host in rack.hosts],
            hint=f"take it down with: provisioner lab down --dir {directory}",
        )
    return rack


@lab.command()
@_directory_option
def down(directory: Path) -> None:
    """End all hosts and remove their disks; consoles and logs stay to be read."""
    from provisioner.errors import NotFound

    try:
        _opened(directory).down()
    except NotFound:
        click.echo(f"no lab is up in {directory}")
    else:
        click.echo(f"the lab in {directory} is down")


@lab.command()
@_output_option
@_directory_option
def status(output: str, directory: Path) -> None:
    """Show each host: what is true of it, and how its BMC is reached."""
    _print_status(_opened(directory), output)


def _print_status(rack: "Lab", output: str) -> None:
    states = {state.name: state for state in rack.status()}
    if output == "json":
        click.echo(
            json.dumps(
                [
                    {
                        "host": host.name,
                        "firmware": host.firmware,
                        "mac": host.mac,
                        "uuid": host.uuid,
                        "bmc": f"{host.bmc.address}:{host.bmc.port}",
                        "disks": [dataclasses.asdict(disk) for disk in host.disks],
                        "console": host.console,
                        **{
                            name: value
                            for name, value in dataclasses.asdict(states[host.name]).items()
                            if name != "name"
                        },
                    }
                    for host in rack.hosts
                ],
                indent=2,
            )
        )
        return
    heads = ("HOST", "FIRMWARE", "POWER", "MAC", "BMC", "DISK", "NEXT BOOT", "FAULTS", "CONSOLE")
    rows = [
        (
            host.name,
            host.firmware,
            states[host.name].power,
            host.mac,
            f"{host.bmc.address}:{host.bmc.port}",
            ",".join(disk.serial for disk in host.disks) or "-",
            states[host.name].next_boot or "-",
            ",".join(states[host.name].faults) or "-",
            host.console,
        )
        for host in rack.hosts
    ]
    for line in _table([heads, *rows]):
        click.echo(line)


@lab.command()
@click.argument("host")
@click.option("-f", "--follow", is_flag=True, help="Go on as the host speaks, until Ctrl-C.")
@_directory_option
def console(host: str, follow: bool, directory: Path) -> None:
    """Print what HOST has said on its serial console."""
    import time

    with _opened(directory).console_path(host).open(errors="replace") as said:
        while True:
            if text := said.read():
                click.echo(text, nl=False)
            elif not follow:
                return
            else:
                time.sleep(CONSOLE_POLL_S)


@lab.command()
@click.argument("host")
@click.argument("verb", type=click.Choice(["on", "off", "soft", "reset", "status"]))
@_directory_option
def power(host: str, verb: Any, directory: Path) -> None:
    """Press a button of HOST itself, past its BMC and the BMC's faults."""
    rack = _opened(directory)
    state = rack.status_of(host) if verb == "status" else rack.power(host, verb)
    click.echo(f"{host} is {state.power}")


@lab.command("exec", context_settings={"ignore_unknown_options": True})
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@_directory_option
def execute(command: tuple[str, ...], directory: Path) -> None:
    """Run COMMAND inside the lab's network: provisioner lab exec -- ping 10.77.0.100"""
    argv = [*_opened(directory).nsenter_argv(), *command]
    os.execvp(argv[0], argv)


@lab.command()
@click.argument("host", required=False)
@click.argument("name", required=False)
@click.argument("value", required=False)
@click.option("--clear", is_flag=True, help="End this fault, or all of HOST's.")
@_directory_option
def fault(
    host: str | None, name: str | None, value: str | None, clear: bool, directory: Path
) -> None:
    """Let something go wrong with HOST. Without arguments, list what can."""
    from provisioner.lab.faults import FAULTS

    if host is None:
        rows = [(known.name, known.takes or "-", known.does) for known in FAULTS.values()]
        for line in _table([("FAULT", "VALUE", "WHAT HAPPENS"), *rows]):
            click.echo(line)
        return
    rack = _opened(directory)
    if clear:
        state = rack.clear(host, name)
    elif name:
        state = rack.fault(host, name, value)
    else:
        state = rack.status_of(host)
    found = [f"{known}={value}" if value else known for known, value in state.faults.items()]
    click.echo(f"{host}: {', '.join(found) or 'no faults'}")
