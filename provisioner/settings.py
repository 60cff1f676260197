"""Every setting of the service: read once from one file, and checked whole.

One ConfigError lists every problem. No environment, no defaults that destroy: what a room
needs is handed to it by `wiring`, never this object.
"""

# ruff: noqa: RUF009  `_setting` is dataclasses.field with our parser in its metadata.

import difflib
import ipaddress
import stat
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

from . import setting_types as types
from .core.lifecycle import RUNG_LAST
from .errors import ConfigError
from .keys import FOLDER, Keys, load_keys
from .setting_types import Address, Wrong

CONFIG_FILE: Final = "provisioner.toml"
CONFIG_BYTES_MAX: Final = 1024 * 1024
_DAY_S: Final = 86400
RUNGS: Final = RUNG_LAST + 1

T = TypeVar("T")


def _setting(parse: Callable[[object], T], default: T, doc: str, *, shown: bool = True) -> T:
    metadata = {"parse": parse, "doc": doc}
    return field(default=default, metadata=metadata, repr=shown)


@dataclass(frozen=True)
class ServiceSettings:
    """Where the service keeps what it keeps."""

    data_dir: Path = _setting(
        lambda value: Path(types.text(value)),
        Path(),
        "folder of the database, the keys and the release archive; relative to the file",
    )
    log_format: str = _setting(
        types.one_of("auto", "json", "text"),
        "auto",
        "auto writes text on a terminal and JSON elsewhere",
    )


@dataclass(frozen=True)
class DatabaseSettings:
    """The one truth about state."""

    # May hold a password, so it is not shown.
    url: str = _setting(
        types.database_url,
        "sqlite:///state.db",
        "SQLite file, relative to data_dir, or postgresql+psycopg://user@host/database",
        shown=False,
    )


@dataclass(frozen=True)
class ApiSettings:
    """The listener for operators."""

    listen: Address = _setting(
        types.listen, Address("127.0.0.1", 8080), "address and port of the API and the pages"
    )


@dataclass(frozen=True)
class BootSettings:
    """The listener for hosts that boot: HTTP in clear on the provisioning network."""

    listen: Address = _setting(
        types.listen, Address("127.0.0.1", 8081), "address and port for boot scripts and files"
    )
    url: str = _setting(
        types.base_url("http"), "", "how hosts reach it; empty: made from boot.listen"
    )
    accel: bool = _setting(
        types.boolean,
        False,
        "answer files with X-Accel-Redirect, for an nginx in front that serves data_dir",
    )


@dataclass(frozen=True)
class AgentSettings:
    """The listener for the ramdisk's agent and the reporter: HTTPS with a pinned key."""

    listen: Address = _setting(
        types.listen, Address("127.0.0.1", 8443), "address and port for agents and reporters"
    )
    url: str = _setting(
        types.base_url("https"), "", "how hosts reach it; empty: made from agent.listen"
    )


@dataclass(frozen=True)
class TftpSettings:
    """The TFTP server that hands iPXE to boot ROMs."""

    listen: Address = _setting(
        types.listen, Address("127.0.0.1", 69), "address and port; boot ROMs ask at port 69"
    )


@dataclass(frozen=True)
class DhcpSettings:
    """The dnsmasq that we run, if any."""

    mode: str = _setting(
        types.one_of("full", "proxy", "off"),
        "off",
        "full gives out addresses, proxy adds how to boot to another server's, off runs none",
    )
    interface: str = _setting(types.interface, "", "network interface to answer on")
    subnet: str = _setting(types.subnet, "", "provisioning network, such as 10.77.0.0/24")
    range_start: str = _setting(types.ipv4, "", "first address to give out")
    range_end: str = _setting(types.ipv4, "", "last address to give out")
    gateway: str = _setting(types.ipv4, "", "router to announce; empty: none")
    dns: tuple[str, ...] = _setting(types.ipv4_list, (), "name servers to announce")
    lease_s: int = _setting(
        types.whole(120, 30 * _DAY_S),
        43200,
        "seconds a lease lasts; it must outlast a deployment",
    )


