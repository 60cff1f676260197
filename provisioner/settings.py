"""Every setting of the service: read once from one file, and checked whole.

One ConfigError lists every problem. No environment, no defaults that destroy: what a room
needs is handed to it by `wiring`, never this object. The sections are in `setting_sections.py`.
"""

import ipaddress
import stat
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from . import setting_types as types
from .core.lifecycle import RUNG_LAST
from .errors import ConfigError
from .keys import FOLDER, Keys, load_keys
from .setting_sections import (
    AgentSettings,
    ApiSettings,
    BootSettings,
    DatabaseSettings,
    DhcpSettings,
    DiscoverySettings,
    LimitSettings,
    RamdiskSettings,
    RecoverySettings,
    ReleaseSettings,
    ServiceSettings,
    TftpSettings,
)
from .setting_types import Wrong, did_you_mean

CONFIG_FILE: Final = "provisioner.toml"
CONFIG_BYTES_MAX: Final = 1024 * 1024
RUNGS: Final = RUNG_LAST + 1


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
    recovery: RecoverySettings
    ramdisk: RamdiskSettings
    releases: ReleaseSettings

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
    "recovery": RecoverySettings,
    "ramdisk": RamdiskSettings,
    "releases": ReleaseSettings,
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
        problems.append(f"[{name}]: is not a section{did_you_mean(name, SECTIONS)}")
    read = {name: _section(name, kind, raw.get(name), problems) for name, kind in SECTIONS.items()}
    _complete(read, path.parent)
    problems += _contradictions(read)
    if urlsplit(read["database"].url).password is not None and _others_may_read(path):
        problems.append("database.url: holds a password, and others may read the file; chmod 600")
    keys = load_keys(
        read["service"].data_dir / FOLDER,
        read["agent"].url,
        problems,
        with_s3=bool(read["releases"].store),
    )
    problems += _unreachable_thresholds(read["releases"], len(keys.trusted))
    if problems:
        count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError(f"{path} has {count}:\n" + "\n".join(f"  - {one}" for one in problems))
    return Settings(path=path, keys=keys, **read)


def find_settings(path: Path | None) -> Settings:
    """Load the configuration that `path`, which may be its folder, or the first default place
    holds.

    Raises ConfigError that lists every problem, or where was looked.
    """
    if path is not None:
        return load(path / CONFIG_FILE if path.is_dir() else path)
    places = [Path(CONFIG_FILE), Path("/etc/provisioner") / CONFIG_FILE]
    for place in places:
        if place.is_file():
            return load(place)
    raise ConfigError(
        "there is no configuration",
        expected=" or ".join(str(place) for place in places),
        hint="`provisioner init DIR` writes one, with keys; or name it with --config",
    )


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
            problems.append(f"{name}.{key}: is not a setting{did_you_mean(key, known)}")
            continue
        try:
            values[key] = known[key].metadata["parse"](value)
        except Wrong as wrong:
            # A URL may hold a password: say what was expected, not what stood there.
            found = "" if not known[key].repr else f", found {value!r}"
            problems.append(f"{name}.{key}: expected {wrong}{found}")
    return kind(**values)


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
    recovery = read["recovery"]
    if recovery.backoff_max_s < recovery.backoff_s:
        yield "recovery.backoff_max_s: is less than recovery.backoff_s, the first wait"
    for name in ("boot", "agent"):
        if not read[name].url:
            yield f"{name}.url: must be set, since {name}.listen is a wildcard"
    if read["releases"].s3_endpoint and not read["releases"].store:
        yield "releases.s3_endpoint: is set, while releases.store names no bucket"
    if read["dhcp"].mode != "off":
        yield from _dhcp_contradictions(read["dhcp"], read["tftp"].listen.host)


def _unreachable_thresholds(releases: ReleaseSettings, trusted: int) -> Iterator[str]:
    if not trusted:
        return  # a problem with the keys, told already
    asked = [("releases.threshold", releases.threshold)]
    asked += [(f"releases.channels.{one.name}", one.threshold) for one in releases.channels]
    for name, threshold in asked:
        if threshold > trusted:
            yield (
                f"{name}: asks for {threshold} signatures, and keys/release.pub holds "
                f"{trusted} trusted keys"
            )


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
