"""The reconciler: starts what is queued, ends what is overdue, proves what has booted.

It looks at the database, decides with the core and saves; effects are performed by the
durable queue beside it. Nothing it needs is only in its memory, so it may die at any line.
"""

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Final

import structlog

from provisioner.core.contracts import Clock, EffectWorker, Store
from provisioner.core.lifecycle import E, NotAllowed, deadline_event
from provisioner.core.model import FINAL, Host, Json, Kind, Operation, OperationId, Phase
from provisioner.core.profile import Health, health_of
from provisioner.errors import ProvisionerError, Unavailable

from .boot import DISCOVERY_ACTOR
from .health import Finding, check_all
from .operations import why_not_started
from .performer import Performer
from .sightings import HighWater
from .transitions import Transitions

log = structlog.get_logger(__name__)

TICK_S: Final = 0.2
START_PAUSE_S: Final = 1.0
MARK_EVERY: Final = timedelta(seconds=5)
OVERDUE_EVERY: Final = timedelta(seconds=1)
CHECK_EVERY: Final = timedelta(seconds=2)
# A worker that saw nothing for OUTAGE takes the silence of others for its own fault. Agents
# and reporters try again after 30 s at the latest, so they are heard within OUTAGE_GRACE.
OUTAGE: Final = timedelta(seconds=20)
OUTAGE_GRACE: Final = timedelta(seconds=45)
CHECKERS_MAX: Final = 16
BATCH_MAX: Final = 100
RECONCILER: Final = "reconciler"
_IN_FLIGHT: Final = [phase for phase in Phase if phase not in FINAL and phase is not Phase.QUEUED]


class Worker:
    def __init__(
        self,
        store: Store,
        transitions: Transitions,
        performer: Performer,
        effects: EffectWorker,
        clock: Clock,
        *,
        in_flight_max: int,
        high_water: HighWater | None = None,
    ) -> None:
        self._store = store
        self._transitions = transitions
        self._performer = performer
        self._effects = effects
        self._clock = clock
        self._in_flight_max = in_flight_max
        self._high_water = high_water
        self._next_mark = clock()
        self._checkers = ThreadPoolExecutor(CHECKERS_MAX, thread_name_prefix="health")
        self._checking: dict[OperationId, Future[None]] = {}
        self._next_check: dict[OperationId, datetime] = {}
        self._seen_at: datetime | None = None  # when everything could be looked at last
        self._next_overdue = clock()

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
        if self._only_observes(now):
            return
        if self._seen_at is None or now - self._seen_at > OUTAGE:
            self._next_overdue = now + OUTAGE_GRACE
        self.start_queued()
        self.prove_booted()
        if now >= self._next_overdue:
            self.end_overdue()
            self._next_overdue = now + OVERDUE_EVERY
        self._seen_at = self._clock()

    def _only_observes(self, now: datetime) -> bool:
        """Hold the database against the mark now and then; say whether it was restored."""
        if self._high_water is not None and now >= self._next_mark:
            self._high_water.look()
            self._next_mark = now + MARK_EVERY
        with self._store.read() as tx:
            return tx.is_observing()

    def start_queued(self) -> None:
        """Start queued operations, oldest first, while fewer than the limit are in flight."""
        with self._store.read() as tx:
            queued = tx.operations(phases=[Phase.QUEUED], newest_first=False, limit=BATCH_MAX)
            if not queued:
                return
            # Unknown machines come on their own; a rack of them must not hold up those
            # that somebody asked for. They have a limit of their own.
            in_flight = tx.count_operations(_IN_FLIGHT, not_by=DISCOVERY_ACTOR)
        for operation in queued[: max(self._in_flight_max - in_flight, 0)]:
            with _alone(operation):
                self._start(operation)

    def _start(self, operation: Operation) -> None:
        """Start it, or end it when its host was flagged since it was requested."""
        try:
            # One transaction: a flag that was set before it is seen, or waits for it.
            with self._store.begin() as tx:
                operation = tx.operation(operation.id)
                host = tx.host(operation.host_id)
                reason = why_not_started(operation, host)
                self._transitions.apply(
                    tx,
                    operation.id,
                    E.START if reason is None else E.REFUSED,
                    generation=operation.generation,
                    actor=RECONCILER,
                    error=_refused_error(host, reason) if reason is not None else None,
                )
        except NotAllowed as refusal:
            log.info("decision overtaken", operation=operation.id, why=refusal.message)

    def end_overdue(self) -> None:
        """Give every operation whose deadline has passed its next rung or its end."""
        with self._store.read() as tx:
            overdue = tx.operations(
                phases=[phase for phase in Phase if phase not in FINAL],
                overdue_at=self._clock(),
                newest_first=False,
                limit=BATCH_MAX,
            )
        for operation in overdue:
            with _alone(operation):
                self._apply(operation, deadline_event(operation), error=self._overdue(operation))

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
                self._checking[operation.id] = self._checkers.submit(self.check, operation.id)

    def check(self, operation_id: OperationId) -> None:
        """Make one round of checks and save what it means."""
        try:
            with self._store.read() as tx:
                operation = tx.operation(operation_id)
                profile = tx.profile_revision(operation.pins.get("profile", ""))
            health = health_of(profile.document if profile else {})
            address = operation.evidence.get("address", "")
            findings = check_all(health.checks, address, operation.evidence)
            event, evidence = judge(operation, findings, health, self._clock())
            self._apply(operation, event, evidence=evidence)
        except ProvisionerError as error:
            log.warning("health check not saved", operation=operation_id, why=error.message)

    def _apply(
        self,
        operation: Operation,
        event: E,
        *,
        error: Json | None = None,
        evidence: Json | None = None,
    ) -> None:
        try:
            with self._store.begin() as tx:
                self._transitions.apply(
                    tx,
                    operation.id,
                    event,
                    generation=operation.generation,
                    actor=RECONCILER,
                    error=error,
                    evidence=evidence,
                )
        except NotAllowed as refusal:
            # Something else happened since we looked; the next look decides anew.
            log.info("decision overtaken", operation=operation.id, why=refusal.message)

    def _overdue(self, operation: Operation) -> Json:
        with self._store.read() as tx:
            host = tx.host(operation.host_id)
        return overdue_error(operation, host, self._clock())


