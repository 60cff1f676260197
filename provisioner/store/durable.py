"""Durable effects on DBOS: what a use case saved to be done is done, whatever dies.

`DbosEffectQueue` writes effects in the caller's transaction and never launches anything;
`DbosEffectWorker` performs them. Carries effects; keeps no idea of where an operation is.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Final

from dbos import DBOS, DBOSClient, DBOSConfig, DBOSPortableJSONSerializer, EnqueueOptions
from sqlalchemy import Connection, Engine, column, func, select, table
from sqlalchemy.exc import DBAPIError

from ..core.contracts import Outgoing
from ..core.effects import from_json, to_json
from ..core.model import Json, OperationId
from ..errors import ConfigError, Unavailable
from .name_lock import RENEWAL_INTERVAL
from .takeover import TAKEOVER_INTERVAL, take_over, worker_lock

APPLICATION: Final = "provisioner"
QUEUE: Final = "effects"
WORKFLOW: Final = "perform_effect"
# DBOS hands work only to a worker of the same version, and by default makes the version
# from a hash of the code: an edit would strand what is in flight. Change this only when
# effects that were saved can no longer be understood.
EFFECT_FORMAT: Final = "effects-1"

# How often the queue is looked at. An effect waits half of it on average.
POLL_INTERVAL: Final = timedelta(milliseconds=100)
# Effects performed at once by one worker; each may hold one BMC exchange.
EFFECTS_AT_ONCE_MAX: Final = 64
# Threads besides those that perform: DBOS writes outcomes and recovers on the same pool.
SPARE_THREADS: Final = 8
# An effect during which the worker died this often is given up; its operation then meets
# its deadline instead of killing the worker for ever.
DEATHS_MAX: Final = 20
# How long a finished effect is remembered, which is how long its key stays taken.
FINISHED_KEPT: Final = timedelta(days=1)
GC_INTERVAL: Final = timedelta(minutes=5)
GC_BATCH_MAX: Final = 500
RECLAIM_INTERVAL: Final = timedelta(seconds=2)
# How long `stop` waits for effects being performed; the next start performs them again.
STOP_LIMIT: Final = timedelta(seconds=10)

# The exit code of a worker that ends because its lease was lost.
LEASE_LOST: Final = 75

FINISHED: Final = ("SUCCESS", "ERROR", "CANCELLED", "MAX_RECOVERY_ATTEMPTS_EXCEEDED")


def prepare_effects(engine: Engine) -> None:
    """Create or upgrade DBOS's own tables beside ours: schema `dbos` on PostgreSQL.

    Repeatable; two processes may do it at once.
    """
    _quieten()
    # Connecting once with our engine sets SQLite to WAL, which DBOS would not do.
    engine.connect().close()
    DBOS.migrate(_url(engine))


class DbosEffectQueue:
    """The outbox: an effect is saved with the decision that wants it, or not at all."""

    def __init__(self, engine: Engine) -> None:
        """Connects to nothing by itself: it only ever writes on the caller's connection."""
        self._client = _client(engine)
        schema = None if engine.dialect.name == "sqlite" else "dbos"
        self._waiting = table(
            "workflow_status",
            column("queue_name"),
            column("status"),
            column("queue_partition_key"),
            column("priority"),
            schema=schema,
        )

    def enqueue(self, connection: Connection, outgoing: Outgoing) -> None:
        """Save an effect in the caller's transaction: it commits or rolls back with it.

        A second effect with a key that was used within FINISHED_KEPT is silently the
        first one. Effects of one partition are performed one at a time, in the order they
        were enqueued.
        """
        options: EnqueueOptions = {
            "workflow_name": WORKFLOW,
            "queue_name": QUEUE,
            "workflow_id": outgoing.key,
            "app_version": EFFECT_FORMAT,
            "queue_partition_key": outgoing.partition,
            "priority": self._last_in_line(connection, outgoing.partition) + 1,
        }
        self._client.enqueue_in_transaction(connection, options, _saved(outgoing))

    def _last_in_line(self, connection: Connection, partition: str) -> int:
        # DBOS orders by priority, then by time, then by id. The effects of one transaction
        # share one time on PostgreSQL, so their order would be that of their keys.
        waiting = self._waiting.c
        place = select(func.max(waiting.priority)).where(
            waiting.queue_name == QUEUE,
            waiting.status.in_(("ENQUEUED", "PENDING")),
            waiting.queue_partition_key == partition,
        )
        return int(connection.execute(place).scalar() or 0)

    def close(self) -> None:
        self._client.destroy()


