"""What the settings put in force: time limits, how much at once, who has which address."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

from .core.fleet import Rules
from .core.lifecycle import Limits
from .core.model import Phase
from .core.recovery import OnQuarantine, Policy
from .netboot.leases import leases_in
from .netboot.neighbours import neighbour_at
from .service.addresses import Addresses
from .settings import Settings


def limits_of(settings: Settings) -> Limits:
    """Return the time limits that the settings put in force."""
    chosen = settings.limits
    seconds = {
        Phase.QUEUED: chosen.queued_s,
        Phase.NETBOOTING: chosen.netbooting_s,
        Phase.PREPARING: chosen.preparing_s,
        Phase.WRITING: chosen.writing_s,
        Phase.VERIFYING: chosen.verifying_s,
        Phase.BOOTING: chosen.booting_s,
        Phase.PROVING: chosen.proving_s,
    }
    return Limits(
        phase={phase: timedelta(seconds=value) for phase, value in seconds.items()},
        agent_silence=timedelta(seconds=chosen.agent_silence_s),
        waiting=timedelta(seconds=chosen.waiting_s),
    )


def rules_of(settings: Settings) -> Rules:
    """Return how much may happen at once, as the settings say."""
    chosen = settings.limits
    return Rules(
        in_flight_max=chosen.deployments_in_flight_max,
        starts_per_minute_max=chosen.starts_per_minute_max,
        group_in_flight_max=chosen.group_in_flight_max,
        group_starts_per_minute_max=chosen.group_starts_per_minute_max,
        group_floor=chosen.group_healthy_min,
        breaker_hosts_max=chosen.breaker_hosts_max,
        breaker_window=timedelta(seconds=chosen.breaker_window_s),
    )


def addresses_of(settings: Settings) -> Addresses:
    """Return what says whether a host asks from its own address: only the DHCP that we run
    ourselves gives each host one address from its firmware to its ramdisk."""
    own = {"127.0.0.1", "::1", settings.boot.listen.host, settings.agent.listen.host}
    own |= {urlsplit(url).hostname or "" for url in (settings.boot.url, settings.agent.url)}
    if settings.dhcp.mode != "full":
        return Addresses(own=own)
    return Addresses(lambda: leases_in(dhcp_leases(settings)), own)


def mac_at(settings: Settings) -> Callable[[str], str | None]:
    """Return what says which MAC is at an address: our own leases know best; elsewhere our
    kernel has just spoken with the address."""

    def find(address: str) -> str | None:
        if settings.dhcp.mode == "full":
            for mac, addresses in (leases_in(dhcp_leases(settings)) or {}).items():
                if address in addresses:
                    return mac
        return neighbour_at(address)

    return find


def dhcp_leases(settings: Settings) -> Path:
    """Return where our dnsmasq keeps its leases."""
    return settings.data_dir / "dhcp" / "dnsmasq.leases"


def policy_of(settings: Settings) -> Policy:
    """Return how the settings let failures be dealt with."""
    chosen = settings.recovery
    return Policy(
        is_automatic=chosen.automatic,
        attempts_max=chosen.attempts_max,
        backoff=timedelta(seconds=chosen.backoff_s),
        backoff_max=timedelta(seconds=chosen.backoff_max_s),
        may_roll_back=chosen.rollback,
        on_quarantine=OnQuarantine(chosen.on_quarantine),
    )
