"""One process of the service: the real core, use cases and store, over simulated edges.

It holds nothing that outlives it. Killing it drops all its objects; the next one is built
from the database.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, TypeVar

from provisioner.core.contracts import Outgoing, Store, Tx
from provisioner.core.fleet import Rules
from provisioner.core.lifecycle import E, Limits, Step
from provisioner.core.model import Event, Json, OperationId, Secret
from provisioner.core.profile import Check
from provisioner.errors import Unavailable
from provisioner.service.agents import AgentSessions
from provisioner.service.audit import Audit
from provisioner.service.boot import BootService
from provisioner.service.breaker import Breakers
from provisioner.service.chance import Derived
from provisioner.service.facts import GuardFacts
from provisioner.service.health import Finding
from provisioner.service.hosts import Hosts
from provisioner.service.operations import Operations
from provisioner.service.performer import Performer
from provisioner.service.profiles import Profiles
from provisioner.service.reconciliation import Reconciliation
from provisioner.service.recovery import Recovery
from provisioner.service.releases import Releases
from provisioner.service.sightings import HighWater, Sightings
from provisioner.service.transitions import Transitions
from provisioner.service.worker import Worker
from provisioner.store.sealing import Sealing
from provisioner.store.sql_store import SqlStore

from .bmcs import SimBmcPool
from .effect_queue import SimEffectQueue, SimEffectWorker
from .observations import BugRaised, EffectBegan
from .ramdisk_agent import RamdiskAgent
from .scheduler import FOR_EVER_S, Answer, Group

if TYPE_CHECKING:
    from .world import World

T = TypeVar("T")
MASTER_KEY: Final = bytes(range(32))
BOOT_URL: Final = "http://10.77.0.1:8081"
SOFT_SHUTDOWN: Final = timedelta(seconds=90)
TICKET_LIFETIME: Final = timedelta(hours=1)
# The real worker looks every 0.2 s, and most looks find nothing new. Here it looks soon after
# something moved, every few seconds while health is checked, when a deadline has passed,
# and often enough not to take its own rest for an outage.
TICK_SOON_S: Final = (0.1, 2.0)
TICK_PROVING_S: Final = (0.5, 4.0)
TICK_IDLE_S: Final = 16.0
TRANSACTION_S: Final = (0.0, 0.02)
# No cipher: the seals themselves have tests of their own, and cost more than they tell here.
PLAIN: Final = Sealing(
    lambda _host, _column, secret: secret.reveal().encode(),
    lambda _host, _column, sealed: Secret(sealed.decode()),
)


@dataclass(frozen=True)
class Parts:
    """What a service is made of. The tests of the teeth put something broken into one place."""

    agents: type[AgentSessions] = AgentSessions
    boot: type[BootService] = BootService
    operations: type[Operations] = Operations
    performer: type[Performer] = Performer
    worker: type[Worker] = Worker
    recovery: type[Recovery] = Recovery
    effects: type[SimEffectWorker] = SimEffectWorker
    agent: type[RamdiskAgent] = RamdiskAgent
    limits: Limits = field(default_factory=Limits)
    rules: Rules | None = None  # None: those of the world
    store: Callable[[Store], Store] = lambda store: store
    performer_store: Callable[[Store], Store] = lambda store: store
    pool: type[SimBmcPool] = SimBmcPool
    high_water: type[HighWater] = HighWater
    reconciliation: type[Reconciliation] = Reconciliation


REAL: Final = Parts()


class CountingTransitions(Transitions):
    """Tells the world which rows of the tables were taken."""

    world: World

    def apply(
        self,
        tx: Tx,
        operation_id: OperationId,
        event: E,
        *,
        generation: int,
        actor: str,
        **more: Any,
    ) -> Step:
        # As it was before: the rows of the last commit, since nobody else writes meanwhile.
        known = self.world.ledger.now.operations.get(operation_id)
        step = super().apply(tx, operation_id, event, generation=generation, actor=actor, **more)
        if known is not None:
            self.world.rows_taken[(known.kind, known.phase, event)] += 1
        return step


class HurriedStore:
    """Lets others come in between any two transactions, as they would from other threads."""

    def __init__(self, store: Store, world: World) -> None:
        self._store = store
        self._world = world

    def begin(self) -> AbstractContextManager[Tx]:
        self._let_others_come(writes=True)
        return self._store.begin()

    def read(self) -> AbstractContextManager[Tx]:
        self._let_others_come(writes=False)
        return self._store.read()

    def close(self) -> None:
        """Nothing is held by this process alone."""

    def _let_others_come(self, *, writes: bool) -> None:
        # Where no task runs, the world itself asks, and nobody else moves.
        if self._world.scheduler.current is not None:
            self._world.faults.before_transaction(writes=writes)
            self._world.scheduler.sleep(self._world.chance.uniform(*TRANSACTION_S))


class Ticking(threading.Event):
    """What the worker's loop waits for: simulated time, and no end."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world
        self._moved: Answer[None] = Answer()

    def wait(self, timeout: float | None = None) -> bool:  # noqa: ARG002 # see TICK_SOON_S
        world, chance = self._world, self._world.chance
        if world.ledger.is_proving:
            world.scheduler.sleep(chance.uniform(*TICK_PROVING_S))
            return False
        limit_s = FOR_EVER_S
        if world.now_s - world.database_failed_s < TICK_IDLE_S:
            limit_s = TICK_PROVING_S[0]  # the last look may have failed
        elif world.ledger.now.open_operations or world.ledger.now.to_follow:
            first_s = min(world.ledger.first_deadline_s, world.ledger.first_follow_up_s)
            due_s = first_s - world.now_s
            limit_s = due_s if 0.0 < due_s < TICK_IDLE_S else TICK_IDLE_S
        world.scheduler.wait(self._moved, limit_s)
        world.scheduler.sleep(chance.uniform(*TICK_SOON_S))
        self._moved = Answer()
        return False

    def poke(self) -> None:
        """Have the worker look soon: an operation has moved."""
        self._moved.give()