class DbosEffectWorker:
    """Performs saved effects, each at least once. One per process: DBOS is process-wide."""

    def __init__(
        self,
        engine: Engine,
        *,
        name: str = "worker-1",
        finished_kept: timedelta = FINISHED_KEPT,
        gc_interval: timedelta = GC_INTERVAL,
        takeover_interval: timedelta = TAKEOVER_INTERVAL,
        at_once_max: int = EFFECTS_AT_ONCE_MAX,
        deaths_max: int = DEATHS_MAX,
        on_lost: Callable[[], None] = lambda: os._exit(LEASE_LOST),
    ) -> None:
        """`name` must stay the same over restarts: by it a worker finds its own work again.

        `on_lost` is called when the lease on it was lost: its work may be another's by now, and
        threads cannot be ended in any other way than with their process.
        """
        self._engine = engine
        self._name = name
        self._finished_kept = finished_kept
        self._gc_interval = gc_interval
        self._at_once_max = at_once_max
        self._deaths_max = deaths_max
        self._takeover_interval = takeover_interval
        self._on_lost = on_lost
        self._lock = worker_lock(engine, name)
        self._stopping = threading.Event()
        self._performing = _Performing()
        self._stranded: set[str] = set()
        self._rounds: list[threading.Thread] = []

    def start(self, perform: Callable[[Outgoing], None]) -> None:
        """Begin to perform, first what this worker's last life left unfinished; return at once.

        `perform` is called from many threads and must look before it acts: after a crash
        the same effect comes again. What it raises is a bug: it is logged and recorded,
        and the effect is not tried again.

        Raises ConfigError when a worker of the same name runs already, on PostgreSQL after its
        lease and a little, and Unavailable when the database does not answer.
        """
        try:
            is_ours = self._lock.acquire()
            _quieten()
            if is_ours:
                prepare_effects(self._engine)
        except DBAPIError as error:
            self._lock.release()
            raise Unavailable("the database does not answer", hint="try again later") from error
        if not is_ours:
            raise ConfigError(
                f"another worker named {self._name} is running on this database",
                hint="stop it first, or give this one another name: service.name",
            )
        DBOS(config=self._config())
        performer = self._performer(perform)
        DBOS.workflow(name=WORKFLOW, max_recovery_attempts=self._deaths_max)(performer)
        try:
            self._register_queue()
            DBOS.launch()
        except DBAPIError as error:  # it went away, or takes no writes
            self.stop()
            raise Unavailable("the database cannot serve now", hint="try again later") from error
        except Exception:
            self.stop()
            raise
        self._stopping.clear()
        self._every(self._gc_interval, self.forget_finished)
        self._every(RECLAIM_INTERVAL, self._reclaim)
        # With SQLite there is one machine, whose worker finds its own work when it restarts.
        if self._engine.dialect.name != "sqlite":
            self._every(self._takeover_interval, self._take_over)
            self._every(RENEWAL_INTERVAL, self._renew)

    def stop(self) -> None:
        """Stop taking effects and wait up to STOP_LIMIT for those being performed."""
        self._stopping.set()
        for thread in self._rounds:
            thread.join()
        self._rounds.clear()
        busy = bool(self._performing.keys())
        DBOS.destroy(
            destroy_registry=True,
            workflow_completion_timeout_sec=int(STOP_LIMIT.total_seconds()) if busy else 0,
        )
        self._lock.release()

    def _performer(self, perform: Callable[[Outgoing], None]) -> Callable[[Json], None]:
        def perform_effect(saved: Json) -> None:
            outgoing = _restored(saved)
            with self._performing.one(outgoing.key):
                perform(outgoing)

        return perform_effect

    def _register_queue(self) -> None:
        # By a client and before the launch: DBOS looks for new queues once a second only.
        client = _client(self._engine)
        try:
            client.register_queue(
                QUEUE,
                # One exchange at a time per BMC, over all workers.
                partition_concurrency=1,
                # Not `global_concurrency`: with it DBOS asks partition by partition.
                worker_concurrency=self._at_once_max,
                polling_interval_sec=POLL_INTERVAL.total_seconds(),
            )
        finally:
            client.destroy()

    def _config(self) -> DBOSConfig:
        return {
            "name": APPLICATION,
            "system_database_url": _url(self._engine),
            "application_version": EFFECT_FORMAT,
            "executor_id": self._name,
            "serializer": DBOSPortableJSONSerializer(),
            "run_migrations": False,
            "enable_otlp": False,
            "log_level": "WARNING",
            "max_executor_threads": self._at_once_max + SPARE_THREADS,
            # No schedule is ever registered; this only spaces out the looks for one.
            "scheduler_polling_interval_sec": 3600.0,
            # Nor does anybody wait for notifications: on SQLite it is how long a stop takes.
            "notification_listener_polling_interval_sec": 0.2,
        }

    def _every(self, interval: timedelta, do: Callable[[], object]) -> None:
        def rounds() -> None:
            while not self._stopping.wait(interval.total_seconds()):
                try:
                    do()
                except Exception:  # the top of a thread: the next round tries again
                    logging.getLogger(__name__).exception("a round of housekeeping failed")

        thread = threading.Thread(target=rounds, name="effects-rounds", daemon=True)
        self._rounds.append(thread)
        thread.start()

    def lease_left(self) -> timedelta:
        """Return for how long this worker's work is certainly its own."""
        return self._lock.left()

    def _renew(self) -> None:
        if not self._lock.renew() and not self._stopping.is_set():
            log = logging.getLogger(__name__)
            log.critical("the lease on the name %s was lost, this process ends", self._name)
            self._on_lost()

    def _take_over(self) -> None:
        if taken := take_over(self._engine, QUEUE, self._name):
            logging.getLogger(__name__).warning("took over %d effects of a dead worker", taken)

    def _reclaim(self) -> None:
        """Queue again what DBOS believes to be performed here, and is not, at two looks.

        The database may have carried out that an effect was taken, or failed to save that it
        was performed, without this process hearing of it.
        """
        taken = DBOS.list_workflows(
            status="PENDING",
            queue_name=QUEUE,
            executor_id=self._name,
            limit=GC_BATCH_MAX,
            load_input=False,
            load_output=False,
        )
        idle = {workflow.workflow_id for workflow in taken} - self._performing.keys()
        lost, self._stranded = idle & self._stranded, idle
        if lost:
            DBOS.resume_workflows(sorted(lost), queue_name=QUEUE)
            logging.getLogger(__name__).warning("%d effects were stranded", len(lost))

    def forget_finished(self) -> int:
        """Delete effects that finished longer than `finished_kept` ago; return how many."""
        before = (datetime.now(UTC) - self._finished_kept).isoformat()
        forgotten = 0
        while not self._stopping.is_set():
            finished = DBOS.list_workflows(
                status=list(FINISHED),
                completed_before=before,
                limit=GC_BATCH_MAX,
                load_input=False,
                load_output=False,
            )
            if not finished:
                break
            DBOS.delete_workflows([workflow.workflow_id for workflow in finished])
            forgotten += len(finished)
        return forgotten


