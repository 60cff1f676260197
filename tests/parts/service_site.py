"""A whole service over a real database, with a clock that tests set and BMCs in memory.

Effects wait in a list until `perform` is called, and time passes when a test says so: each
test is the same every time. `Agent` makes the calls that the ramdisk makes.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, event, text

from provisioner.core.bootplan import BootPlan, BootRequest, Ramdisk
from provisioner.core.contracts import Archive, Clock, Outgoing, Store
from provisioner.core.diagnosis import Dhcp
from provisioner.core.fleet import Rules
from provisioner.core.lifecycle import LIMIT, Limits
from provisioner.core.model import (
    BmcAddress,
    Event,
    Host,
    Json,
    Operation,
    Phase,
    Secret,
    WeakLogin,
)
from provisioner.core.recovery import Policy
from provisioner.service.addresses import Addresses
from provisioner.service.agents import AgentSessions
from provisioner.service.audit import Audit
from provisioner.service.boot import BootService
from provisioner.service.breaker import Breakers
from provisioner.service.chance import Derived
from provisioner.service.facts import GuardFacts
from provisioner.service.hosts import Hosts, HostSpec
from provisioner.service.operations import Operations
from provisioner.service.performer import Performer
from provisioner.service.profiles import Profiles
from provisioner.service.ramdisks import Ramdisks
from provisioner.service.reconciliation import Reconciliation
from provisioner.service.recovery import Recovery
from provisioner.service.releases import Releases
from provisioner.service.services import Services
from provisioner.service.sightings import HighWater, MarkFile, Sightings
from provisioner.service.tokens import Tokens
from provisioner.service.transitions import Transitions
from provisioner.service.why import Why
from provisioner.service.worker import Worker
from provisioner.store.engine import open_engine
from provisioner.store.sql_store import SqlStore
from tests.parts.fake_bmc import FakeBmc, FakeBmcPool
from tests.parts.stores import NOW, sealing

ACTOR: Final = "token:admin"
GATEWAY: Final = "10.77.0.50"  # where agents and reporters seem to call from
RAMDISK: Final = "cd" * 32
BOOT_URL: Final = "http://10.77.0.1:8081"
# Texts that may be in no log, no audit row and no timeline.
BMC_PASSWORD: Final = "canary-bmc-password"
PROFILE_SECRET: Final = "canary-profile-secret"
STORED_BYTES: Final = 4321  # what the chunks of every release here are said to take
# Where chunks are fetched as well.
MIRROR: Final = "http://10.77.1.1:8081"
TESTED_CHANNEL: Final = "stable"
SOFT_SHUTDOWN: Final = timedelta(seconds=90)
TICKET_LIFETIME: Final = timedelta(hours=1)


class SetClock:
    """Tells the time it was set to. `pass_` is also what the performer's pauses do."""

    def __init__(self, at: datetime) -> None:
        self.at = at

    def __call__(self) -> datetime:
        return self.at

    def pass_(self, seconds: float) -> None:
        self.at += timedelta(seconds=seconds)


class Outbox:
    """Keeps effects, in the order in which their transactions were committed."""

    def __init__(self) -> None:
        self.waiting: list[Outgoing] = []

    def enqueue(self, connection: Connection, outgoing: Outgoing) -> None:
        def keep(_: Connection) -> None:
            self.waiting.append(outgoing)

        # A rolled-back transaction wishes for nothing.
        event.listen(connection, "commit", keep, once=True)

    def start(self, perform: object) -> None:
        """Nothing runs by itself here."""

    def stop(self) -> None:
        """Nothing to stop."""


