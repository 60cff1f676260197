"""What the tests of failures share: hosts that run a proven release, deployments that fail in a
chosen way, and a database that goes away in the middle."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from provisioner.core.contracts import Archive, Tx
from provisioner.core.lifecycle import LIMIT, RUNG_LAST
from provisioner.core.model import Host, Json, Operation, Phase
from provisioner.service.recovery import Recovery
from provisioner.store.sql_store import SqlStore
from tests.parts.service_site import ACTOR, STORED_BYTES, Agent, Site, profile_document

SOAK_S = 5


def with_releases(site: Site, archive: Archive) -> Site:
    """Fill an empty service: two releases, and a profile that a report alone makes healthy."""
    for manifest in archive.releases():  # type: ignore[attr-defined] # a real archive lists them
        site.releases.register(manifest, STORED_BYTES, actor=ACTOR)
    return with_a_profile_that_proves(site)


def with_a_profile_that_proves(site: Site) -> Site:
    """Let the profile `web` ask for nothing that needs a host on the network."""
    health = {"soak_s": SOAK_S, "checks": [{"type": "systemd"}]}
    site.profiles.save("web", {**profile_document(), "health": health}, actor=ACTOR)
    return site


def request(site: Site, release: str, **options: Any) -> Operation:
    (made,) = site.operations.request_deployment(["r1n1"], release, options=options, actor=ACTOR)
    return made


def succeed(site: Site, operation: Operation) -> Host:
    """Carry a queued deployment to its end, and return its host."""
    site.worker.start_queued()
    site.perform()
    agent = Agent(site).until(Phase.PROVING)
    site.worker.check(operation.id)
    site.clock.pass_(SOAK_S)
    agent.phone_home()
    site.worker.check(operation.id)
    site.perform()
    assert site.phase(operation) is Phase.SUCCEEDED
    return site.hosts.show("r1n1")


def running(site: Site, release: str = "tiny@1") -> Host:
    """Return host r1n1, on which `release` was proven."""
    site.add_host()
    return succeed(site, request(site, release))


def fail(
    site: Site,
    operation: Operation,
    phase: Phase = Phase.WRITING,
    code: str = "disk_failed",
    *,
    performs: bool = True,
) -> Operation:
    """Let a queued deployment fail in `phase`: the agent says so, or nobody says a word."""
    if phase is not Phase.QUEUED:
        site.worker.start_queued()
        site.perform()
    if phase in (Phase.QUEUED, Phase.NETBOOTING):
        for _ in range(RUNG_LAST + 1 if phase is Phase.NETBOOTING else 1):
            site.pass_(LIMIT[phase])
    else:
        agent = Agent(site).until(phase)
        if phase in (Phase.PREPARING, Phase.WRITING, Phase.VERIFYING):
            agent.failed(code)
        else:
            site.clock.pass_(LIMIT[phase].total_seconds())
            site.worker.end_overdue()
    if performs:
        site.perform()
    failed = site.at(operation)
    assert failed.phase is Phase.FAILED, failed
    return failed


def newest_of(site: Site) -> Operation:
    """Return the last operation of host r1n1; the tests' clock may give two of them one time."""
    return max(site.operations.list("r1n1"), key=lambda one: one.generation)


def follow(site: Site, operation: Operation) -> Operation:
    """Let time pass until the follow-up is due, have it taken, and return what came of it."""
    at = site.at(operation).follow_up_at
    assert at is not None, site.at(operation).follow_up
    early = at - site.clock() - timedelta(seconds=1)
    if early > timedelta():
        site.clock.pass_(early.total_seconds())
        site.recovery.take_due()
        assert site.at(operation).follow_up_at == at, "taken before its time"
    site.clock.at = max(site.clock(), at)
    site.recovery.take_due()
    newest = newest_of(site)
    assert newest.id != operation.id, site.at(operation).follow_up
    return newest


def what(operation: Operation) -> tuple[str | None, str | None]:
    """Return what follows an operation, and where that stands."""
    kept: Json = operation.follow_up or {}
    return kept.get("what"), kept.get("state")


def chain(operation: Operation) -> tuple[str, int, int, str | None]:
    pins = operation.pins
    return pins["cause"], pins["attempt"], pins["attempts_max"], pins.get("after")


class Died(BaseException):
    """The process ended here."""


class DyingTx:
    """A transaction whose process dies at call number `last`."""

    def __init__(self, tx: Tx, last: int) -> None:
        self._tx = tx
        self._left = last

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._tx, name)

        def counted(*args: Any, **named: Any) -> Any:
            self._left -= 1
            if self._left < 0:
                raise Died
            return call(*args, **named)

        return counted

    @property
    def is_alive(self) -> bool:
        return self._left >= 0


class DyingStore:
    """A store whose process dies at call `last` of a writing transaction, or, when there are
    not so many, right before it commits."""

    def __init__(self, store: SqlStore, last: int) -> None:
        self._store = store
        self._last = last
        self.ran_out = False

    @contextmanager
    def begin(self) -> Iterator[Any]:
        with self._store.begin() as tx:
            dying = DyingTx(tx, self._last)
            yield dying
            self.ran_out = dying.is_alive
            raise Died

    def read(self) -> Any:
        return self._store.read()

    def close(self) -> None:
        """It is another's."""


class OtherArchive:
    """An archive that says `error` of every release, and is the real one otherwise."""

    def __init__(self, archive: Archive, error: Exception) -> None:
        self._archive = archive
        self.error: Exception | None = error

    def check(self, digest: str, **named: Any) -> Any:
        if self.error is not None:
            raise self.error
        return self._archive.check(digest, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._archive, name)


def recovery_with(site: Site, *, store: Any = None, archive: Any = None) -> Recovery:
    """Return another process's part that takes follow-ups, over another store or archive."""
    return Recovery(store or site.store, site.transitions, archive or site.archive, site.clock)
