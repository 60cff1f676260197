"""A deployment fails, and what follows by itself: attempts, the way back, quarantine. Over both
databases, with a clock that the tests drive."""

from collections.abc import Callable
from datetime import timedelta

import pytest

from provisioner.core.lifecycle import LIMIT
from provisioner.core.model import HostState, Operation, Phase, PowerState
from provisioner.core.recovery import OnQuarantine
from provisioner.errors import NotFound, ProvisionerError, TrustError, Unavailable
from provisioner.imaging.archive import Archive
from provisioner.service.follow_ups import standing_of
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
    with_releases,
)
from tests.parts.service_site import ACTOR, Agent, Site


@pytest.fixture
def site(either_site: Site) -> Site:
    return either_site


def standing(site: Site) -> str:
    with site.store.read() as tx:
        return standing_of(tx, site.hosts.show("r1n1")) or ""


def failures(site: Site) -> list[tuple[str, str]]:
    with site.store.read() as tx:
        found = tx.failures_on(site.hosts.show("r1n1").id)
    names = {site.releases.show(name).digest: name for name in ("tiny@1", "tiny@2")}
    return [(names[one.release], one.code) for one in found]


def actions(site: Site) -> list[str]:
    return [row.action for row in site.audit.rows()]


# --- the whole chain ----------------------------------------------------------------------


def test_field_05_after_all_attempts_the_host_goes_back_and_is_free_again(site: Site) -> None:
    good = running(site)
    first = fail(site, request(site, "tiny@2"))
    assert what(first) == ("retry", "waiting")
    assert first.follow_up_at == site.clock() + timedelta(minutes=1)
    assert "attempt 2 of 3 follows at" in standing(site)
    assert site.hosts.show("r1n1").last_good == good.release

    second = follow(site, first)
    assert chain(second) == ("retry", 2, 3, first.id)
    assert second.requested_by == "recovery"
    assert what(site.at(first)) == ("retry", "taken")
    second = fail(site, second, Phase.PROVING)
    assert second.follow_up_at == site.clock() + timedelta(minutes=2)
    third = fail(site, follow(site, second), Phase.NETBOOTING)
    assert what(third) == ("rollback", "waiting")
    assert failures(site) == [("tiny@2", "netbooting_timed_out")]
    assert site.hosts.show("r1n1").quarantine_reason is None

    back = follow(site, third)
    assert chain(back) == ("rollback", 1, 1, third.id)
    assert (back.release, back.pins["release_name"]) == (good.release, "tiny@1")
    host = succeed(site, back)
    assert (host.state, host.release, host.last_good) == ("active", good.release, good.release)
    assert host.quarantine_reason is None
    assert "went back to tiny@1" in standing(site)
    assert "tiny@2 failed in" in standing(site)

    # Nothing is automatic after that, and nothing of the trouble keeps the host.
    site.clock.pass_(86400)
    site.recovery.take_due()
    assert newest_of(site).id == back.id
    again = request(site, "tiny@2")
    assert again.pins["failed_before"]["code"] == "netbooting_timed_out"
    assert succeed(site, again).release == site.releases.show("tiny@2").digest
    assert failures(site) == []
    assert standing(site) == ""


def test_a_first_deployment_that_fails_for_good_ends_in_quarantine_switched_off(
    site: Site,
) -> None:
    site.add_host()
    operation = request(site, "tiny@1")
    for attempt in (1, 2):
        operation = follow(site, fail(site, operation))
        assert chain(operation)[1] == attempt + 1
    failed = fail(site, operation)
    assert what(failed) == ("quarantine", "done")
    assert failed.follow_up_at is None
    host = site.hosts.show("r1n1")
    assert host.state is HostState.DIRTY
    assert failed.id in (host.quarantine_reason or "")
    assert "no release was proven on this host before" in (host.quarantine_reason or "")
    assert not site.bmc().is_on
    assert site.bmc().changes()[-1] == "power_off"
    assert actions(site).count("host.quarantined") == 1

    with pytest.raises(ProvisionerError, match="quarantined"):
        request(site, "tiny@1")
    site.hosts.set_flags("r1n1", release_quarantine=True, actor=ACTOR)
    assert chain(request(site, "tiny@1"))[:3] == ("request", 1, 3)


