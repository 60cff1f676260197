"""A small durable queue with the contract of the real one, for simulated time.

Effects lie in a table beside the service's own, so they are saved with the decision that
wants them or not at all; each is performed at least once, one at a time per partition and in
order, and what a dead worker left unfinished comes again.
`tests/parts/test_effects_contract.py` holds this one and the one on DBOS to the same.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Final

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from provisioner.core.contracts import Outgoing
from provisioner.core.effects import from_json, to_json
from provisioner.core.model import OperationId

from .database import Database
from .scheduler import Answer, Group, Scheduler

AT_ONCE_MAX: Final = 64
DEATHS_MAX: Final = 20
POLL_INTERVAL_S: Final = 0.1
# Nothing is missed between two looks: every commit pokes the worker. This is for the look
# that failed because the database was away.
LOOK_AGAIN_S: Final = 5.0
RETRY_PAUSE_S: Final = 1.0

_SAVE: Final = """
INSERT OR IGNORE INTO sim_effects
SELECT ?, (SELECT COALESCE(MAX(place), 0) + 1 FROM sim_effects), ?, ?, 'waiting', NULL, 0"""
_NEXT: Final = """
SELECT key, saved FROM sim_effects AS mine WHERE state = 'waiting'
AND place = (SELECT MIN(place) FROM sim_effects AS others
             WHERE others.partition = mine.partition AND others.state IN ('waiting', 'running'))
ORDER BY place LIMIT ?"""
_CLAIM: Final = "UPDATE sim_effects SET state = 'running', owner = ? WHERE key = ?"
_GIVE_UP: Final = """
UPDATE sim_effects SET state = 'given up' WHERE owner = ? AND state = 'running' AND deaths >= ?"""
_PUT_BACK: Final = """
UPDATE sim_effects SET state = 'waiting', owner = NULL, deaths = deaths + 1
WHERE owner = ? AND state = 'running'"""
_DROP_CLAIM: Final = """
UPDATE sim_effects SET state = 'waiting', owner = NULL
WHERE owner = ? AND state = 'running' AND key NOT IN (SELECT value FROM json_each(?))"""
_FINISH: Final = """
UPDATE sim_effects SET state = ? WHERE key = ? AND owner = ? AND state = 'running'"""


class SimEffectQueue:
    """The outbox: writes effects in the caller's transaction."""

    def enqueue(self, connection: Connection, outgoing: Outgoing) -> None:
        saved = json.dumps({**asdict(outgoing), "effect": to_json(outgoing.effect)})
        connection.exec_driver_sql(_SAVE, (outgoing.key, outgoing.partition, saved))


class SimEffectWorker:
    """The `EffectWorker` port in simulated time. Its tasks die with their group."""

    NEXT = _NEXT

    def __init__(
        self,
        database: Database,
        scheduler: Scheduler,
        group: Group,
        name: str,
        *,
        at_once_max: int = AT_ONCE_MAX,
        deaths_max: int = DEATHS_MAX,
        on_error: Callable[[Outgoing, Exception], None] = lambda _outgoing, _error: None,
    ) -> None:
        self.name = name
        self._database = database
        self._scheduler = scheduler
        self._group = group
        self._at_once_max = at_once_max
        self._deaths_max = deaths_max
        self._on_error = on_error
        self._running: set[str] = set()
        self._is_stopping = False
        self._poked: Answer[None] = Answer()

    def start(self, perform: Callable[[Outgoing], None]) -> None:
        self._is_stopping = False
        self.take_over(self.name)
        self._scheduler.spawn(f"{self.name} queue", lambda: self._serve(perform), self._group)

    def stop(self) -> None:
        self._is_stopping = True
        self.poke()

    def poke(self) -> None:
        """Have the queue looked at soon: something was committed."""
        self._poked.give()

    def take_over(self, name: str) -> None:
        """Put back what the worker of that name left unfinished when it died."""
        self._change((_GIVE_UP, (name, self._deaths_max)), (_PUT_BACK, (name,)))

    def _serve(self, perform: Callable[[Outgoing], None]) -> None:
        while not self._is_stopping:
            self._scheduler.wait(self._poked, LOOK_AGAIN_S)
            self._scheduler.sleep(self._scheduler.chance.uniform(0.0, POLL_INTERVAL_S))
            self._poked = Answer()
            try:
                self._begin_what_may(perform)
            except DBAPIError:
                # The database is away, and perhaps it kept a claim that nobody here knows of.
                self._change((_DROP_CLAIM, (self.name, json.dumps(sorted(self._running)))))
                self.poke()

    def _begin_what_may(self, perform: Callable[[Outgoing], None]) -> None:
        free = self._at_once_max - len(self._running)
        if self._is_stopping or not self._database.rows(self.NEXT, 1):
            return
        with self._database.engine.begin() as connection:
            found = connection.exec_driver_sql(self.NEXT, (free,)).fetchall()
            for key, _ in found:
                connection.exec_driver_sql(_CLAIM, (self.name, key))
        for key, saved in found:
            self._running.add(key)
            self._begin(key, _restored(json.loads(saved)), perform)

    def _begin(self, key: str, outgoing: Outgoing, perform: Callable[[Outgoing], None]) -> None:
        def run() -> None:
            outcome = "done"
            try:
                perform(outgoing)
            except Exception as error:  # noqa: BLE001 # a bug is recorded, and not repeated
                outcome = "error"
                self._on_error(outgoing, error)
            self._running.discard(key)
            self._change((_FINISH, (outcome, key, self.name)))
            self.poke()

        self._scheduler.spawn(f"{self.name} {key}", run, self._group)

    def _change(self, *statements: tuple[str, tuple[object, ...]]) -> None:
        """Carry out statements in one transaction, however long the database is away."""
        while True:
            try:
                with self._database.engine.begin() as connection:
                    for statement, values in statements:
                        connection.exec_driver_sql(statement, values)
                return
            except DBAPIError:
                self._scheduler.sleep(RETRY_PAUSE_S)


def _restored(saved: dict[str, Any]) -> Outgoing:
    return Outgoing(
        key=saved["key"],
        partition=saved["partition"],
        operation_id=OperationId(saved["operation_id"]),
        generation=saved["generation"],
        effect=from_json(saved["effect"]),
    )