@dataclass(frozen=True)
class DiscoverySettings:
    """What happens to a machine that nobody knows."""

    enabled: bool = _setting(
        types.boolean, False, "inspect unknown machines instead of sending them to their disk"
    )
    hosts_max: int = _setting(
        types.whole(1, 10_000), 100, "unconfirmed hosts kept at most; further ones boot their disk"
    )


@dataclass(frozen=True)
class LimitSettings:
    """How long and how much; a limit can be changed, but not removed."""

    deployments_in_flight_max: int = _setting(
        types.whole(1, 10_000), 50, "operations between queued and final at a time"
    )
    queued_s: int = _setting(types.whole(1, 30 * _DAY_S), 14400, "longest wait in `queued`")
    netbooting_s: int = _setting(
        types.whole(1, _DAY_S), 600, "longest `netbooting` for each rung of the ladder"
    )
    preparing_s: int = _setting(types.whole(1, _DAY_S), 600, "longest `preparing`")
    writing_s: int = _setting(types.whole(1, 7 * _DAY_S), 7200, "longest `writing`")
    verifying_s: int = _setting(types.whole(1, 7 * _DAY_S), 3600, "longest `verifying`")
    booting_s: int = _setting(types.whole(1, _DAY_S), 1200, "longest `booting`")
    proving_s: int = _setting(types.whole(1, 7 * _DAY_S), 1800, "longest `proving`")
    agent_silence_s: int = _setting(
        types.whole(1, _DAY_S), 180, "an agent that says nothing for so long is taken for dead"
    )
    soft_shutdown_s: int = _setting(
        types.whole(0, 3600), 90, "how long a system may take to shut down before power is cut"
    )
    bmc_exchange_s: int = _setting(
        types.whole(1, 600), 20, "longest exchange with a BMC before its process is killed"
    )
    ticket_s: int = _setting(types.whole(10, 7 * _DAY_S), 3600, "lifetime of a boot ticket")


@dataclass(frozen=True)
class RamdiskSettings:
    """Which deploy ramdisk new operations pin, and what hardware wants its kernel told."""

    digest: str = _setting(types.digest, "", "digest of a built ramdisk; empty: the newest one")
    kernel_arguments: tuple[str, ...] = _setting(
        types.words, (), "further arguments for the ramdisk's kernel"
    )


@dataclass(frozen=True)
class Settings:
    """The whole configuration, checked. `path` is the file it came from."""

    path: Path
    keys: Keys
    service: ServiceSettings
    database: DatabaseSettings
    api: ApiSettings
    boot: BootSettings
    agent: AgentSettings
    tftp: TftpSettings
    dhcp: DhcpSettings
    discovery: DiscoverySettings
    limits: LimitSettings
    ramdisk: RamdiskSettings

    @property
    def data_dir(self) -> Path:
        return self.service.data_dir


SECTIONS: Final[Mapping[str, type[Any]]] = {
    "service": ServiceSettings,
    "database": DatabaseSettings,
    "api": ApiSettings,
    "boot": BootSettings,
    "agent": AgentSettings,
    "tftp": TftpSettings,
    "dhcp": DhcpSettings,
    "discovery": DiscoverySettings,
    "limits": LimitSettings,
    "ramdisk": RamdiskSettings,
}


def documented() -> Iterator[tuple[str, object, str]]:
    """Yield (name, default, meaning) of every setting, such as `boot.listen`."""
    for section, kind in SECTIONS.items():
        for item in fields(kind):
            yield f"{section}.{item.name}", item.default, item.metadata["doc"]


def load(path: Path) -> Settings:
    """Read and check the configuration file, and the keys that belong to it.

    Raises one ConfigError whose message lists every problem found.
    """
    path = path.absolute()
    problems: list[str] = []
    raw = _read(path)
    for name in raw.keys() - SECTIONS.keys():
        problems.append(f"[{name}]: is not a section{_did_you_mean(name, SECTIONS)}")
    read = {name: _section(name, kind, raw.get(name), problems) for name, kind in SECTIONS.items()}
    _complete(read, path.parent)
    problems += _contradictions(read)
    if urlsplit(read["database"].url).password is not None and _others_may_read(path):
        problems.append("database.url: holds a password, and others may read the file; chmod 600")
    keys = load_keys(read["service"].data_dir / FOLDER, read["agent"].url, problems)
    if problems:
        count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError(f"{path} has {count}:\n" + "\n".join(f"  - {one}" for one in problems))
    return Settings(path=path, keys=keys, **read)


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(CONFIG_BYTES_MAX + 1)
        if len(text) > CONFIG_BYTES_MAX:
            raise ConfigError(f"{path} is larger than {CONFIG_BYTES_MAX} bytes")
        return tomllib.loads(text.decode())
    except FileNotFoundError as error:
        raise ConfigError(
            f"there is no configuration at {path}",
            hint="`provisioner init DIR` writes one, with keys",
        ) from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # not UTF-8, or not TOML
        raise ConfigError(f"{path} is not TOML: {error}") from error


