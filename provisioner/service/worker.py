"""The reconciler: starts what is queued, ends what is overdue, proves what has booted.

It looks at the database, decides with the core and saves; effects are performed by the
durable queue beside it. Nothing it needs is only in its memory, so it may die at any line.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any, Final

import structlog

from provisioner.core.contracts import Clock, EffectWorker, Store, Tx
from provisioner.core.guard import (
    HostRefused,
    Wait,
    authorise_ticket,
    left_alone,
    why_not_begun,
)
from provisioner.core.lifecycle import E, NotAllowed, deadline_event
from provisioner.core.model import FINAL, Host, Json, Kind, Operation, OperationId, Phase, Profile
from provisioner.core.profile import SOAK_MAX_S, Check, Health, ProfileUnreadable, health_of
from provisioner.errors import ProvisionerError, Unavailable

from .agent_orders import pinned_profile
from .clock_watch import ClockWatch
from .health import CHECK_LIMIT_S, Finding, check_all
from .performer import Performer
from .proof import HEALTHY_SINCE, REPORT, is_overtaken, judge
from .recovery import Recovery
from .sightings import HighWater
from .transitions import Transitions
from .waiting import Waits

log = structlog.get_logger(__name__)

TICK_S: Final = 0.2
START_PAUSE_S: Final = 1.0
MARK_EVERY: Final = timedelta(seconds=5)
OVERDUE_EVERY: Final = timedelta(seconds=1)
RECOVERY_EVERY: Final = timedelta(seconds=1)
CHECK_EVERY: Final = timedelta(seconds=2)
# A worker that saw nothing for OUTAGE takes the silence of others for its own fault. Agents
# and reporters try again after 30 s at the latest, so they are heard within OUTAGE_GRACE.
OUTAGE: Final = timedelta(seconds=20)
OUTAGE_GRACE: Final = timedelta(seconds=45)
# How old what was seen may be when it is saved, besides the time that its checks may take: a
# database may be waited for, but a worker that stood still has seen nothing.
LOOK_LIMIT: Final = timedelta(seconds=20)
CHECKERS_MAX: Final = 16
BATCH_MAX: Final = 100
# Of each group only the oldest are looked at, so many with an active host and so many others:
# what makes one wait makes all behind it wait, but the floor holds back active hosts only.
PER_GROUP_MAX: Final = 50
WAITING_LOOK: Final = timedelta(seconds=1)
RECONCILER: Final = "reconciler"
# Looks once at a host: its checks, where it answers, and what it said of itself.
Examine = Callable[[Sequence[Check], str, Json], list[Finding]]


class Worker:
    def __init__(
        self,
        store: Store,
        transitions: Transitions,
        performer: Performer,
        effects: EffectWorker,
        clock: Clock,
        recovery: Recovery,
        *,
        high_water: HighWater | None = None,
        clock_watch: ClockWatch | None = None,
        examine: Examine = check_all,
        checkers: Executor | None = None,
        recoverer: Executor | None = None,
    ) -> None:
        """`examine` looks at a host from outside, and `checkers` run it, so that a host that is
        slow to answer holds up no other. `recoverer` takes follow-ups: the release archive may
        be slow to answer, and deadlines are not to wait for it. By default these are threads."""
        self._store = store
        self._transitions = transitions
        self._performer = performer
        self._effects = effects
        self._clock = clock
        self._recovery = recovery
        self._recoverer = recoverer or ThreadPoolExecutor(1, thread_name_prefix="recovery")
        self._recovering: Future[None] | None = None
        self._guard = transitions.guard
        self._waits = Waits(store, transitions.guard, clock)
        self._has_waiting = False
        self._next_start = clock()
        self._high_water, self._clock_watch = high_water, clock_watch
        self._next_mark = clock()
        self._examine = examine
        self._checkers = checkers or ThreadPoolExecutor(CHECKERS_MAX, thread_name_prefix="health")
        self._checking: dict[OperationId, Future[None]] = {}
        self._next_check: dict[OperationId, datetime] = {}
        self._seen_at: datetime | None = None  # when everything could be looked at last
        self._next_overdue = self._next_recovery = clock()

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set, then finish what is being done and return."""
        if not self._begin(stop):
            return
        try:
            while not stop.wait(TICK_S):
                try:
                    self.tick()
                except ProvisionerError as error:
                    # The database may be away for a while. The next tick looks again, and
                    # nothing was decided meanwhile.
                    log.warning("tick failed", why=error.message)
        finally:
            self._checkers.shutdown(wait=True, cancel_futures=True)
            self._recoverer.shutdown(wait=True, cancel_futures=True)
            self._effects.stop()

    def _begin(self, stop: threading.Event) -> bool:
        """Begin to perform effects, as soon as the database answers; False when told to stop
        before that."""
        while not stop.is_set():
            try:
                self._effects.start(self._performer.perform)
            except Unavailable as error:
                log.warning("worker waits for the database", why=error.message)
                stop.wait(START_PAUSE_S)
            else:
                return True
        return False

    def tick(self) -> None:
        """Look once at everything. After an outage nothing is ended at first: whoever could
        not be heard is given time to speak."""
        now = self._clock()
        self._bound_intervals(now)
        is_wrong = self._clock_watch is not None and self._clock_watch.is_wrong()
        if is_wrong or self._only_observes(now):
            return
        if self._seen_at is None or now - self._seen_at > OUTAGE:
            self._next_overdue = now + OUTAGE_GRACE
        if now >= self._next_recovery:
            self.begin_recovery()
            self._next_recovery = now + RECOVERY_EVERY
        if now >= self._next_start:
            self.start_queued()
            # Who waits now waits a moment later as well, and the queue may be long.
            self._next_start = now + (WAITING_LOOK if self._has_waiting else timedelta())
        self.prove_booted()
        if self._clock() - now > OUTAGE:
            self._next_overdue = self._clock() + OUTAGE_GRACE  # stopped in the middle
        if now >= self._next_overdue:
            self.end_overdue()
            self._next_overdue = now + OVERDUE_EVERY
        self._seen_at = self._clock()

    def _bound_intervals(self, now: datetime) -> None:
        """Let nothing be further away than if its interval began now: a clock that is set back
        would have it wait for as long as it was set back."""
        self._next_mark = min(self._next_mark, now + MARK_EVERY)
        self._next_start = min(self._next_start, now + WAITING_LOOK)
        self._next_recovery = min(self._next_recovery, now + RECOVERY_EVERY)
        self._next_overdue = min(self._next_overdue, now + OUTAGE_GRACE)
        soon = now + CHECK_EVERY
        self._next_check = {key: min(at, soon) for key, at in self._next_check.items()}

    def _only_observes(self, now: datetime) -> bool:
        """Hold the database against the mark now and then; say whether it was restored."""
        if self._high_water is not None and now >= self._next_mark:
            self._high_water.look()
            self._next_mark = now + MARK_EVERY
        with self._store.read() as tx:
            return tx.is_observing()

    def begin_recovery(self) -> None:
        """Begin to take the follow-ups that are due, unless that is still being done. What went
        wrong the last time is raised here, where it is noticed."""
        if self._recovering is not None:
            if not self._recovering.done():
                return
            done, self._recovering = self._recovering, None
            done.result()
        self._recovering = self._recoverer.submit(self._recovery.take_due)

    def start_queued(self) -> None:
        """Start queued operations whose turn has come, oldest first, and tell the others'
        timelines why they wait."""
        with self._store.read() as tx:
            queue = tx.queued(per_group_max=PER_GROUP_MAX)
            if not queue:
                self._has_waiting = False
                return
            view = self._guard.view(tx, {one.group for one in queue}, self._clock())
        started, held = 0, []
        for queued in queue:
            if (reason := view.why_waits(queued)) is not None:
                held.append((queued, reason))
            elif started < BATCH_MAX and self._start(queued.operation_id):
                view.count_start(queued)
                started += 1
        self._waits.tell(held)
        self._has_waiting = bool(held)

    def _start(self, operation_id: OperationId) -> bool:
        """Start it, or end it when its host was flagged since it was requested, or its profile
        does not open any more. Return whether it was started."""
        with _alone(operation_id), self._store.begin() as tx:
            # One transaction: a flag that was set before it is seen, or waits for it.
            operation = tx.operation(operation_id)
            if operation.phase is not Phase.QUEUED:
                return False  # another worker was quicker, or it was cancelled
            host = tx.host(operation.host_id)
            # The fleet first: it holds the breaker's row, so that nobody opens it after our look.
            fleet = self._guard.fleet(tx, host, self._clock())
            facts = self._guard.of(tx, operation, host)
            try:
                permit = authorise_ticket(operation, host, facts, fleet, self._guard.rules)
                if isinstance(permit, Wait):
                    return False
                if (profile := pinned_profile(tx, operation)) is not None:
                    profile.text.reveal()
            except (HostRefused, ProfileUnreadable) as refusal:
                error = {"host": host.name, **refusal.as_dict()}
                self._move(tx, operation, E.REFUSED, error=error)
                return False
            self._move(tx, operation, E.START, permit=permit, progress={})
            return True
        return False

    def end_overdue(self) -> None:
        """Give every operation whose deadline has passed its next rung or its end."""
        looked_at = self._clock()
        with self._store.read() as tx:
            overdue = tx.operations(
                phases=[phase for phase in Phase if phase not in FINAL],
                overdue_at=looked_at,
                newest_first=False,
                limit=BATCH_MAX,
            )
        for operation in overdue:
            if self._clock() - looked_at > OUTAGE:
                return  # stopped meanwhile: they may speak first
            with _alone(operation.id):
                self._end_or_hold(operation)

    def _end_or_hold(self, seen: Operation) -> None:
        """End what is overdue; but who only waits for its turn may wait on, for a while.

        Judged by what is saved at that moment: it may have been heard of since it was seen,
        or another worker have ended it.
        """
        waits = self._waits.why([seen]).get(seen.id)
        with self._store.begin() as tx:
            operation, now = tx.operation(seen.id), self._clock()
            if operation.deadline_at is None or now < operation.deadline_at:
                return
            host = tx.host(operation.host_id)
            flagged = why_not_begun(operation, host)
            error: Json | None = overdue_error(operation, host, now, waits)
            event = deadline_event(operation)
            if waits is not None and self._transitions.limits.may_wait(operation, now):
                event, error = E.HELD, None
            elif flagged is not None and operation.phase is Phase.NETBOOTING:
                # No further rung for a host that somebody has put aside since.
                event, error = E.REFUSED, left_alone(host, flagged).as_dict()
            self._move(tx, operation, event, error=error)

    def prove_booted(self) -> None:
        """Begin a round of health checks for each operation that is due one."""
        with self._store.read() as tx:
            proving = tx.operations(phases=[Phase.PROVING], newest_first=False, limit=1000)
        now = self._clock()
        live = {operation.id for operation in proving}
        self._next_check = {key: at for key, at in self._next_check.items() if key in live}
        self._checking = {key: work for key, work in self._checking.items() if not work.done()}
        for operation in proving:
            due = self._next_check.get(operation.id, now) <= now
            if due and operation.id not in self._checking:
                self._next_check[operation.id] = now + CHECK_EVERY
                work = self._checkers.submit(self.check, operation.id)
                work.add_done_callback(_tell_bug)
                self._checking[operation.id] = work

    def check(self, operation_id: OperationId) -> None:
        """Make one round of checks and save what it means.

        Judged by what is saved at that moment: another round may have ended before this one.
        """
        try:
            with self._store.read() as tx:
                operation = tx.operation(operation_id)
                profile = pinned_profile(tx, operation)
            began_at = self._clock()
            health, findings = self._look(operation, profile)
            with self._store.begin() as tx:
                now = self._clock()
                if now - began_at > LOOK_LIMIT + len(findings) * timedelta(seconds=CHECK_LIMIT_S):
                    log.warning("health check came too late", operation=operation_id)
                    return
                current = tx.operation(operation_id)
                if is_overtaken(operation, current):
                    # What was looked at is not what it says by now: the next round is soon.
                    log.info("health check overtaken by a report", operation=operation_id)
                    return
                event, evidence = judge(current, findings, health, began_at=began_at, now=now)
                self._move(tx, operation, event, evidence=evidence)
        except NotAllowed as refusal:
            log.info("decision overtaken", operation=operation_id, why=refusal.message)
        except ProvisionerError as error:
            log.warning("health check not saved", operation=operation_id, why=error.message)

    def _look(self, operation: Operation, profile: Profile | None) -> tuple[Health, list[Finding]]:
        """Return what a profile asks for, and what was found. One that does not open is found
        unhealthy: it may be mended, or the master key come back, while there is time."""
        try:
            health = health_of(profile.document if profile else {})
        except ProfileUnreadable as error:
            return Health((), SOAK_MAX_S), [Finding(Check("profile"), False, error.message)]
        address = operation.evidence.get("address", "")
        return health, self._examine(health.checks, address, operation.evidence)

    def _move(self, tx: Tx, operation: Operation, event: E, **more: Any) -> None:
        self._transitions.apply(
            tx,
            operation.id,
            event,
            generation=operation.generation,
            actor=RECONCILER,
            **more,
        )