@contextmanager
def _alone(operation: Operation) -> Iterator[None]:
    """Let what is wrong with one operation or its host not keep the others from going on."""
    try:
        yield
    except Unavailable:
        raise
    except ProvisionerError as error:
        log.error("operation not moved", operation=operation.id, why=error.message)


def judge(
    operation: Operation, findings: list[Finding], health: Health, now: datetime
) -> tuple[E, Json]:
    """Return the event and the evidence of one round: healthy since when, and enough?"""
    checks: Json = {
        str(finding.check): {"healthy": finding.is_healthy, "found": finding.found}
        for finding in findings
    }
    if not all(finding.is_healthy for finding in findings):
        return E.CHECKED, {"checks": checks, "healthy_since": None}
    text = operation.evidence.get("healthy_since")
    since = datetime.fromisoformat(text) if text else now
    evidence: Json = {"checks": checks, "healthy_since": since.isoformat()}
    soaked = (now - since).total_seconds() >= health.soak_s
    return (E.SOAKED if soaked else E.CHECKED), evidence


def _refused_error(host: Host, reason: str) -> Json:
    return {
        "code": "host_refused",
        "message": f"host {host.name} was left alone: {reason}",
        "host": host.name,
        "expected": "a host without flags",
        "found": reason,
        "hint": f"provisioner host show {host.name}; then request it again",
    }


_EXPECTED: Final[dict[Phase, tuple[str, str]]] = {
    Phase.QUEUED: ("a free place among the operations in flight", "wait, or raise the limit"),
    Phase.NETBOOTING: (
        "the boot ticket to come back from the ramdisk",
        "look at the host's console and at its boot order; the network must reach our DHCP",
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


def overdue_error(operation: Operation, host: Host, now: datetime) -> Json:
    """Return why an operation ends that ran out of time, as an error in JSON."""
    expected, hint = _EXPECTED[operation.phase]
    if operation.kind is Kind.VERIFICATION and operation.phase is Phase.VERIFYING:
        hint = "look at the host's console; its disk was only read"
    waited = int((now - operation.phase_at).total_seconds())
    found = f"nothing for {waited} s"
    if operation.phase is Phase.PROVING:
        checks: Json = operation.evidence.get("checks", {})
        bad = {name: check["found"] for name, check in checks.items() if not check["healthy"]}
        found = f"unhealthy: {bad}"
    return {
        "code": f"{operation.phase}_timed_out",
        "message": f"host {host.name} ran out of time in {operation.phase}",
        "host": host.name,
        "expected": expected,
        "found": found,
        "hint": f"{hint} (provisioner host events {host.name})",
    }