@dataclass
class Site:
    """Every use case, and the means to let one thing happen after the other."""

    clock: SetClock
    outbox: Outbox
    pool: FakeBmcPool
    store: SqlStore
    archive: Archive
    hosts: Hosts
    operations: Operations
    profiles: Profiles
    releases: Releases
    boot: BootService
    agents: AgentSessions
    audit: Audit
    breakers: Breakers
    services: Services
    tokens: Tokens
    transitions: Transitions
    performer: Performer
    recovery: Recovery
    worker: Worker = field(init=False)
    derived: Derived
    weak_bmcs: dict[str, tuple[WeakLogin, ...]]  # how they let people in, by address
    leases: dict[str, frozenset[str]]  # what our own DHCP gave, by MAC; empty: we run none
    sightings: Sightings
    high_water: HighWater
    reconciliation: Reconciliation
    why: Why

    def __post_init__(self) -> None:
        self.worker = self.another_worker(high_water=self.high_water)

    def another_worker(
        self, *, store: Store | None = None, clock: Clock | None = None, **more: Any
    ) -> Worker:
        """Return a worker on the same database; `more` is what it does in its own way."""
        parts = (store or self.store, self.transitions, self.performer, self.outbox)
        return Worker(*parts, clock or self.clock, self.recovery, **more)

    def perform(self, *, at_most: int = 100) -> int:
        """Perform the waiting effects and those that follow from them; return how many."""
        done = 0
        while self.outbox.waiting and done < at_most:
            self.performer.perform(self.outbox.waiting.pop(0))
            done += 1
        return done

    def pass_(self, duration: timedelta) -> None:
        """Let time pass, and the reconciler and the effects notice it."""
        self.clock.pass_(duration.total_seconds())
        self.worker.end_overdue()
        self.perform()

    def add_host(self, number: int = 1, **more: Any) -> Host:
        where = BmcAddress(f"127.0.1.{number}", 623, "admin", Secret(BMC_PASSWORD))
        spec = {"name": f"r1n{number}", "macs": (mac(number),), "bmc": where, "profile": "web"}
        host = self.hosts.add(HostSpec(**{**spec, **more}), actor=ACTOR)
        self.pool.bmcs.setdefault(where.address, FakeBmc(is_on=True))
        return host

    def bmc(self, number: int = 1) -> FakeBmc:
        return self.pool.bmcs[f"127.0.1.{number}"]

    def deploy(self, *names: str, release: str = "tiny@1") -> Operation:
        """Request a deployment and start it; return the first operation."""
        made = self.operations.request_deployment(names, release, options={}, actor=ACTOR)
        self.worker.start_queued()
        return made[0]

    def at(self, operation: Operation) -> Operation:
        return self.operations.show(operation.id)

    def phase(self, operation: Operation) -> Phase:
        return self.at(operation).phase

    def ask(self, number: int = 1, source: str = GATEWAY, **more: Any) -> BootPlan:
        """Return what a host is told that asks the network how to boot."""
        return self.boot.answer(BootRequest(**{"mac": mac(number), **more}), source)

    def texts(self) -> str:
        """Return everything that people can read: audit log, timeline and operations."""
        with self.store.read() as tx:
            rows = tx.audit_rows(limit=10_000)
            events = tx.events(limit=10_000)
            operations = tx.operations(limit=10_000)
        kept = [row.detail for row in rows] + [vars(line) for _, line in events]
        kept += [operation.error or {} for operation in operations]
        kept += [{**operation.evidence, **operation.pins} for operation in operations]
        return json.dumps([*kept, *map(repr, rows)], default=str)


