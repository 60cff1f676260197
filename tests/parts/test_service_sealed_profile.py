"""A profile that does not open stops the hosts that need what it says, and nothing else."""

from collections.abc import Callable

import pytest

from provisioner.core.lifecycle import LIMIT
from provisioner.core.model import BootDevice, HostState, Phase
from provisioner.core.profile import ProfileUnreadable
from provisioner.service.agents import TicketRefused
from tests.parts.recovery_site import (
    fail,
    follow,
    request,
    running,
    succeed,
    what,
    with_a_profile_that_proves,
)
from tests.parts.service_site import ACTOR, Agent, Site, profile_document, tamper


def damage(site: Site) -> None:
    tamper(site, "UPDATE profile_revisions SET sealed = X'0102' WHERE name = 'web'")


def test_it_stops_the_requests_of_its_hosts_and_nothing_else(site: Site) -> None:
    site.profiles.save("base", profile_document(), actor=ACTOR)
    site.add_host()
    site.add_host(2, profile="base")
    damage(site)

    assert [host.name for host in site.hosts.list()] == ["r1n1", "r1n2"]
    assert [profile.name for profile in site.profiles.list()] == ["base", "web"]
    assert site.hosts.change("r1n2", profile="web", actor=ACTOR).profile == "web"
    assert site.hosts.change("r1n2", profile="base", actor=ACTOR).profile == "base"
    assert site.operations.request_inspection("r1n1", actor=ACTOR).phase is Phase.QUEUED
    assert site.deploy("r1n2").phase is Phase.QUEUED

    site.operations.cancel(site.operations.list("r1n1")[0].id, actor=ACTOR)
    requests: list[Callable[[], object]] = [
        lambda: request(site, "tiny@1"),
        lambda: site.operations.request_verification(["r1n1"], "tiny@1", actor=ACTOR),
    ]
    for refused in requests:
        with pytest.raises(ProfileUnreadable, match="profile web does not open") as caught:
            refused()
        assert "profile save" in (caught.value.hint or "")
        assert caught.value.exit_code == 5
    assert site.operations.list("r1n1", only_open=True) == []

    site.hosts.delete("r1n1", actor=ACTOR)
    site.profiles.delete("web", actor=ACTOR)
    assert [profile.name for profile in site.profiles.list()] == ["base"]


def test_what_is_queued_ends_before_its_host_is_touched(site: Site) -> None:
    site.add_host()
    queued = request(site, "tiny@1")
    damage(site)
    site.worker.start_queued()
    site.perform()
    ended = site.at(queued)
    error = ended.error or {}
    assert (ended.phase, error["code"]) == (Phase.FAILED, "profile_unreadable")
    assert error["host"] == "r1n1"
    assert "profile save" in error["hint"]
    assert site.bmc().exchanges == []
    assert site.hosts.show("r1n1").state is HostState.ENROLLED
    assert ended.follow_up is None


def test_a_host_on_its_way_into_the_ramdisk_is_sent_back_at_once(site: Site) -> None:
    site.add_host()
    waiting = site.deploy("r1n1")
    site.perform()
    damage(site)
    agent = Agent(site).boots()
    with pytest.raises(ProfileUnreadable, match="profile web does not open"):
        agent.hello()
    ended = site.at(waiting)
    error = ended.error or {}
    assert (ended.phase, error["code"]) == (Phase.FAILED, "profile_unreadable")
    assert error["host"] == "r1n1"
    assert ended.follow_up is None
    assert site.hosts.show("r1n1").state is HostState.ENROLLED
    site.perform()
    assert site.bmc().next_boot is not BootDevice.NETWORK
    with pytest.raises(TicketRefused):
        agent.hello()


def test_saving_it_again_is_the_way_out_also_for_what_is_queued(site: Site) -> None:
    document = with_a_profile_that_proves(site).profiles.show("web").document
    site.add_host()
    queued = request(site, "tiny@1")
    damage(site)
    saved = site.profiles.save("web", document, actor=ACTOR)
    assert saved.digest == queued.pins["profile"]
    assert site.profiles.show("web").document == document
    assert succeed(site, queued).state is HostState.ACTIVE


def test_no_attempt_follows_and_the_release_is_not_blamed(site: Site) -> None:
    """The host is half-written, and nothing of what was planned for it can be done."""
    with_a_profile_that_proves(site)
    site.add_host()
    failed = fail(site, request(site, "tiny@2"))
    assert what(failed) == ("retry", "waiting")
    damage(site)
    site.clock.pass_(3600)
    site.recovery.take_due()
    assert what(site.at(failed)) == ("quarantine", "done")
    assert "does not open" in (site.hosts.show("r1n1").quarantine_reason or "")


def test_the_way_back_takes_a_revision_that_opens(site: Site) -> None:
    running(with_a_profile_that_proves(site))
    proven = site.profiles.show("web")
    site.profiles.save("web", {**proven.document, "health": {"checks": []}}, actor=ACTOR)
    queued = request(site, "tiny@2", attempts=1)
    failed = fail(site, queued)
    tamper(site, f"UPDATE profile_revisions SET sealed = X'0102' WHERE digest != '{proven.digest}'")
    back = follow(site, failed)
    assert back.pins["profile"] == proven.digest
    assert succeed(site, back).release is not None


def test_a_system_is_not_proven_without_it_and_the_error_says_so(site: Site) -> None:
    with_a_profile_that_proves(site)
    site.add_host()
    proving = site.deploy("r1n1")
    site.perform()
    agent = Agent(site).until(Phase.PROVING)
    damage(site)
    site.worker.check(proving.id)
    found = site.at(proving).evidence["checks"]["profile"]
    assert found == {"healthy": False, "found": "profile web does not open"}
    agent.phone_home()
    site.clock.pass_(LIMIT[Phase.PROVING].total_seconds())
    site.worker.end_overdue()
    error = site.at(proving).error or {}
    assert error["code"] == "proving_timed_out"
    assert "profile web does not open" in error["found"]
