"""A person cancels, in every phase and at every moment: the host goes back to its old system, or
what was begun is finished, redone, or quarantined. No disk is left half. Over both databases."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from provisioner.core.lifecycle import HostEvent, NotAllowed, host_after
from provisioner.core.model import BootDevice, HostState, Operation, Phase
from provisioner.errors import Conflict, ProvisionerError, TrustError, Unavailable
from tests.parts.recovery_site import (
    OtherArchive,
    chain,
    fail,
    follow,
    newest_of,
    recovery_with,
    request,
    running,
    succeed,
    what,
)
from tests.parts.service_site import ACTOR, Agent, Site

BEFORE_THE_WRITE = (Phase.QUEUED, Phase.NETBOOTING, Phase.PREPARING)
AFTER_IT = (Phase.WRITING, Phase.VERIFYING, Phase.BOOTING, Phase.PROVING)
ROUNDS = 8


@pytest.fixture
def site(either_site: Site) -> Site:
    return either_site


def bring(site: Site, operation: Operation, phase: Phase) -> Operation:
    """Bring a queued deployment of r1n1 into `phase`."""
    if phase is not Phase.QUEUED:
        site.worker.start_queued()
        site.perform()
    if phase not in (Phase.QUEUED, Phase.NETBOOTING):
        Agent(site).until(phase)
    site.perform()
    assert site.phase(operation) is phase
    return site.at(operation)


@dataclass(frozen=True)
class Before:
    """What a host was before the deployment that is cancelled, and what it is afterwards."""

    prepare: Callable[[Site], object]
    state: HostState
    is_quarantined: bool


def half_written(site: Site) -> None:
    running(site)
    failed = fail(site, request(site, "tiny@2"))
    assert what(failed) == ("retry", "waiting")


BEFORE = {
    "active": Before(running, HostState.ACTIVE, is_quarantined=False),
    "new": Before(lambda site: site.add_host(), HostState.ENROLLED, is_quarantined=False),
    "half-written": Before(half_written, HostState.DIRTY, is_quarantined=True),
}


@pytest.mark.parametrize("phase", BEFORE_THE_WRITE)
@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
def test_before_the_first_write_a_host_goes_back_to_what_it_was(
    site: Site, phase: Phase, before: Before
) -> None:
    before.prepare(site)
    release = site.hosts.show("r1n1").release
    operation = bring(site, request(site, "tiny@2"), phase)
    cancelled = site.operations.cancel(operation.id, actor=ACTOR)
    site.perform()
    host = site.hosts.show("r1n1")
    assert cancelled.phase is Phase.CANCELLED
    assert host.release == release
    assert (host.quarantine_reason is not None) == before.is_quarantined
    # A new host whose agent was seen is no stranger any more; its disk was not touched.
    is_seen = before.state is HostState.ENROLLED and phase is Phase.PREPARING
    assert host.state is (HostState.DIRTY if is_seen else before.state)
    bmc = site.bmc()
    assert bmc.next_boot is BootDevice.DISK
    assert bmc.is_on is not before.is_quarantined
    if before.is_quarantined:
        assert "called off" in (host.quarantine_reason or "")
        assert what(cancelled) == ("quarantine", "done")
        site.hosts.set_flags("r1n1", release_quarantine=True, actor=ACTOR)
    assert succeed(site, request(site, "tiny@1")).state is HostState.ACTIVE


@pytest.mark.parametrize("phase", AFTER_IT)
@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
def test_after_it_a_deployment_is_finished_and_who_asks_is_told_the_way_out(
    site: Site, phase: Phase, before: Before
) -> None:
    before.prepare(site)
    operation = bring(site, request(site, "tiny@2"), phase)
    host = site.hosts.show("r1n1")
    with pytest.raises(NotAllowed) as caught:
        site.operations.cancel(operation.id, actor=ACTOR)
    # Whether it is redone by itself depends on what was asked for: that is told afterwards.
    assert f"operation show {operation.id}" in (caught.value.hint or "")
    assert "by itself" not in (caught.value.hint or "")
    assert (site.at(operation), site.hosts.show("r1n1")) == (operation, host)
    # It is redone, should its agent or its system not be heard of any more.
    site.clock.pass_(4 * 3600)
    site.worker.end_overdue()
    assert site.phase(operation) is Phase.FAILED
    assert succeed(site, follow(site, operation)).state is HostState.ACTIVE


@pytest.mark.parametrize("phase", BEFORE_THE_WRITE)
def test_an_attempt_that_is_cancelled_leaves_no_disk_half(site: Site, phase: Phase) -> None:
    """Its own first write is still to come; that of the attempt before it was not."""
    running(site)
    second = follow(site, fail(site, request(site, "tiny@2")))
    bring(site, second, phase)
    site.operations.cancel(second.id, actor=ACTOR)
    site.perform()
    assert what(site.at(second)) == ("quarantine", "done")
    assert site.hosts.show("r1n1").quarantine_reason is not None
    assert not site.bmc().is_on


def test_what_waits_is_called_off_and_a_host_on_its_old_system_stays_there(site: Site) -> None:
    good = running(site)
    failed = fail(site, request(site, "tiny@2"), Phase.PREPARING)
    after = site.operations.cancel(failed.id, actor=ACTOR)
    assert after.phase is Phase.FAILED
    assert what(after) == ("retry", "dropped")
    assert (after.follow_up or {})["dropped"] == f"called off by {ACTOR}"
    host = site.hosts.show("r1n1")
    assert (host.state, host.release, host.quarantine_reason) == ("active", good.release, None)
    assert [row.action for row in site.audit.rows() if row.actor == ACTOR][-1] == (
        "recovery.dropped"
    )
    site.clock.pass_(86400)
    site.recovery.take_due()
    assert newest_of(site).id == failed.id
    with pytest.raises(Conflict, match="already ended"):
        site.operations.cancel(failed.id, actor=ACTOR)


@pytest.mark.parametrize("attempts", [1, 3], ids=["the way back", "another attempt"])
def test_what_waits_is_called_off_and_a_half_written_host_is_quarantined(
    site: Site, attempts: int
) -> None:
    running(site)
    failed = fail(site, request(site, "tiny@2", attempts=attempts))
    after = site.operations.cancel(failed.id, actor=ACTOR)
    site.perform()
    assert what(after) == ("quarantine", "done")
    assert (after.follow_up or {})["instead_of"] == ("rollback" if attempts == 1 else "retry")
    assert "called off" in (site.hosts.show("r1n1").quarantine_reason or "")
    assert not site.bmc().is_on


def test_a_host_in_maintenance_is_not_switched_off_for_being_called_off(site: Site) -> None:
    running(site)
    failed = fail(site, request(site, "tiny@2"))
    site.hosts.set_flags("r1n1", in_maintenance=True, actor=ACTOR)
    with pytest.raises(Conflict, match="already ended"):
        site.operations.cancel(failed.id, actor=ACTOR)
    site.perform()
    assert what(site.at(failed)) == ("retry", "dropped")
    assert site.hosts.show("r1n1").quarantine_reason is None
    assert "power_off" not in site.bmc().changes()


@pytest.mark.parametrize("flag", ["is_protected", "in_maintenance"])
@pytest.mark.parametrize("attempts", [1, 3], ids=["the way back", "another attempt"])
def test_a_flag_ends_what_was_to_come_also_when_it_is_lifted_again(
    site: Site, flag: str, attempts: int
) -> None:
    running(site)
    failed = fail(site, request(site, "tiny@2", attempts=attempts))
    done = len(site.bmc().changes())
    site.hosts.set_flags("r1n1", actor=ACTOR, **{flag: True})
    assert what(site.at(failed))[1] == "dropped"
    assert site.audit.rows()[-1].action == "recovery.dropped"
    site.hosts.set_flags("r1n1", actor=ACTOR, **{flag: False})
    site.clock.pass_(86400)
    site.recovery.take_due()
    site.perform()
    assert newest_of(site).id == failed.id
    assert site.hosts.show("r1n1").quarantine_reason is None
    assert len(site.bmc().changes()) == done
    assert succeed(site, request(site, "tiny@1")).state is HostState.ACTIVE


def test_what_comes_due_in_maintenance_is_not_caught_up_on(site: Site) -> None:
    """The archive is away meanwhile, so that nobody looks at what waits."""
    running(site)
    failed = fail(site, request(site, "tiny@2"))
    archive = OtherArchive(site.archive, Unavailable("the bucket does not answer"))
    recovery = recovery_with(site, archive=archive)
    site.hosts.set_flags("r1n1", in_maintenance=True, actor=ACTOR)
    site.clock.pass_(3600)
    recovery.take_due()
    site.hosts.set_flags("r1n1", in_maintenance=False, actor=ACTOR)
    archive.error = None
    recovery.take_due()
    assert newest_of(site).id == failed.id


def seen_ahead(site: Site) -> None:
    """Host r1n1 runs, and was seen by a service whose restored database is older."""
    running(site)
    with site.store.begin() as tx:
        host = site.hosts.show("r1n1")
        tx.save_host(host_after(host, HostEvent.WRITE_STARTED))


def released(site: Site) -> None:
    """A person has lifted the quarantine of host r1n1, which is half-written, and started it."""
    running(site)
    failed = fail(site, request(site, "tiny@2"))
    site.operations.cancel(failed.id, actor=ACTOR)
    site.perform()
    site.hosts.set_flags("r1n1", release_quarantine=True, actor=ACTOR)
    site.bmc().power_on()


@pytest.mark.parametrize("prepare", [seen_ahead, released])
def test_a_request_that_never_started_leaves_the_host_as_it_was(
    site: Site, prepare: Callable[[Site], None]
) -> None:
    prepare(site)
    before = site.hosts.show("r1n1")
    assert before.state is HostState.DIRTY
    asked = request(site, "tiny@1")
    site.operations.cancel(asked.id, actor=ACTOR)
    site.perform()
    host = site.hosts.show("r1n1")
    assert host == replace(before, generation=host.generation)
    assert site.bmc().is_on


# --- at the same moment -------------------------------------------------------------------


def at_once(*calls: Callable[[], object]) -> list[BaseException | None]:
    """Make calls in threads that begin together, and return what each raised."""
    start = threading.Barrier(len(calls))
    raised: list[BaseException | None] = [None] * len(calls)

    def run(number: int, call: Callable[[], object]) -> None:
        start.wait(60)
        try:
            call()
        except ProvisionerError as error:
            raised[number] = error

    threads = [threading.Thread(target=run, args=each) for each in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return raised


def test_of_a_cancel_and_a_permission_to_write_at_once_exactly_one_wins(site: Site) -> None:
    running(site)
    for _ in range(ROUNDS):
        operation = bring_prepared(site, agent := Agent(site))
        refused_cancel, refused_write = at_once(
            lambda id_=operation.id: site.operations.cancel(id_, actor=ACTOR),  # type: ignore[misc] # bound now
            agent.authorise,
        )
        phase, host = site.phase(operation), site.hosts.show("r1n1")
        if refused_cancel is None:
            assert isinstance(refused_write, TrustError)
            assert (phase, host.state) == (Phase.CANCELLED, HostState.ACTIVE)
        else:
            assert isinstance(refused_cancel, NotAllowed)
            assert refused_write is None
            assert (phase, host.state) == (Phase.WRITING, HostState.DIRTY)
            agent.failed()
            succeed(site, request(site, "tiny@1"))
        site.perform()


def bring_prepared(site: Site, agent: Agent) -> Operation:
    operation = request(site, "tiny@2")
    site.worker.start_queued()
    site.perform()
    agent.until(Phase.PREPARING)
    return operation


def test_of_calling_off_and_taking_at_once_exactly_one_wins(site: Site) -> None:
    running(site)
    for _ in range(ROUNDS):
        failed = fail(site, request(site, "tiny@2"), Phase.PREPARING)
        site.clock.pass_(60)
        refused, problem = at_once(
            lambda id_=failed.id: site.operations.cancel(id_, actor=ACTOR),  # type: ignore[misc] # bound now
            site.recovery.take_due,
        )
        assert problem is None
        newest, state = newest_of(site), what(site.at(failed))[1]
        if refused is None:
            assert (newest.id, state) == (failed.id, "dropped")
        else:
            assert isinstance(refused, Conflict)
            assert (chain(newest)[3], state) == (failed.id, "taken")
            site.operations.cancel(newest.id, actor=ACTOR)
        assert site.hosts.show("r1n1").state is HostState.ACTIVE
        site.perform()