def test_a_quarantined_host_that_somebody_has_inspected_is_switched_off_again(site: Site) -> None:
    site.add_host()
    fail(site, request(site, "tiny@1", attempts=1))
    inspection = site.operations.request_inspection("r1n1", actor=ACTOR)
    site.worker.start_queued()
    site.perform()
    assert site.bmc().is_on
    Agent(site).boots().hello()
    site.perform()
    assert site.phase(inspection) is Phase.SUCCEEDED
    assert site.hosts.show("r1n1").quarantine_reason is not None
    assert not site.bmc().is_on


def test_a_host_that_was_never_written_keeps_its_system_and_its_place(site: Site) -> None:
    good = running(site)
    operation = request(site, "tiny@2")
    for _ in range(2):
        operation = follow(site, fail(site, operation, Phase.PREPARING))
    failed = fail(site, operation, Phase.NETBOOTING)
    assert failed.follow_up is None
    host = site.hosts.show("r1n1")
    assert (host.state, host.release, host.quarantine_reason) == ("active", good.release, None)
    assert failures(site) == []
    assert site.bmc().power() is PowerState.ON


def test_field_09_a_failed_way_back_ends_in_quarantine_and_both_are_remembered(
    site: Site,
) -> None:
    running(site)
    failed = fail(site, request(site, "tiny@2", attempts=1), code="chunk_corrupt")
    back = fail(site, follow(site, failed), Phase.VERIFYING)
    assert what(back) == ("quarantine", "done")
    assert sorted(failures(site)) == [("tiny@1", "disk_failed"), ("tiny@2", "chunk_corrupt")]


@pytest.mark.parametrize("attempts", [1, 2, 5])
def test_a_request_says_how_often_it_is_tried(site: Site, attempts: int) -> None:
    site.add_host()
    operation = request(site, "tiny@1", attempts=attempts)
    for _ in range(attempts - 1):
        operation = follow(site, fail(site, operation))
    assert what(fail(site, operation)) == ("quarantine", "done")
    assert len(site.operations.list("r1n1")) == attempts


def test_an_agent_that_dies_while_it_writes_is_followed_by_another_attempt(site: Site) -> None:
    running(site)
    operation = request(site, "tiny@2")
    site.worker.start_queued()
    site.perform()
    Agent(site).until(Phase.WRITING)
    site.pass_(LIMIT[Phase.WRITING])
    assert (site.at(operation).error or {})["code"] == "writing_timed_out"
    assert succeed(site, follow(site, operation)).release == site.releases.show("tiny@2").digest


@pytest.mark.parametrize(
    ("seen", "code", "then"),
    [
        ({"release_id": "another"}, "wrong_system", "rollback"),
        ({"root_disk": {"serial": "LAB-r1n1-1"}}, "wrong_disk", "quarantine"),
    ],
)
def test_field_26_after_a_stale_system_came_up_there_is_one_way_back_and_none_after_a_wrong_disk(
    site: Site, seen: dict[str, object], code: str, then: str
) -> None:
    running(site)
    operation = request(site, "tiny@2")
    site.worker.start_queued()
    site.perform()
    assert Agent(site).until(Phase.BOOTING).phone_home(**seen)["accepted"] is False
    failed = site.at(operation)
    assert (failed.error or {})["code"] == code
    assert what(failed)[0] == then
    assert site.hosts.show("r1n1").release is None


