"""A real store of each kind for tests, and the rows that most of them begin with."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

from sqlalchemy import Engine

from provisioner.bmc import credentials
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
from provisioner.store.durable import DbosEffectQueue
from provisioner.store.engine import open_engine
from provisioner.store.sealing import Sealing
from provisioner.store.sql_store import SqlStore

KEY = bytes(range(32))
NOW = datetime(2026, 11, 23, 12, 0, 0, 123456, tzinfo=UTC)


def sealing(key: bytes = KEY) -> Sealing:
    return Sealing(partial(credentials.seal, key), partial(credentials.open_, key))


@contextmanager
def opened(engine: Engine, key: bytes = KEY) -> Iterator[SqlStore]:
    queue = DbosEffectQueue(engine)
    store = SqlStore(engine, queue, sealing(key))
    yield store
    store.close()
    queue.close()


@contextmanager
def opened_at(url: str) -> Iterator[SqlStore]:
    with opened(open_engine(url)) as store:
        yield store


def a_host(name: str = "r1n1", **changes: Any) -> Host:
    number = int("".join(filter(str.isdigit, name)) or 0)
    host = Host(
        id=HostId(f"host_{name}"),
        name=name,
        state=HostState.ENROLLED,
        macs=(f"52:54:00:{number >> 16 & 255:02x}:{number >> 8 & 255:02x}:{number & 255:02x}",),
        firmware=Firmware.UEFI,
        local_boot=LocalBoot.EXIT,
        uuid=None,
        serial="SN-1",
        profile="base",
        bmc=BmcAddress(
            f"127.{1 + (number >> 16)}.{number >> 8 & 255}.{number & 255}",
            623,
            "admin",
            Secret("bmc-password-in-clear"),
        ),
        generation=0,
        release=None,
        last_good=None,
        is_confirmed=True,
        is_protected=False,
        in_maintenance=False,
        quarantine_reason=None,
        labels={"rack": "r1"},
        inventory={"disks": [{"name": "vda", "size_bytes": 1 << 40}], "ratio": 0.1},
        root_disk=None,
        created_at=NOW,
    )
    return replace(host, **changes)


def an_operation(key: str = "op_1", host: str = "host_r1n1", **changes: Any) -> Operation:
    operation = Operation(
        id=OperationId(key),
        host_id=HostId(host),
        kind=Kind.DEPLOYMENT,
        phase=Phase.QUEUED,
        generation=1,
        rung=0,
        release="ab" * 32,
        pins={"ramdisk": "cd" * 32},
        options={"then": "reboot"},
        requested_by="anna",
        requested_at=NOW,
        phase_at=NOW,
        deadline_at=NOW,
        ended_at=None,
        phase_seconds={"queued": 0.25},
        progress={"done_bytes": 1},
        error=None,
        evidence={"nonce": "n"},
    )
    return replace(operation, **changes)