def _section(name: str, kind: type[Any], raw: object, problems: list[str]) -> Any:
    if raw is None:
        return kind()
    if not isinstance(raw, dict):
        problems.append(f"{name}: expected a section [{name}]")
        return kind()
    known = {item.name: item for item in fields(kind)}
    values = {}
    for key, value in raw.items():
        if key not in known:
            problems.append(f"{name}.{key}: is not a setting{_did_you_mean(key, known)}")
            continue
        try:
            values[key] = known[key].metadata["parse"](value)
        except Wrong as wrong:
            # A URL may hold a password: say what was expected, not what stood there.
            found = "" if not known[key].repr else f", found {value!r}"
            problems.append(f"{name}.{key}: expected {wrong}{found}")
    return kind(**values)


def _did_you_mean(name: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _complete(read: dict[str, Any], folder: Path) -> None:
    """Fill in what follows from other settings."""
    data_dir = (folder / read["service"].data_dir).resolve()
    read["service"] = replace(read["service"], data_dir=data_dir)
    url = read["database"].url
    if url.startswith("sqlite:///"):
        file = data_dir / url.removeprefix("sqlite:///")
        read["database"] = replace(read["database"], url=f"sqlite:///{file}")
    for name, scheme in (("boot", "http"), ("agent", "https")):
        if not read[name].url and read[name].listen.host not in types.WILDCARDS:
            read[name] = replace(read[name], url=f"{scheme}://{read[name].listen}")


def _contradictions(read: dict[str, Any]) -> Iterator[str]:
    taken: dict[str, str] = {}
    for name in ("api", "boot", "agent"):
        place = str(read[name].listen)
        if place in taken:
            yield f"{name}.listen: {place} is {taken[place]}.listen already"
        taken[place] = name
    limits = read["limits"]
    if limits.ticket_s < RUNGS * limits.netbooting_s:
        yield (
            f"limits.ticket_s: must be at least {RUNGS} times limits.netbooting_s "
            f"({RUNGS * limits.netbooting_s}), or a ticket ends before the ladder does"
        )
    for name in ("boot", "agent"):
        if not read[name].url:
            yield f"{name}.url: must be set, since {name}.listen is a wildcard"
    if read["dhcp"].mode != "off":
        yield from _dhcp_contradictions(read["dhcp"], read["tftp"].listen.host)


def _dhcp_contradictions(dhcp: DhcpSettings, tftp_host: str) -> Iterator[str]:
    needed = ["interface", "subnet"]
    if dhcp.mode == "full":
        needed += ["range_start", "range_end"]
    for name in needed:
        if not getattr(dhcp, name):
            yield f"dhcp.{name}: must be set when dhcp.mode is {dhcp.mode}"
    if tftp_host in types.WILDCARDS or ":" in tftp_host:
        yield "tftp.listen: must be one IPv4 address, since DHCP tells it to hosts"
    if not dhcp.subnet:
        return
    subnet = ipaddress.IPv4Network(dhcp.subnet)
    for name in ("range_start", "range_end", "gateway"):
        value = getattr(dhcp, name)
        if value and ipaddress.IPv4Address(value) not in subnet:
            yield f"dhcp.{name}: {value} is outside dhcp.subnet {subnet}"
    if dhcp.range_start and dhcp.range_end:
        first, last = map(ipaddress.IPv4Address, (dhcp.range_start, dhcp.range_end))
        if first > last:
            yield "dhcp.range_end: comes before dhcp.range_start"


def _others_may_read(path: Path) -> bool:
    return bool(path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH))
