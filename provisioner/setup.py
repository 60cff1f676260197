"""Makes a new installation: a configuration, strong keys and a client context in a folder.

Never overwrites. Everything is made aside and moved into place whole, the configuration
last: an interrupted run leaves nothing half-written, and the next one finishes the work.
"""

import contextlib
import ipaddress
import json
import os
import shlex
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from .errors import ConfigError, Conflict, RequestError
from .keys import ADMIN_TOKEN, FOLDER, make_keys
from .setting_types import WILDCARDS, Address
from .settings import CONFIG_FILE, Settings, load
from .whole_files import alone_in, sync, write_secret

CLIENT_FILE: Final = "client.toml"
API_LISTEN: Final = Address("127.0.0.1", 8080)
_ASIDE: Final = ".init-"


@dataclass(frozen=True)
class Plan:
    """What the operator says about the new installation.

    `listen_address` is this machine's address on the provisioning network. Everything that
    is not given follows from it: the URLs, and in mode `full` a range of addresses.
    """

    listen_address: str = "127.0.0.1"
    interface: str = ""
    dhcp: str = "off"
    subnet: str = ""
    range_start: str = ""
    range_end: str = ""
    gateway: str = ""
    dns: tuple[str, ...] = ()
    api: Address = API_LISTEN
    boot_port: int = 8081
    agent_port: int = 8443
    tftp_port: int = 69
    database: str = "sqlite:///state.db"
    discovery: bool = False


def initialise(folder: Path, plan: Plan) -> Settings:
    """Write configuration, keys and client context into `folder`; return the settings.

    Raises Conflict when the folder holds an installation already, and ConfigError, leaving
    no configuration behind, when the plan makes none that the service would take.
    """
    folder = folder.absolute()
    plan = completed(plan)
    try:
        return _initialise(folder, plan)
    except OSError as error:
        raise RequestError(
            f"no installation can be made in {folder}: {error.strerror}",
            hint="name a folder that this user may write, on a disk with room",
        ) from error


def _initialise(folder: Path, plan: Plan) -> Settings:
    is_new = not os.path.exists(folder)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with alone_in(folder, f"another run is initialising {folder}"):
        if (folder / CONFIG_FILE).exists():
            raise Conflict(
                f"{folder / CONFIG_FILE} exists; nothing was changed",
                hint=f"start it with `provisioner serve --config {_quoted(folder / CONFIG_FILE)}`, "
                "or choose another folder",
            )
        folder.chmod(0o700)
        for stale in folder.glob(f"{_ASIDE}*"):
            shutil.rmtree(stale)
        aside = Path(tempfile.mkdtemp(prefix=_ASIDE, dir=folder))
        try:
            _write(folder, aside, plan)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
            if is_new:
                with contextlib.suppress(OSError):  # it holds the installation
                    folder.rmdir()
    return load(folder / CONFIG_FILE)


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _write(folder: Path, aside: Path, plan: Plan) -> None:
    # Keys that are there already were moved in by an interrupted run: they are complete,
    # and no configuration ever named them.
    has_keys = (folder / FOLDER).exists()
    if has_keys:
        (aside / FOLDER).symlink_to(folder / FOLDER)
    else:
        make_keys(aside / FOLDER, f"https://{Address(plan.listen_address, plan.agent_port)}")
    token = (aside / FOLDER / ADMIN_TOKEN).read_text(encoding="ascii").strip()
    write_secret(aside / CLIENT_FILE, client_text(plan.api, token))
    write_secret(aside / CONFIG_FILE, config_text(plan))
    _check(aside / CONFIG_FILE)  # where nothing can be left behind
    if not has_keys:
        os.rename(aside / FOLDER, folder / FOLDER)
    os.rename(aside / CLIENT_FILE, folder / CLIENT_FILE)
    os.rename(aside / CONFIG_FILE, folder / CONFIG_FILE)
    sync(folder)


def _check(file: Path) -> None:
    """Raise ConfigError for a configuration that the service would refuse, without the name of
    the file, which nobody will find."""
    try:
        load(file)
    except ConfigError as error:
        _, _, problems = error.message.partition("\n")
        raise ConfigError(
            f"that would be no configuration, so nothing was written:\n{problems or error.message}",
            hint="`provisioner init --help` has an option for each of these settings",
        ) from error


def completed(plan: Plan) -> Plan:
    """Return the plan with its network filled in: a /24 around the listen address, and in
    mode `full` the addresses .100 to .199 of it."""
    try:
        address = ipaddress.IPv4Address(plan.listen_address)
    except ValueError as error:
        raise RequestError(
            "the listen address is not one",
            expected="an IPv4 address of this machine, such as 10.77.0.1",
            found=plan.listen_address,
        ) from error
    if str(address) in WILDCARDS:
        raise RequestError(
            "hosts must be told one address of this machine",
            expected="its address on the provisioning network, such as 10.77.0.1",
            found=plan.listen_address,
        )
    if urlsplit(plan.database).password is not None:
        raise RequestError(
            "a password in the arguments can be read by every user of this machine",
            hint="leave it out and put it into ~/.pgpass, or into provisioner.toml afterwards",
        )
    if plan.dhcp == "off":
        return plan
    try:
        subnet = ipaddress.IPv4Network(plan.subnet or f"{address}/24", strict=False)
    except ValueError as error:
        raise RequestError(
            "the subnet is not one", expected="such as 10.77.0.0/24", found=plan.subnet
        ) from error
    return _with_network(plan, subnet)


def _with_network(plan: Plan, subnet: ipaddress.IPv4Network) -> Plan:
    start, end = plan.range_start, plan.range_end
    if plan.dhcp == "full" and not (start or end) and subnet.prefixlen <= 24:
        start, end = str(subnet.network_address + 100), str(subnet.network_address + 199)
    return replace(plan, subnet=str(subnet), range_start=start, range_end=end)


def config_text(plan: Plan) -> str:
    """Return provisioner.toml for a plan. JSON strings and lists are TOML, too."""
    boot, agent = (Address(plan.listen_address, port) for port in (plan.boot_port, plan.agent_port))
    values: dict[str, dict[str, object]] = {
        "service": {"data_dir": "."},
        "database": {"url": plan.database},
        "api": {"listen": str(plan.api)},
        "boot": {"listen": str(boot), "url": f"http://{boot}"},
        "agent": {"listen": str(agent), "url": f"https://{agent}"},
        "tftp": {"listen": str(Address(plan.listen_address, plan.tftp_port))},
        "dhcp": {
            "mode": plan.dhcp,
            "interface": plan.interface,
            "subnet": plan.subnet,
            "range_start": plan.range_start,
            "range_end": plan.range_end,
            "gateway": plan.gateway,
            "dns": list(plan.dns),
        },
        "discovery": {"enabled": plan.discovery},
    }
    lines = ["# Settings of the provisioner service; docs/settings.md explains every one."]
    for section, settings in values.items():
        lines += ["", f"[{section}]"]
        lines += [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    return "\n".join(lines) + "\n"


def client_text(api: Address, token: str) -> str:
    """Return client.toml: how the command line reaches this service."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(api.host, api.host)
    url = f"http://{Address(host, api.port)}"
    return f"url = {json.dumps(url)}\ntoken = {json.dumps(token)}\n"