class TaskExecutor(Executor):
    """Runs what is submitted in tasks of one group."""

    def __init__(self, world: World, group: Group, what: str) -> None:
        self._world = world
        self._group = group
        self._what = what

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except Unavailable as error:  # whoever takes the result is told
                future.set_exception(error)
            except Exception as error:  # noqa: BLE001 # the top of a task
                self._world.saw(BugRaised(self._what, error))
                future.set_exception(error)

        self._world.scheduler.spawn(f"{self._group.name} {self._what}", run, self._group)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """The tasks end with their group."""


class ServiceProcess:
    """Every use case over the database of a world, and the worker."""

    def __init__(self, world: World, name: str, parts: Parts) -> None:
        clock = world.scheduler.clock
        self.name = name
        self.group = Group(name)
        self._world = world
        self._ticking = Ticking(world)
        sql = SqlStore(world.database.engine, SimEffectQueue(), PLAIN)
        self.store: Store = parts.store(HurriedStore(sql, world))
        derived = Derived(MASTER_KEY)
        transitions = _transitions(world, parts, derived)
        pool, shelf, new_id = parts.pool(world), world.shelf, self._new_id
        self.operations = parts.operations(
            self.store, transitions, clock, shelf.newest, shelf, new_id
        )
        self.hosts = Hosts(self.store, pool, clock)
        self.breakers = Breakers(self.store, clock)
        self.profiles = Profiles(self.store, clock)
        self.releases = Releases(self.store, shelf, clock, transitions)
        self.audit = Audit(self.store)
        self.sightings = Sightings(self.store, clock, derived)
        self.high_water = parts.high_water(self.store, clock, world.mark)
        self.reconciliation = parts.reconciliation(self.store, transitions, clock)
        self.boot = parts.boot(
            self.store, transitions, clock, derived, shelf, record=self._keep, discovery=False
        )
        self.agents = parts.agents(
            self.store,
            transitions,
            clock,
            derived,
            boot_url=BOOT_URL,
            vendor_data=lambda nonce: nonce,
        )
        performer = parts.performer(
            parts.performer_store(self.store),
            transitions,
            pool,
            clock,
            soft_shutdown_limit=SOFT_SHUTDOWN,
            pause=world.scheduler.sleep,
        )
        self.effects = parts.effects(
            world.database, world.scheduler, self.group, name, on_error=self._effect_failed
        )
        self.worker = parts.worker(
            self.store,
            transitions,
            performer,
            _Watched(self.effects, world),
            clock,
            parts.recovery(self.store, transitions, shelf, clock, new_id),
            # Where nothing is restored, nobody has to pay for looking.
            high_water=self.high_water if world.keeps_backups else None,
            examine=self._examine,
            checkers=TaskExecutor(world, self.group, "check"),
            recoverer=TaskExecutor(world, self.group, "recovery"),
        )

    @property
    def is_frozen(self) -> bool:
        return self.group.frozen_until_s > self._world.now_s

    def start(self) -> None:
        run, ticking = self.worker.run, self._ticking
        self._world.scheduler.spawn(f"{self.name} worker", lambda: run(ticking), self.group)

    def poke(self, *, has_moved: bool) -> None:
        """Something was committed: effects may wait, and an operation may have moved."""
        self.effects.poke()
        if has_moved:
            self._ticking.poke()

    def _new_id(self, at: datetime) -> OperationId:
        return OperationId(self._world.new_operation_id(at))

    def _keep(self, event: Event) -> None:
        """The timeline: saved soon, by somebody else, and lost when that fails."""

        def save() -> None:
            try:
                with self.store.begin() as tx:
                    tx.add_event(event)
            except Unavailable:
                pass

        self._world.scheduler.spawn(f"{self.name} timeline", save, self.group)

    def _examine(self, checks: Sequence[Check], address: str, evidence: Json) -> list[Finding]:
        self._world.scheduler.sleep(self._world.chance.uniform(0.01, 5.0))
        failed = evidence.get("failed_units", [])
        is_up = self._world.answers_at(address) and not failed
        self._world.ledger.looked_s[address] = self._world.now_s
        return [Finding(check, is_up, "answers" if is_up else "silent") for check in checks]

    def _effect_failed(self, outgoing: Outgoing, error: Exception) -> None:
        # A database that was away for longer than an effect's patience is the one thing
        # that the performer may raise.
        self._world.note(f"effect {outgoing.key} ended with {error!r}")
        if not isinstance(error, Unavailable):
            self._world.saw(BugRaised(f"effect {outgoing.effect}", error))


def _transitions(world: World, parts: Parts, derived: Derived) -> Transitions:
    made = CountingTransitions(
        world.scheduler.clock,
        derived,
        parts.limits,
        TICKET_LIFETIME,
        new_key=lambda: world.new_name("fx"),
        policy=world.policy,
        guard=GuardFacts(rules=parts.rules or world.rules),
    )
    made.world = world
    return made


class _Watched:
    """The queue's worker, with each effect told to the world as it begins."""

    def __init__(self, effects: SimEffectWorker, world: World) -> None:
        self._effects = effects
        self._world = world

    def start(self, perform: Callable[[Outgoing], None]) -> None:
        def watched(outgoing: Outgoing) -> None:
            self._world.note(
                f"effect {outgoing.key} for {outgoing.operation_id}: {outgoing.effect}"
            )
            self._world.ledger.effects_begun.add(outgoing.key)
            self._world.saw(EffectBegan(outgoing.key, outgoing.partition))
            perform(outgoing)

        self._effects.start(watched)

    def stop(self) -> None:
        self._effects.stop()