def test_field_12_a_bad_host_is_put_aside_and_the_others_are_deployed(site: Site) -> None:
    site.add_host(1)
    site.add_host(2)
    bad, good = site.operations.request_deployment(
        ["r1n1", "r1n2"], "tiny@1", options={"attempts": 1}, actor=ACTOR
    )
    site.worker.start_queued()
    site.perform()
    Agent(site, 1).until(Phase.WRITING).failed()
    Agent(site, 2).until(Phase.PROVING)
    site.perform()
    assert what(site.at(bad)) == ("quarantine", "done")
    assert "disk_failed" in (site.hosts.show("r1n1").quarantine_reason or "")
    assert site.phase(good) is Phase.PROVING
    assert (site.bmc(1).is_on, site.bmc(2).is_on) == (False, True)


# --- what was planned is repeated ---------------------------------------------------------


def test_an_attempt_repeats_what_was_planned_and_the_way_back_what_was_proven(
    site: Site,
) -> None:
    running(site)
    proven = site.profiles.show("web")
    site.profiles.save("web", {**proven.document, "variables": {"password": "2"}}, actor=ACTOR)
    first = fail(site, request(site, "tiny@2", full=True, attempts=2))
    assert first.pins["profile"] != proven.digest
    site.profiles.save("web", {**proven.document, "variables": {"password": "3"}}, actor=ACTOR)
    second = follow(site, first)
    for pin in ("profile", "ramdisk", "release_name"):
        assert second.pins[pin] == first.pins[pin]
    assert second.options == first.options
    back = follow(site, fail(site, second))
    assert back.pins["profile"] == proven.digest
    assert back.pins["ramdisk"] == first.pins["ramdisk"]


def test_a_release_that_waits_for_another_attempt_is_not_removed(site: Site) -> None:
    running(site)
    failed = fail(site, request(site, "tiny@2"))
    with site.store.read() as tx:
        assert failed.release in tx.used_releases()


# --- the world has changed when it is due -------------------------------------------------


@pytest.mark.parametrize(
    ("phase", "then"),
    [(Phase.PREPARING, (None, "dropped")), (Phase.WRITING, ("rollback", "waiting"))],
)
def test_a_release_revoked_meanwhile_is_not_tried_again(
    site: Site, phase: Phase, then: tuple[str | None, str]
) -> None:
    running(site)
    failed = fail(site, request(site, "tiny@2"), phase)
    site.releases.revoke("tiny@2", "it loses data", actor=ACTOR)
    site.clock.pass_(60)
    site.recovery.take_due()
    after = site.at(failed)
    assert what(after)[1] == then[1]
    if then[0] is None:
        assert (after.follow_up or {})["dropped"] == "tiny@2 was revoked"
    else:
        assert what(after)[0] == then[0]
        assert (after.follow_up or {})["instead_of"] == "retry"
        assert chain(follow(site, failed))[0] == "rollback"
    assert len(site.operations.list("r1n1")) == (3 if then[0] else 2)


def test_a_last_good_release_revoked_meanwhile_leads_to_quarantine(site: Site) -> None:
    running(site)
    failed = fail(site, request(site, "tiny@2", attempts=1))
    assert what(failed) == ("rollback", "waiting")
    site.releases.revoke("tiny@1", "it loses data", actor=ACTOR)
    site.recovery.take_due()
    assert what(site.at(failed)) == ("quarantine", "done")
    assert "tiny@1 was revoked" in (site.hosts.show("r1n1").quarantine_reason or "")
    site.perform()
    assert not site.bmc().is_on


def test_a_host_that_was_inspected_meanwhile_is_switched_off_as_well(site: Site) -> None:
    running(site)
    failed = fail(site, request(site, "tiny@2", attempts=1))
    site.operations.request_inspection("r1n1", actor=ACTOR)
    site.worker.start_queued()
    site.perform()
    Agent(site).boots().hello()
    site.perform()
    assert site.bmc().is_on
    site.operations.cancel(failed.id, actor=ACTOR)
    site.perform()
    assert site.hosts.show("r1n1").quarantine_reason is not None
    assert not site.bmc().is_on


