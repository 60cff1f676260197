"""The sections of the configuration file: every setting with its default and its meaning."""

# ruff: noqa: RUF009  `_setting` is dataclasses.field with our parser in its metadata.

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

from . import setting_types as types
from .core.fleet import Floor
from .core.recovery import ATTEMPTS_LIMIT, OnQuarantine
from .setting_types import Address, ChannelRule

_DAY_S: Final = 86400

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
    own_hosts: tuple[str, ...] = _setting(
        types.words,
        (),
        "hosts, by name or id, that are never a target, besides the one it finds itself on",
    )
    name: str = _setting(
        types.worker_name,
        "",
        "this service among those on one PostgreSQL; must stay the same, and no other may have "
        "it; empty: the name of this machine",
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
        "answer files with X-Accel-Redirect, for an nginx in front that serves data_dir; "
        "`why` sees no downloads then",
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
    uefi_loader: str = _setting(
        types.one_of("ipxe", "shim"),
        "ipxe",
        "what UEFI hosts are given; shim also starts where Secure Boot is on, and is slower",
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
    starts_per_minute_max: int = _setting(
        types.whole(0, 100_000), 300, "operations that start within a minute; 0: no limit"
    )
    group_in_flight_max: int = _setting(
        types.whole(0, 10_000),
        0,
        "operations in flight among the hosts with the same label `group`; 0: no limit",
    )
    group_starts_per_minute_max: int = _setting(
        types.whole(0, 100_000),
        0,
        "operations of one group that start within a minute; 0: no limit",
    )
    group_healthy_min: Floor = _setting(
        types.floor,
        Floor(),
        "active hosts of a group that nothing is done to: a number, or a share such as `60%`",
    )
    breaker_hosts_max: int = _setting(
        types.whole(1, 10_000), 10, "so many hosts that fail within the window open the breaker"
    )
    breaker_window_s: int = _setting(types.whole(1, _DAY_S), 600, "the window of the breaker")
    queued_s: int = _setting(
        types.whole(1, 30 * _DAY_S),
        14400,
        "longest wait in `queued` of an operation that may start",
    )
    waiting_s: int = _setting(
        types.whole(1, 30 * _DAY_S),
        _DAY_S,
        "longest wait in `queued` of one that other limits or the breaker keep waiting",
    )
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
class RecoverySettings:
    """What happens by itself when a deployment fails; see recovery.md."""

    automatic: bool = _setting(
        types.boolean, True, "false: a failure is left to a person, and nothing below applies"
    )
    attempts_max: int = _setting(
        types.whole(1, ATTEMPTS_LIMIT),
        3,
        "attempts at a deployment in all, unless its request says otherwise; 1 tries nothing again",
    )
    backoff_s: int = _setting(
        types.whole(0, _DAY_S),
        60,
        "wait before the second attempt; doubled before each further one",
    )
    backoff_max_s: int = _setting(types.whole(0, _DAY_S), 900, "longest wait between attempts")
    rollback: bool = _setting(
        types.boolean,
        True,
        "after the last attempt go back, once, to the release that was proven last on the host",
    )
    on_quarantine: str = _setting(
        types.one_of(*OnQuarantine),
        "power_off",
        "what becomes of a quarantined host: power_off, ramdisk (its agent stays), or leave",
    )


@dataclass(frozen=True)
class RamdiskSettings:
    """Which deploy ramdisk new operations pin, and what hardware wants its kernel told."""

    digest: str = _setting(types.digest, "", "digest of a built ramdisk; empty: the newest one")
    kernel_arguments: tuple[str, ...] = _setting(
        types.words, (), "further arguments for the ramdisk's kernel"
    )


@dataclass(frozen=True)
class ReleaseSettings:
    """Where releases are kept, who must have signed them, and what is kept of them."""

    store: str = _setting(
        types.bucket_url, "", "s3://bucket/prefix; empty: files below service.data_dir"
    )
    s3_endpoint: str = _setting(
        types.endpoint,
        "",
        "URL of an object store that is not Amazon's, such as http://10.0.0.9:9000",
    )
    s3_region: str = _setting(types.region, "us-east-1", "region of the bucket")
    mirrors: tuple[str, ...] = _setting(
        types.origins,
        (),
        "other origins that serve the chunks to hosts, such as http://10.77.1.1:8081",
    )
    threshold: int = _setting(
        types.whole(1, types.SIGNATURES_MAX), 1, "trusted keys that must have signed any release"
    )
    channels: tuple[ChannelRule, ...] = _setting(
        types.channels,
        (),
        "what a channel asks for beyond that: stable = {threshold = 2, tested = true}",
    )
    keep_newest: int = _setting(
        types.whole(1, 1000), 3, "newest releases of each image that `image gc` keeps in any case"
    )
    grace_s: int = _setting(
        types.whole(0, 365 * _DAY_S),
        _DAY_S,
        "`image gc` keeps what was published less than so many seconds ago",
    )
