"""Two services on one PostgreSQL: one is killed with effects in its hands, and the other performs
them.

Beside it, how soon PostgreSQL drops the sessions of the dead: before that nobody can know.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Engine, text

from provisioner.store.engine import open_engine
from provisioner.store.name_lock import LEASE
from script.bench_parts.figures import Say
from script.bench_parts.survival_hosts import RackHost, running_hosts
from script.bench_parts.survival_resume import LAST_WORDS_S, RELEASE, SETTINGS, ends
from script.bench_parts.survival_service import Service
from tests.parts.postgres import running_postgres
from tests.parts.served_lives import install, sibling_of, until

HOSTS: Final = 60
ROUNDS_PER_RUN: Final = 2
# It is killed as soon as it has so many effects in its hands, or fewer when the other is quicker.
HELD_WANTED: Final = 16
HELD_WAIT_S: Final = 3.0
FIRST, SECOND = "one", "two"
# BMCs take their time, so that a kill finds many effects in the middle.
ANSWER_S: Final = 0.3
LATEST_S: Final = 4.0
LIMIT_S: Final = 60.0
LOOK_S: Final = 0.02

_HELD: Final = text(
    "SELECT workflow_uuid, queue_partition_key FROM dbos.workflow_status"
    " WHERE status = 'PENDING' AND executor_id = :name"
)
_STILL: Final = text(
    "SELECT workflow_uuid FROM dbos.workflow_status"
    " WHERE executor_id = :name AND status IN ('PENDING', 'ENQUEUED')"
    " OR status = 'ENQUEUED' AND workflow_uuid = ANY(:keys)"
)
_LOCK_HOLDERS: Final = text("SELECT DISTINCT pid FROM pg_locks WHERE locktype = 'advisory'")
_SESSIONS: Final = text("SELECT pid FROM pg_stat_activity")


@dataclass
class Takeovers:
    """`taken_s`: from the kill until the other had each effect in its hands. `performed_s`: until
    it spoke to the host's BMC. `noticed_s`: until PostgreSQL dropped the dead's sessions."""

    seed: int
    taken_s: list[float] = field(default_factory=list)
    performed_s: list[float] = field(default_factory=list)
    noticed_s: list[float] = field(default_factory=list)
    open_: int = 0
    proven: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def lease_s(self) -> float:
        return LEASE.total_seconds()


def measure_takeover(folder: Path, runs: int, seed: int, say: Say) -> Takeovers:
    """Kill one of two services so many times, each in the middle of a round of deployments."""
    chance, found = random.Random(seed), Takeovers(seed)
    with running_postgres() as postgres:
        one = install(folder / FIRST, database=postgres.new_database(), more=SETTINGS)
        two = sibling_of(one, folder / SECOND, SECOND)
        _name(folder / FIRST, FIRST)
        engine = open_engine(one.database.url)
        services = Service(one), Service(two)
        with running_hosts(one, HOSTS, listeners=two, answer_s=ANSWER_S) as hosts:
            try:
                for run in range(runs * ROUNDS_PER_RUN):
                    before = len(found.taken_s)
                    _round(services, hosts, engine, chance, found)
                    taken = found.taken_s[before:]
                    worst = max(taken, default=0.0)
                    say(f"takeover, round {run + 1}: {len(taken)} effects within {worst:.1f} s")
            finally:
                for service in services:
                    service.end()
                engine.dispose()
    return found


def _name(folder: Path, name: str) -> None:
    """Give the worker of an installation that has none a name."""
    config = folder / "provisioner.toml"
    config.write_text(config.read_text().replace("[service]", f'[service]\nname = "{name}"', 1))


def _round(
    services: tuple[Service, Service],
    hosts: Sequence[RackHost],
    engine: Engine,
    chance: random.Random,
    found: Takeovers,
) -> None:
    """Deploy to all hosts with both services at work, kill the first, and see the end."""
    first, second = services
    for service in services:
        service.end()
    for service in services:
        service.start()
        service.wait_until_healthy()
    with second.client() as client:
        asked = client.deploy([host.name for host in hosts], RELEASE, soft_shutdown=False)
        time.sleep(chance.uniform(LATEST_S / 8, LATEST_S))
        _until_many_are_held(engine)
        holders = _column(engine, _LOCK_HOLDERS)
        killed_at = time.monotonic()
        first.end()
        held = _held(engine)
        _watch(engine, held, holders, killed_at, found)
        for one in ends(client, asked):
            if one.ended_at > killed_at:
                found.open_ += 1
                found.proven += one.is_proven
                found.failures += [f"replica killed: {one.why}"] if one.why else []
    spoken = {_partition(host): host.exchanged_at() for host in hosts}
    for partition in held.values():
        after = [at for at in spoken[partition] if at > killed_at + LAST_WORDS_S]
        if after:
            found.performed_s.append(min(after) - killed_at)


def _until_many_are_held(engine: Engine) -> None:
    waited_until = time.monotonic() + HELD_WAIT_S

    def is_so() -> bool:
        wanted = HELD_WANTED if time.monotonic() < waited_until else 1
        return len(_held(engine)) >= wanted

    until(is_so, "effects in the hands of the first", LIMIT_S, pause_s=LOOK_S)


def _watch(
    engine: Engine, held: dict[str, str], holders: set[Any], killed_at: float, found: Takeovers
) -> None:
    """Look until nothing is the first's any more, and note when each effect was another's."""
    waiting, noticed_at = set(held), None

    def is_over() -> bool:
        nonlocal noticed_at
        if noticed_at is None and not holders <= _column(engine, _SESSIONS):
            noticed_at = time.monotonic()
            found.noticed_s.append(noticed_at - killed_at)
        still = _column(engine, _STILL, name=FIRST, keys=list(held))
        for key in waiting - still:
            waiting.discard(key)
            found.taken_s.append(time.monotonic() - killed_at)
        return not waiting and noticed_at is not None

    until(is_over, "the takeover", LIMIT_S, pause_s=LOOK_S)


def _held(engine: Engine) -> dict[str, str]:
    """Return the effects that the first has in its hands: key and partition."""
    with engine.connect() as connection:
        return {row[0]: row[1] for row in connection.execute(_HELD, {"name": FIRST})}


def _column(engine: Engine, query: Any, **values: object) -> set[Any]:
    with engine.connect() as connection:
        return {row[0] for row in connection.execute(query, values)}


def _partition(host: RackHost) -> str:
    assert host.bmc is not None
    return f"{host.bmc.address}:{host.bmc.port}"
