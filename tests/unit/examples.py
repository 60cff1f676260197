"""Plain example values that the tests of the core share: one host, one operation on it."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from provisioner.core.disks import Disk
from provisioner.core.lifecycle import Limits
from provisioner.core.model import (
    BmcAddress,
    Firmware,
    Host,
    HostId,
    HostState,
    Kind,
    LocalBoot,
    Operation,
    OperationId,
    Phase,
    Secret,
)

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
LIMITS = Limits()
RELEASE = "ab" * 32
GENERATION = 7

DISK = Disk(
    name="vda",
    serial="LAB-r1n7-0",
    wwn=None,
    size_bytes=8 * 1024**3,
    rotational=False,
    bus="virtio",
)
HOST = Host(
    id=HostId("host_1"),
    name="r1n7",
    state=HostState.DIRTY,
    macs=("52:54:00:77:00:01",),
    firmware=Firmware.UEFI,
    local_boot=LocalBoot.EXIT,
    uuid="7b3d2a52-0c65-4d5b-9d3c-2c6a2f3f0001",
    serial="CZ1234",
    profile="web",
    bmc=BmcAddress("127.0.1.1", 623, "admin", Secret("example")),
    generation=GENERATION,
    release=None,
    last_good=None,
    is_confirmed=True,
    is_protected=False,
    in_maintenance=False,
    quarantine_reason=None,
    labels={},
    inventory=None,
    root_disk=None,
    created_at=NOW - timedelta(days=30),
)
OPERATION = Operation(
    id=OperationId("op_1"),
    host_id=HOST.id,
    kind=Kind.DEPLOYMENT,
    phase=Phase.QUEUED,
    generation=GENERATION,
    rung=0,
    release=RELEASE,
    pins={"ramdisk": "cd" * 32, "profile": "ef" * 32},
    options={},
    requested_by="token:admin",
    requested_at=NOW,
    phase_at=NOW,
    deadline_at=LIMITS.deadline(Phase.QUEUED, NOW, NOW),
    ended_at=None,
)


def operation_in(phase: Phase, kind: Kind = Kind.DEPLOYMENT, **changes: Any) -> Operation:
    """Return the example operation as it is right after entering `phase`."""
    entered = replace(
        OPERATION,
        kind=kind,
        release=None if kind is Kind.INSPECTION else RELEASE,
        phase=phase,
        deadline_at=LIMITS.deadline(phase, NOW, NOW),
        ended_at=NOW if phase in (Phase.SUCCEEDED, Phase.FAILED, Phase.CANCELLED) else None,
    )
    return replace(entered, **changes)