@dataclass
class Agent:
    """The ramdisk on one host, saying what it would say. It remembers what it was given."""

    site: Site
    number: int = 1
    ticket: str = ""
    token: str = ""
    generation: int = 0
    release: str = ""
    inventory: Json = field(default_factory=dict)
    source: str = GATEWAY

    def __post_init__(self) -> None:
        self.inventory = self.inventory or inventory(self.number)

    def boots(self) -> "Agent":
        """Ask how to boot, and take the ticket from the answer."""
        plan = self.site.ask(self.number)
        assert isinstance(plan, Ramdisk), plan
        self.ticket = plan.ticket.reveal()
        return self

    def hello(self) -> Json:
        body = {"ticket": self.ticket, "inventory": self.inventory, "agent_version": "1"}
        told = self.site.agents.hello(body, self.source)
        self.token, self.generation = told["token"], told["generation"]
        self.release = told["release"]
        return told

    def authorise(self, **disk: Any) -> Json:
        own = {
            key: self.inventory["disks"][0][key] for key in ("name", "serial", "wwn", "size_bytes")
        }
        body = {"release": self.release, "disk": {**own, **disk}}
        return self.site.agents.authorise(self.token, self._with(body), self.source)

    def progress(self, phase: str = "writing", **counted: int) -> Json:
        return self.site.agents.progress(
            self.token, self._with({"phase": phase, **counted}), self.source
        )

    def seed(self) -> Json:
        return self.site.agents.seed(self.token, self._with({}), self.source)

    def failed(self, code: str = "disk_failed") -> Json:
        body = {"code": code, "message": "the disk did not take it", "expected": 1, "found": 0}
        return self.site.agents.failed(self.token, self._with(body), self.source)

    def compared(self, differing_chunks: int = 0) -> Json:
        body = {
            "compared_chunks": 9,
            "differing_chunks": differing_chunks,
            "differing_bytes": differing_chunks * 65536,
            "seconds": {"comparing": 0.5},
        }
        return self.site.agents.compared(self.token, self._with(body), self.source)

    def done(self) -> Json:
        body = {"release": self.release, "written_bytes": 5, "fetched_bytes": 3, "seconds": {}}
        return self.site.agents.done(self.token, self._with(body), self.source)

    def _with(self, body: Json) -> Json:
        return {"generation": self.generation, **body}

    def until(self, phase: Phase) -> "Agent":
        """Go the way of a deployment that is in `netbooting`, as far as `phase`."""
        steps: dict[Phase, list[Callable[[], object]]] = {
            Phase.PREPARING: [self.boots, self.hello],
            Phase.WRITING: [self.authorise],
            Phase.VERIFYING: [self.seed, lambda: self.progress("verifying")],
            Phase.BOOTING: [self.done],
            Phase.PROVING: [self.phone_home],
        }
        for reached, calls in steps.items():
            for call in calls:
                call()
            self.site.perform()
            if reached is phase:
                return self
        raise AssertionError(phase)

    def phone_home(self, **changes: Any) -> Json:
        """Report as the freshly booted system would."""
        operation = self.operation()
        disk = self.inventory["disks"][0]
        body = {
            "nonce": self.site.derived.nonce(operation.id, operation.generation).reveal(),
            "release_id": self.site.releases.show(operation.release or "").release_id,
            "root_disk": {"name": "sda", "serial": disk["serial"], "wwn": disk["wwn"]},
            "boot_id": "b",
            "machine_id_digest": "m",
            "ssh_host_keys": ["ssh-ed25519 AAAA"],
            "kernel": "6.1",
            "os_release": {"ID": "debian"},
            "failed_units": [],
        }
        return self.site.agents.phone_home({**body, **changes}, "127.0.0.1")

    def operation(self) -> Operation:
        return self.site.operations.list(f"r1n{self.number}", limit=1)[0]


def mac(number: int) -> str:
    return f"52:54:00:77:00:{number:02x}"


def inventory(number: int = 1, **changes: Any) -> Json:
    disk = {
        "name": "vda",
        "serial": f"LAB-r1n{number}-0",
        "wwn": None,
        "size_bytes": 8 * 1024**3,
        "rotational": False,
        "bus": "virtio",
        "by_path": None,
        "model": None,
    }
    found = {
        "cpu": {"model": "x", "count": 2},
        "memory_bytes": 1 << 30,
        "firmware": "bios",
        "uuid": f"7b3d2a52-0c65-4d5b-9d3c-2c6a2f3f00{number:02x}",
        "serial": f"SN-{number}",
        "disks": [disk],
        "nics": [{"name": "eth0", "mac": mac(number), "link": True}],
        "bmc_address": None,
    }
    return {**found, **changes}


def profile_document(port: int = 22) -> Json:
    """A profile whose one health check is an SSH banner at `port`."""
    return {
        "variables": {"password": PROFILE_SECRET},
        "cloud_config": {"hostname": "${host.name}", "chpasswd": {"list": "a:${vars.password}"}},
        "disk": {"bus": "virtio", "size_min_bytes": 1 << 30},
        "health": {"soak_s": 10, "checks": [{"type": "ssh", "port": port}, {"type": "systemd"}]},
    }