def test_a_written_host_that_may_not_be_started_again_is_put_aside(site: Site) -> None:
    """Another host got its UUID meanwhile: nobody flagged it, so nobody looks after it."""
    running(site)
    second = follow(site, fail(site, request(site, "tiny@2")))
    site.add_host(2, uuid=site.hosts.show("r1n1").uuid)
    site.worker.start_queued()
    refused = site.at(second)
    assert (refused.error or {})["code"] == "host_refused"
    assert what(refused) == ("quarantine", "done")


@pytest.mark.parametrize("flags", [{"is_protected": True}, {"in_maintenance": True}], ids=str)
def test_a_host_that_a_person_has_taken_is_left_to_them(site: Site, flags: dict[str, bool]) -> None:
    running(site)
    failed = fail(site, request(site, "tiny@2"))
    site.hosts.set_flags("r1n1", actor=ACTOR, **flags)
    before = len(site.bmc().changes())
    site.clock.pass_(60)
    site.recovery.take_due()
    site.perform()
    assert what(site.at(failed)) == ("retry", "dropped")
    assert "it is" in (site.at(failed).follow_up or {})["dropped"]
    assert (len(site.operations.list("r1n1")), len(site.bmc().changes())) == (2, before)
    assert site.hosts.show("r1n1").quarantine_reason is None


def test_a_release_that_nobody_trusts_any_more_is_not_tried_again(site: Site) -> None:
    """The archive refuses both: a decision goes on to the next one, and never back."""
    running(site)
    failed = fail(site, request(site, "tiny@2"))
    distrusts = recovery_with(
        site, archive=OtherArchive(site.archive, TrustError("nobody has signed it"))
    )
    site.clock.pass_(60)
    distrusts.take_due()
    assert what(site.at(failed)) == ("rollback", "waiting")
    distrusts.take_due()
    assert what(site.at(failed)) == ("quarantine", "done")
    assert "nobody has signed it" in (site.hosts.show("r1n1").quarantine_reason or "")


def test_an_archive_that_is_away_is_waited_for_and_not_for_ever(site: Site) -> None:
    running(site)
    failed = fail(site, request(site, "tiny@2"))
    archive = OtherArchive(site.archive, Unavailable("the bucket does not answer"))
    recovery = recovery_with(site, archive=archive)
    site.clock.pass_(60)
    for error in (Unavailable("no answer"), NotFound("not mounted"), OSError("stale")):
        archive.error = error
        recovery.take_due()
        assert what(site.at(failed)) == ("retry", "waiting")
    limit = LIMIT[Phase.QUEUED].total_seconds()
    site.clock.pass_(limit)
    recovery.take_due()
    assert what(site.at(failed)) == ("rollback", "waiting")
    archive.error = OSError("the mount of the archive is stale")
    site.clock.pass_(limit)
    recovery.take_due()
    assert what(site.at(failed)) == ("quarantine", "done")


# --- a person meanwhile -------------------------------------------------------------------


def test_a_request_supersedes_what_was_to_come_and_the_row_says_so(site: Site) -> None:
    running(site)
    failed = fail(site, request(site, "tiny@2"))
    mine = request(site, "tiny@1")
    assert what(site.at(failed)) == ("retry", "dropped")
    assert mine.id in (site.at(failed).follow_up or {})["dropped"]
    site.clock.pass_(60)
    site.recovery.take_due()
    assert newest_of(site).id == mine.id
    assert succeed(site, mine).state is HostState.ACTIVE


def test_whoever_looks_at_the_host_first_only_lets_it_wait(site: Site) -> None:
    running(site)
    failed = fail(site, request(site, "tiny@2"))
    look = site.operations.request_inspection("r1n1", actor=ACTOR)
    site.clock.pass_(60)
    site.recovery.take_due()
    assert what(site.at(failed)) == ("retry", "waiting")
    site.operations.cancel(look.id, actor=ACTOR)
    assert chain(follow(site, failed)) == ("retry", 2, 3, failed.id)


