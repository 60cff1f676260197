"""One simulated site: a service, its database, hosts, people, and what goes wrong with them."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final

from provisioner.core.model import BmcAddress, Secret
from provisioner.errors import Unavailable
from provisioner.service.hosts import HostSpec

from . import invariants, invariants_limits, invariants_recovery, invariants_restore  # noqa: F401 # they are asked through `judging`
from .backups import Backup, SimMarkFile
from .bmcs import SimBmc
from .database import Database, Fate
from .draws import DISK_BYTES, PROFILE, host_of, labels_of, policy_of, rules_of
from .faults import Faults
from .hosts import SimHost
from .judging import broken_by, names
from .ledger import Ledger
from .logs import caught
from .network import Network
from .observations import (
    BugRaised,
    Committed,
    Ended,
    Observation,
    ServiceStarted,
    TimePassed,
    Wrote,
)
from .operators import ACTOR, Operators, count_deployments
from .scheduler import Killed, Scheduler, Task
from .service_process import REAL, Parts, ServiceProcess
from .shelf import Shelf, manifests
from .sizes import USUAL, Size
from .trace import Trace

BEGINS_AT: Final = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)
FIRST: Final = "service-1"
# A worker that was not heard of for so long has lost its work to another.
LEASE_S: Final = 20.0
RESTARTED_S: Final = (0.5, 25.0)
PROCESSES_MAX: Final = 2
# How long a second process stays, once it is there.
REPLICA_S: Final = (30.0, 240.0)
# How long it is watched after the last fault: long enough for what was done to show, and at
# most until a BMC that was slow to the end has been waited for as long as it may be.
QUIET_S: Final = 300.0
QUIET_MAX_S: Final = 1800.0
# When a run has taken too long altogether.
RUN_LIMIT_S: Final = 3 * 24 * 3600.0


@dataclass
class Outcome:
    """What became of a run. `broken` names the invariant and what is wrong."""

    seed: int
    broken: tuple[str, str] | None
    trace: str
    last: list[str]
    reimages: int
    events: int
    virtual_s: float
    faults: Counter[str] = field(default_factory=Counter)
    rows: Counter[Any] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)


class World:
    """Everything of one run, made from one seed."""

    def __init__(
        self,
        seed: int,
        parts: Parts = REAL,
        size: Size = USUAL,
        echo: Callable[[str], None] | None = None,
        judges: Sequence[str] = (),
    ) -> None:
        """`judges` are the invariants that are looked at; none named means all."""
        self.seed = seed
        self.judges = frozenset(judges or names())
        self.chance = random.Random(seed)
        self.scheduler = Scheduler(self.chance, BEGINS_AT)
        self.trace = Trace(echo)
        self.database = Database()
        self.ledger = Ledger(self.database, self.scheduler)
        self.network = Network(self)
        self.shelf = Shelf()
        self.rows_taken: Counter[Any] = Counter()
        self.broken: tuple[str, str] | None = None
        self.database_failed_s = float("-inf")  # when it last did
        self.processes: list[ServiceProcess] = []
        # Drawn apart, so that a world without it is the same with any share of others.
        self.keeps_backups = random.Random(f"backups {seed}").random() < size.restored_share
        self.mark = SimMarkFile()
        self.is_stopped = False  # by a person, who is putting a backup back
        self.parts = parts
        self.size = size
        self.faults = Faults(self, size.intensities[seed % len(size.intensities)])
        self.policy = policy_of(self)
        self.rules = rules_of(self)
        self._ever_started: set[str] = set()
        self._names: Counter[str] = Counter()
        self.hosts_to_reimage = [
            host_of(self, number)
            for number in range(1, self.chance.randint(size.hosts_min, size.hosts_max) + 1)
        ]
        # One that is managed and that nobody wants reimaged, and one that nobody knows.
        self.others = [host_of(self, number, is_network_first=True) for number in (90, 91)]
        self.operators = Operators(self)
        self._connect()

    @property
    def now_s(self) -> float:
        return self.scheduler.now_s

    def run(self) -> Outcome:
        caught()  # what another run may have left
        try:
            self._prepare()
            self._work()
            self._let_it_rest()
            return self._outcome()
        finally:
            self.scheduler.close()
            self.database.close()

    # What others ask of it.

    def note(self, text: str) -> None:
        self.trace.add(self.now_s, text)

    def saw(self, observation: Observation) -> None:
        """Judge what was seen; a run ends with the first invariant that is broken."""
        if isinstance(observation, Wrote):
            self.ledger.note_write(observation.operation_id, observation.grant)
        if self.broken is None:
            self.broken = broken_by(observation, self)
            if self.broken is not None:
                self.note(f"BROKEN {self.broken[0]}: {self.broken[1]}")

    def new_name(self, kind: str) -> str:
        self._names[kind] += 1
        return f"{kind}_{self._names[kind]:04d}"

    def new_operation_id(self, at: datetime) -> str:
        """Return a short name to read; where databases are lost, one that tells when it was
        drawn, as the real ones do."""
        name = self.new_name("op")
        return f"op_{int(at.timestamp()):08x}{name[3:]:0>16}" if self.keeps_backups else name

    def host_named(self, name: str) -> SimHost:
        return next(host for host in self._all_hosts() if host.name == name)

    def name_of(self, mac: str) -> str:
        return next(host.name for host in self._all_hosts() if host.mac == mac)

    def bmc_at(self, address: str) -> SimBmc:
        return next(host.bmc for host in self._all_hosts() if host.bmc_address == address)

    def disk_meant_on(self, host: SimHost) -> str:
        """Return the serial of the one disk that the profile's rule picks."""
        return next(disk.serial for disk in host.disks if disk.size_bytes == DISK_BYTES)

    def answers_at(self, address: str) -> bool:
        """Return whether the system of the host at an address is up and well."""
        host = next((one for one in self._all_hosts() if one.address == address), None)
        if host is None or host.runs_from is None:
            return False
        ill_until_s = max(host.troubles.is_unhealthy_until_s, host.troubles.is_apart_until_s)
        return self.now_s >= ill_until_s

    def verify_audit(self) -> None:
        service = ServiceProcess(self, "auditor", REAL)
        service.audit.verify()

    # Processes of the service.

    def front(self) -> ServiceProcess | None:
        """Return the process that a request comes to; one that stands still takes it, too."""
        awake = [process for process in self.processes if not process.is_frozen]
        candidates = awake or self.processes
        return self.chance.choice(candidates) if candidates else None

    def process_of_task(self) -> ServiceProcess | None:
        """Return the process of the service whose task runs now."""
        task = self.scheduler.current
        found = [one for one in self.processes if task is not None and one.group is task.group]
        return found[0] if found else None

    def die(self) -> None:
        """Kill the process that runs now. Does not return."""
        process = self.process_of_task()
        assert process is not None
        self._kill(process)
        raise Killed

    def kill_one(self) -> None:
        if self.processes:
            self._kill(self.chance.choice(self.processes))

    def freeze_one(self, seconds: float) -> None:
        """Have one of the processes stand still."""
        if self.processes:
            self.freeze(self.chance.choice(self.processes), seconds)

    def freeze(self, process: ServiceProcess, seconds: float) -> None:
        """Have a process stand still; past its lease another one takes its work over."""
        self.note(f"{process.name} stands still for {seconds:.0f} s")
        self.scheduler.freeze(process.group, seconds)
        self.wellness_changed()
        self.scheduler.after(seconds, self.wellness_changed)
        if seconds > LEASE_S:
            self.scheduler.after(LEASE_S, lambda: self._replace(process))

    def take_database_away(self, seconds: float) -> None:
        def back() -> None:
            self.database.is_down = False
            self.database_failed_s = self.now_s
            self.wellness_changed()

        self.note(f"the database is away for {seconds:.0f} s")
        self.database.is_down = True
        self.wellness_changed()
        self.scheduler.after(seconds, back)

    def wellness_changed(self) -> None:
        """Note since when a service runs that can do its work."""
        works = any(not process.is_frozen for process in self.processes)
        is_well = works and not self.database.is_down and not self.ledger.is_behind
        self.ledger.well_since_s = self.now_s if is_well else float("inf")
        self.ledger.stuck_at_s, self.ledger.overdue_at_s = None, None

    # Backups.

    def back_up(self) -> Backup:
        made = self.database.copy(), self.ledger.memory(), self.ledger.audit_rows(), self.now_s
        self.note("a backup is made")
        return Backup(*made)

    def stop_services(self) -> None:
        """Stop every process, until a backup was put back. It begins nothing any more, and what a
        BMC was told last is done by then."""
        self.note("the service is stopped")
        self.is_stopped = True
        for process in list(self.processes):
            self._end(process)

    def put_back(self, backup: Backup) -> None:
        """Replace the database by an older one, and start the service again. The mark beside it
        stays, as the page on restoring says."""
        self.faults.count("database restored", f"{self.now_s - backup.made_s:.0f} s old")
        self.database.put_back(backup.content)
        self.ledger.put_back(backup.memory)
        self.is_stopped = False
        self._start_service(FIRST)

    def _end(self, process: ServiceProcess) -> None:
        self.note(f"{process.name} is killed")
        self.processes.remove(process)
        self.scheduler.kill(process.group)
        self.wellness_changed()

    def _kill(self, process: ServiceProcess) -> None:
        self._end(process)
        restart_s = self.chance.uniform(*RESTARTED_S)
        self.scheduler.after(restart_s, lambda: self._restart(process.name))

    def _restart(self, name: str) -> None:
        if self.processes and name != FIRST:
            self._have_taken_over(self.processes[0], name)
        else:
            self._start_service(name)

    def _replace(self, process: ServiceProcess) -> None:
        """Have another process take over from one that stands still, or died meanwhile."""
        if process not in self.processes or not process.is_frozen:
            return
        others = [one for one in self.processes if one is not process]
        if not others and len(self.processes) < PROCESSES_MAX:
            replica = self._start_service(self.new_name("replica"))
            if replica is not None:
                stays_s = self.chance.uniform(*REPLICA_S)
                self.scheduler.after(stays_s, lambda: self._take_down(replica))
                others = [replica]
        for other in others[:1]:
            self._have_taken_over(other, process.name)

    def _have_taken_over(self, process: ServiceProcess, name: str) -> None:
        self.note(f"{process.name} takes over from {name}")
        take_over = process.effects.take_over
        self.scheduler.spawn("takeover", lambda: take_over(name), process.group)

    def _take_down(self, replica: ServiceProcess) -> None:
        if replica in self.processes:
            self._kill(replica)

    def _start_service(self, name: str) -> ServiceProcess | None:
        if self.is_stopped:
            return None
        self.note(f"{name} starts")
        process = ServiceProcess(self, name, self.parts)
        if self.keeps_backups:
            try:
                process.high_water.look()  # before any part of it can permit anything
            except Unavailable:
                self.scheduler.after(RESTARTED_S[1], lambda: self._restart(name))
                return None
            self.saw(ServiceStarted(name))
        self.processes.append(process)
        process.start()
        alive = {one.name for one in self.processes}
        for dead in sorted(self._ever_started - alive):
            self._have_taken_over(process, dead)
        self._ever_started.add(name)
        self.wellness_changed()
        return process

    # The course of a run.

    def _prepare(self) -> None:
        service = ServiceProcess(self, "setup", REAL)
        for manifest in manifests().values():
            service.releases.register(manifest, 1, actor=ACTOR)
        service.profiles.save("web", PROFILE, actor=ACTOR)
        for host in [*self.hosts_to_reimage, self.others[0]]:
            where = BmcAddress(host.bmc_address, 623, "admin", Secret("bmc-password"))
            labels = labels_of(self)
            spec = HostSpec(host.name, (host.mac,), where, profile="web", labels=labels)
            service.hosts.add(spec, actor=ACTOR)
        for host in self._all_hosts():
            self.scheduler.after(self.chance.uniform(0.0, 5.0), host.switch_on)
        for host in self.others:
            for _ in range(2):
                restart = partial(host.restart, "by hand")
                self.scheduler.after(self.chance.uniform(60.0, 900.0), restart)
        self._start_service(FIRST)
        if self.chance.random() < self.size.two_services_share:
            self._start_service(self.new_name("replica"))
        self.operators.begin()

    def _work(self) -> None:
        self.scheduler.run(lambda: self.broken is not None or self._is_done(), RUN_LIMIT_S)

    def _is_done(self) -> bool:
        now = self.ledger.now
        return self.operators.busy == 0 and not now.open_operations and not now.to_follow

    def _let_it_rest(self) -> None:
        """End the faults, give everything its time, and judge what is left."""
        if self.broken is not None:
            return
        self.faults.is_over = True
        ends_s = self.now_s + QUIET_MAX_S
        self._watch(QUIET_S)
        while self.broken is None and self.now_s < ends_s and self._is_unfinished():
            # A request that was late on its way comes in when all seems to be over.
            self._work()
            self._watch(QUIET_S)
        self.saw(Ended())

    def _is_unfinished(self) -> bool:
        return bool(self.ledger.waiting_effects()) or not self._is_done()

    def _watch(self, seconds: float) -> None:
        until_s = self.now_s + seconds
        self.scheduler.after(seconds, lambda: None)
        self.scheduler.run(
            lambda: self.broken is not None or self.now_s >= until_s, RUN_LIMIT_S * 2
        )

    def _outcome(self) -> Outcome:
        found = self.ledger.now.operations.values()
        return Outcome(
            seed=self.seed,
            broken=self.broken,
            trace=self.trace.digest,
            last=list(self.trace.last),
            reimages=count_deployments(self),
            events=self.scheduler.events,
            virtual_s=self.now_s,
            faults=self.faults.had,
            rows=self.rows_taken,
            ended=Counter(f"{one.kind} {one.phase}" for one in found),
        )

    def _connect(self) -> None:
        self.database.fate_of_commit = self._fate_of_commit
        self.database.committed = self._committed
        self.database.die = self.die
        self.scheduler.check_may_wait = self._check_may_wait
        self.scheduler.on_bug = self._bug
        self.scheduler.after_event = self._after_event

    def _fate_of_commit(self) -> Fate:
        fate = self.faults.fate_of_commit()
        if fate is not Fate.GOOD:
            self.database_failed_s = self.now_s
        return fate

    def _committed(self) -> None:
        self.ledger.committed()
        if self.ledger.is_reconciling:
            self.wellness_changed()
        has_moved = self._note_moves()
        self.saw(Committed())
        for process in self.processes:
            process.poke(has_moved=has_moved)

    def _note_moves(self) -> bool:
        before, now = self.ledger.before.operations, self.ledger.now.operations
        has_moved = False
        for key, operation in now.items():
            known = before.get(key)
            if known is None and operation.after is not None:
                # It follows by itself, and as much goes wrong as for what people ask for.
                host = self.host_named(self.ledger.now.host_of(operation).name)
                self.faults.plan_for(host)
                self.operators.consider(host)
            if known is None or (known.phase, known.rung) != (operation.phase, operation.rung):
                name = self.ledger.now.host_of(operation).name
                self.note(f"{key} {operation.kind} of {name}: {operation.phase} {operation.rung}")
                has_moved = True
        return has_moved

    def _check_may_wait(self) -> None:
        if self.database.in_transaction:
            error = AssertionError("somebody waits while it holds the database")
            self.saw(BugRaised("a transaction", error))

    def _after_event(self) -> None:
        for said, error in caught():
            self.saw(BugRaised(said, error))
        self.saw(TimePassed())

    def _bug(self, task: Task, error: Exception) -> None:
        self.saw(BugRaised(task.name, error))

    def _all_hosts(self) -> list[SimHost]:
        return [*self.hosts_to_reimage, *self.others]


def simulate(
    seed: int,
    parts: Parts = REAL,
    size: Size = USUAL,
    echo: Callable[[str], None] | None = None,
    judges: Sequence[str] = (),
) -> Outcome:
    """Run one seed and return what became of it."""
    return World(seed, parts, size, echo, judges).run()
