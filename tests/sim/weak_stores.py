"""A store that is broken on purpose: transactions that leave out, forget or invent one thing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final, cast

from provisioner.core.contracts import Store, Tx
from provisioner.core.fleet import Breaker, Load
from provisioner.core.model import (
    Host,
    HostState,
    Json,
    Operation,
    OperationId,
    Phase,
    ReleaseFailure,
)

from .service_process import Parts

READING: Final = "reading"
WRITING: Final = "writing"


@dataclass
class Through:
    """A transaction that does what the other one does; the subclasses change one thing."""

    tx: Tx

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tx, name)


class SeedsForAll(Through):
    def is_seed_taken(self, operation_id: OperationId) -> bool:  # noqa: ARG002 # the port's signature
        return False

    def take_seed(self, operation_id: OperationId, at: datetime) -> bool:
        self.tx.take_seed(operation_id, at)
        return True


class CountsBack(Through):
    def save_host(self, host: Host) -> None:
        self.tx.save_host(replace(host, generation=host.generation % 2))


class ActivatesEarly(Through):
    def save_host(self, host: Host) -> None:
        is_written = host.root_disk is not None and host.state is HostState.DIRTY
        self.tx.save_host(replace(host, state=HostState.ACTIVE) if is_written else host)


class ForgetsQuarantine(Through):
    def save_host(self, host: Host) -> None:
        self.tx.save_host(replace(host, quarantine_reason=None))


class ForgetsFailures(Through):
    def remember_failure(self, failure: ReleaseFailure) -> None:
        """Nothing is done."""


class BlamesAlways(Through):
    """Remembers every release whose deployment has failed, whatever was done for it."""

    def save_operation(self, operation: Operation) -> None:
        self.tx.save_operation(operation)
        if operation.phase is Phase.FAILED and operation.release is not None:
            error = operation.error or {}
            failure = ReleaseFailure(
                host_id=operation.host_id,
                release=operation.release,
                operation_id=operation.id,
                at=operation.phase_at,
                code=str(error.get("code")),
                message=str(error.get("message")),
            )
            self.tx.remember_failure(failure)


class SeesNoBreaker(Through):
    def breaker(self, *, lock: bool = False) -> Breaker:  # noqa: ARG002 # the port's signature
        return Breaker()


class KnowsNoGroups(Through):
    """Counts what is under way in the fleet, and never in a group."""

    def loads(self, **how: Any) -> Mapping[str | None, Load]:
        return {None: sum(self.tx.loads(**how).values(), Load())}


class ForgetsStarts(Through):
    """Does not know any more what was started a moment ago."""

    def loads(self, **how: Any) -> Mapping[str | None, Load]:
        return {name: replace(load, started=0) for name, load in self.tx.loads(**how).items()}


class CountsTheSick(Through):
    """Takes every host of a group for a healthy one."""

    def group_sizes(self, groups: Iterable[str]) -> Mapping[str, tuple[int, int]]:
        return {name: (every, every) for name, (every, _) in self.tx.group_sizes(groups).items()}


class ActsAnyway(Through):
    """Does not ask whether the database is an older one."""

    def is_observing(self) -> bool:
        return False


class ShowsThePast(Through):
    """Shows an open operation as it was when its effects were saved."""

    def operation(self, operation_id: OperationId) -> Operation:
        found = self.tx.operation(operation_id)
        return found if found.is_final else replace(found, phase=Phase.NETBOOTING)


class ForgetsToChain(Through):
    """Writes audit rows by itself, with a chain of one link."""

    def audit(self, at: datetime, actor: str, action: str, subject: str, detail: Json) -> None:
        self.tx.audit(at, actor, action, subject, detail)
        if action == "deployment.writing":
            statement = "UPDATE audit SET actor = 'nobody' WHERE number = 3"
            self.tx._connection.exec_driver_sql(statement)  # type: ignore[attr-defined] # on purpose


class WeakStore:
    def __init__(self, store: Store, weak: type[Through], where: tuple[str, ...]) -> None:
        self._store = store
        self._weak = weak
        self._where = where

    @contextmanager
    def begin(self) -> Iterator[Tx]:
        with self._store.begin() as tx:
            yield cast(Tx, self._weak(tx)) if WRITING in self._where else tx

    @contextmanager
    def read(self) -> Iterator[Tx]:
        with self._store.read() as tx:
            yield cast(Tx, self._weak(tx)) if READING in self._where else tx

    def close(self) -> None:
        self._store.close()


def weak_store(weak: type[Through], *where: str) -> Callable[[Store], Store]:
    return lambda store: WeakStore(store, weak, where or (WRITING,))


def everywhere(weak: type[Through]) -> Parts:
    return Parts(store=weak_store(weak, READING, WRITING))