# --- BMCs ---------------------------------------------------------------------------------


def test_field_21_a_login_refused_on_the_way_out_stops_what_was_to_come(site: Site) -> None:
    """The attempt had been decided on when the BMC was told to return the host to its disk."""
    running(site)
    failed = fail(site, request(site, "tiny@2"), Phase.PREPARING, performs=False)
    assert what(failed) == ("retry", "waiting")
    site.bmc().refuses_login = True
    site.perform()
    assert what(site.at(failed)) == ("retry", "dropped")
    tries = len(site.bmc().exchanges)
    site.clock.pass_(86400)
    site.recovery.take_due()
    site.worker.start_queued()
    site.perform()
    assert len(site.bmc().exchanges) == tries


def test_field_21_a_half_written_host_whose_bmc_refuses_us_is_quarantined_unasked(
    site: Site,
) -> None:
    site.add_host()
    second = follow(site, fail(site, request(site, "tiny@1")))
    site.bmc().refuses_login = True
    tries = len(site.bmc().exchanges)
    site.worker.start_queued()
    site.perform()
    assert what(site.at(second)) == ("quarantine", "done")
    site.perform()
    assert len(site.bmc().exchanges) == tries + 1


def test_field_21_a_quarantined_host_is_not_switched_off_by_a_second_refused_login(
    site: Site,
) -> None:
    quarantined(site)
    site.bmc().refuses_login = True
    tries = len(site.bmc().exchanges)
    site.perform()
    assert len(site.bmc().exchanges) == tries + 1
    assert site.hosts.show("r1n1").quarantine_reason is not None


# --- quarantine ---------------------------------------------------------------------------


def quarantined(site: Site) -> Operation:
    site.add_host()
    return fail(site, request(site, "tiny@1", attempts=1), performs=False)


def test_a_host_released_from_quarantine_is_not_switched_off_any_more(site: Site) -> None:
    quarantined(site)
    site.hosts.set_flags("r1n1", release_quarantine=True, actor=ACTOR)
    site.perform()
    assert site.bmc().is_on


def test_a_host_that_does_not_switch_off_stays_quarantined_and_it_is_told(site: Site) -> None:
    quarantined(site)
    site.bmc().lies_about_off = True
    site.perform()
    assert site.hosts.show("r1n1").quarantine_reason is not None
    assert "did not switch off" in site.texts()


@pytest.mark.parametrize("policy", [OnQuarantine.RAMDISK, OnQuarantine.LEAVE])
def test_a_quarantined_host_may_be_left_on(
    open_site: Callable[..., Site], archive_of_two: Archive, policy: OnQuarantine
) -> None:
    site = with_releases(open_site(on_quarantine=policy), archive_of_two)
    site.add_host()
    operation = request(site, "tiny@1", attempts=1)
    site.worker.start_queued()
    site.perform()
    agent = Agent(site).until(Phase.WRITING)
    told = agent.failed()
    assert told == ({"then": "stay"} if policy is OnQuarantine.RAMDISK else {})
    assert agent.failed() == told, "an answer may be lost"
    site.perform()
    assert what(site.at(operation)) == ("quarantine", "done")
    assert site.bmc().is_on
    assert site.bmc().changes()[-1] == "next_boot disk once"


def test_failures_may_be_left_to_persons(
    open_site: Callable[..., Site], archive_of_two: Archive
) -> None:
    site = with_releases(open_site(is_automatic=False), archive_of_two)
    running(site)
    failed = fail(site, request(site, "tiny@2"))
    assert (failed.follow_up, failed.follow_up_at) == (None, None)
    assert site.hosts.show("r1n1").quarantine_reason is None
    assert failures(site) == [("tiny@2", "disk_failed")]
    assert request(site, "tiny@1").generation == failed.generation + 1
