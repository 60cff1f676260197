"""What a world is made of, drawn from its seed: rules, how failures are dealt with, hosts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from provisioner.core.fleet import Rules
from provisioner.core.recovery import OnQuarantine, Policy

from .bmcs import Quirks
from .disks import SimDisk
from .hosts import SimHost

if TYPE_CHECKING:
    from .world import World

GIB: Final = 1 << 30
DISK_BYTES: Final = 8 * GIB
OTHER_DISK_BYTES: Final = 2 * GIB
PROFILE: Final[dict[str, Any]] = {
    "cloud_config": {"hostname": "${host.name}"},
    "disk": {"bus": "virtio", "size_min_bytes": 4 * GIB},
    "health": {"soak_s": 10, "checks": [{"type": "ssh", "port": 22}, {"type": "systemd"}]},
}


def policy_of(world: World) -> Policy:
    chance = world.chance
    return Policy(
        is_automatic=chance.random() < world.size.automatic_share,
        attempts_max=chance.choice((1, 2, 2, 3)),
        may_roll_back=chance.random() < 0.8,
        on_quarantine=chance.choice(tuple(OnQuarantine)),
    )


def rules_of(world: World) -> Rules:
    """So few at once that some wait, in the fleet and in a group; a breaker that opens, or one
    that never does."""
    chance, size = world.chance, world.size
    return Rules(
        in_flight_max=chance.choice((2, 2, 3)),
        starts_per_minute_max=chance.choice((2, 2, 3)),
        group_in_flight_max=chance.choice(size.group_in_flight),
        group_starts_per_minute_max=chance.choice(size.group_starts),
        group_floor=chance.choice(size.group_floors),
        breaker_hosts_max=chance.choice((2, 3, 1000)),
    )


def host_of(world: World, number: int, *, is_network_first: bool = False) -> SimHost:
    chance = world.chance
    big = SimDisk.with_old_system("vda", f"SER-{number}-a", DISK_BYTES, "virtio")
    small = SimDisk.with_old_system("vdb", f"SER-{number}-b", OTHER_DISK_BYTES, "virtio")
    disks = [[big], [big, small], [small, big]][chance.choices((0, 1, 2), (6, 3, 1))[0]]
    host = SimHost(
        world,
        number,
        disks,
        post_s=chance.choice((15.0, 40.0, 90.0)),
        chunk_s=chance.choice(world.size.chunks_s),
        is_network_first=is_network_first or chance.random() < world.size.network_first_share,
        tries_again=chance.random() < 0.5,
    )
    host.bmc.quirks = Quirks(
        clears_flag_after_60_s=chance.random() < 0.5,
        takes_once_as_persistent=chance.random() < 0.15,
        runs_reset_twice=chance.random() < 0.15,
        resets_its_password=chance.random() < 0.05,
    )
    return host


def labels_of(world: World) -> dict[str, str]:
    """Return the labels of a host: its group, where it has one."""
    group = world.chance.choice(world.size.groups)
    return {"group": group} if group else {}