def _tell_bug(work: Future[None]) -> None:
    """Log what a round of checks raised that nobody expects: no one else looks at it."""
    if not work.cancelled() and (error := work.exception()) is not None:
        log.error("health check raised", exc_info=error)


@contextmanager
def _alone(operation_id: OperationId) -> Iterator[None]:
    """Let what is wrong with one operation or its host not keep the others from going on."""
    try:
        yield
    except Unavailable:
        raise
    except NotAllowed as refusal:
        log.info("decision overtaken", operation=operation_id, why=refusal.message)
    except ProvisionerError as error:
        log.error("operation not moved", operation=operation_id, why=error.message)


_EXPECTED: Final[dict[Phase, tuple[str, str]]] = {
    Phase.QUEUED: ("its turn to start", "raise the limit that kept it waiting"),
    Phase.NETBOOTING: (
        "the boot ticket to come back from the ramdisk",
        "look at the host's console and at its boot order; the network must reach our DHCP. It "
        "was told to boot its disk, and not restarted: `provisioner host power HOST reset` if it "
        "hangs",
    ),
    Phase.PREPARING: ("the agent to ask for its permission", "look at the host's console"),
    Phase.WRITING: ("reports of the agent", "look at the host's console; then reimage it again"),
    Phase.VERIFYING: ("reports of the agent", "look at the host's console; then reimage it again"),
    Phase.BOOTING: (
        "the new system to phone home",
        "look at the host's console: did it boot its disk, did cloud-init and the network come up?",
    ),
    Phase.PROVING: ("all health checks to hold for the soak time", "look at the failed checks"),
}


def overdue_error(
    operation: Operation, host: Host, now: datetime, waits: str | None = None
) -> Json:
    """Return why an operation ends that ran out of time, as an error in JSON. `waits` is what
    kept it from starting."""
    expected, hint = _EXPECTED[operation.phase]
    if operation.kind is Kind.VERIFICATION and operation.phase is Phase.VERIFYING:
        hint = "look at the host's console; its disk was only read"
    waited = int((now - operation.phase_at).total_seconds())
    found = f"nothing for {waited} s" if waits is None else f"after {waited} s it waits: {waits}"
    if operation.phase is Phase.PROVING:
        checks: Json = operation.evidence.get("checks", {})
        bad = {name: check["found"] for name, check in checks.items() if not check["healthy"]}
        since = operation.evidence.get(HEALTHY_SINCE)
        found = f"unhealthy: {bad}" if bad or not since else f"healthy since {since} only"
        if REPORT in bad:
            hint = "look at the host's console: does it still run the new system?"
    return {
        "code": f"{operation.phase}_timed_out",
        "message": f"host {host.name} ran out of time in {operation.phase}",
        "host": host.name,
        "expected": expected,
        "found": found,
        "hint": f"{hint} (provisioner why {host.name})",
    }