def limits() -> Limits:
    """Limits of the same kind as the real ones, each with a length of its own."""
    return Limits(phase=LIMIT, agent_silence=timedelta(minutes=3))


@contextmanager
def running_site(
    url: str,
    archive: Archive,
    ramdisks: Path,
    *,
    discovery: bool = False,
    policy: Policy = Policy(),  # noqa: B008 # a frozen value
    rules: Rules | None = None,
    mark: Path | None = None,
) -> Iterator[Site]:
    """A service over the database at `url`, which has its tables already."""
    clock, outbox, pool = SetClock(NOW), Outbox(), FakeBmcPool()
    store = SqlStore(open_engine(url), outbox, sealing())
    derived = Derived(bytes(range(32)))
    guard = GuardFacts(rules=rules or Rules(in_flight_max=2))
    transitions = Transitions(clock, derived, limits(), TICKET_LIFETIME, policy=policy, guard=guard)
    recovery, shelf = Recovery(store, transitions, archive, clock), Ramdisks(ramdisks)
    mark = mark or Path(f"{url.removeprefix('sqlite:///')}.mark")
    high_water = HighWater(store, clock, MarkFile(mark))
    performer = _performer(store, transitions, pool, clock)
    leases: dict[str, frozenset[str]] = {}
    weak: dict[str, tuple[WeakLogin, ...]] = {}
    addresses = Addresses(lambda: leases or None, own=("127.0.0.1",))
    site = Site(
        clock=clock,
        outbox=outbox,
        pool=pool,
        store=store,
        archive=archive,
        hosts=Hosts(store, pool, clock, lambda where: pool.weak_logins(where, weak)),
        operations=Operations(store, transitions, clock, shelf.newest, archive),
        profiles=Profiles(store, clock),
        releases=Releases(store, archive, clock, transitions, tested_channels=[TESTED_CHANNEL]),
        boot=BootService(
            *(store, transitions, clock, derived, shelf),
            record=lambda event: keep(store, event),
            discovery=discovery,
            discovered_hosts_max=3,
            addresses=addresses,
        ),
        agents=_agents(store, transitions, clock, derived, addresses),
        audit=Audit(store),
        breakers=Breakers(store, clock),
        services=Services(store, clock),
        tokens=Tokens(store, clock),
        transitions=transitions,
        performer=performer,
        recovery=recovery,
        derived=derived,
        leases=leases,
        weak_bmcs=weak,
        sightings=Sightings(store, clock, derived),
        high_water=high_water,
        reconciliation=Reconciliation(store, transitions, clock),
        why=Why(store, guard, clock, Dhcp.FULL),
    )
    try:
        yield site
    finally:
        store.close()


def _performer(
    store: SqlStore, transitions: Transitions, pool: FakeBmcPool, clock: SetClock
) -> Performer:
    return Performer(
        store, transitions, pool, clock, soft_shutdown_limit=SOFT_SHUTDOWN, pause=clock.pass_
    )


def _agents(
    store: SqlStore,
    transitions: Transitions,
    clock: SetClock,
    derived: Derived,
    addresses: Addresses,
) -> AgentSessions:
    return AgentSessions(
        store,
        transitions,
        clock,
        derived,
        boot_url=BOOT_URL,
        mirrors=(MIRROR,),
        vendor_data=lambda nonce: f"#cloud-config\n# {nonce}\n",
        addresses=addresses,
    )


def keep(store: SqlStore, event: Event) -> None:
    """Save an event at once; the service saves it soon."""
    with store.begin() as tx:
        tx.add_event(event)


def state_of(site: Site) -> str:
    """Return host r1n1 with all its operations, to see that a refusal changed nothing."""
    return repr((site.hosts.show("r1n1"), site.operations.list("r1n1")))


def tamper(site: Site, statement: str) -> None:
    """Change the database behind the service's back, as somebody with the file could."""
    with site.store._engine.begin() as connection:
        connection.execute(text(statement))