def _saved(outgoing: Outgoing) -> Json:
    return {**asdict(outgoing), "effect": to_json(outgoing.effect)}


def _restored(saved: Json) -> Outgoing:
    return Outgoing(
        key=saved["key"],
        partition=saved["partition"],
        operation_id=OperationId(saved["operation_id"]),
        generation=saved["generation"],
        effect=from_json(saved["effect"]),
    )


class _Performing:
    """The keys of the effects that are being performed in this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._keys: list[str] = []

    def keys(self) -> set[str]:
        with self._lock:
            return set(self._keys)

    @contextmanager
    def one(self, key: str) -> Iterator[None]:
        with self._lock:
            self._keys.append(key)
        try:
            yield
        finally:
            with self._lock:
                self._keys.remove(key)


def _client(engine: Engine) -> DBOSClient:
    _quieten()
    return DBOSClient(
        system_database_url=_url(engine),
        serializer=DBOSPortableJSONSerializer(),
        application_name=APPLICATION,
        lazy=True,
    )


def _url(engine: Engine) -> str:
    return engine.url.render_as_string(hide_password=False)


def _quieten() -> None:
    # With a handler in place DBOS neither prints to the console by itself nor stops its
    # records from reaching our own logging; below a warning it says nothing we need.
    logger = logging.getLogger("dbos")
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())
    logger.setLevel(logging.WARNING)
