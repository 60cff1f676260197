"""A verification: the host netboots, its disk is compared with a release, nothing is written."""

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import pytest

from provisioner.core.guard import WriteRefused
from provisioner.core.lifecycle import IN_RAMDISK_FOR, LIMIT, NotAllowed
from provisioner.core.model import HostState, Kind, Operation, Phase
from provisioner.errors import Conflict, RequestError
from provisioner.service.agents import TokenRefused
from tests.parts.service_site import ACTOR, GATEWAY, Agent, Site

SESSION = "5e" * 32


def verify(site: Site, *hosts: str, release: str | None = None) -> list[Operation]:
    return site.operations.request_verification(hosts or ("r1n1",), release, actor=ACTOR)


@pytest.fixture
def active(site: Site) -> Site:
    """A site whose host r1n1 runs tiny@1."""
    host = site.add_host()
    digest = site.releases.show("tiny@1").digest
    with site.store.begin() as tx:
        found = tx.host(host.id)
        tx.save_host(replace(found, state=HostState.ACTIVE, release=digest, last_good=digest))
    return site


@pytest.fixture
def comparing(active: Site) -> Agent:
    """The ramdisk of r1n1, which was told what to compare its disk with."""
    verify(active)
    active.worker.start_queued()
    active.perform()
    agent = Agent(active).boots()
    told = agent.hello()
    assert told["mode"] == "verify"
    assert told["release"] == active.releases.show("tiny@1").digest
    assert told["disk_rule"] == {"bus": "virtio", "size_min_bytes": 1 << 30}
    return agent


def test_a_cancelled_one_whose_agent_is_silent_is_not_reset(active: Site, comparing: Agent) -> None:
    active.clock.pass_(IN_RAMDISK_FOR.total_seconds() + 1)
    active.operations.cancel(comparing.operation().id, actor=ACTOR)
    active.perform()
    assert active.bmc().changes()[-2:] == ["next_boot disk once", "power_on"]


@pytest.mark.parametrize("differing", [0, 3])
def test_the_way_of_a_verification(active: Site, comparing: Agent, differing: int) -> None:
    operation = comparing.operation()
    assert (operation.kind, operation.phase) == (Kind.VERIFICATION, Phase.VERIFYING)
    comparing.progress("comparing", done_bytes=1, total_bytes=2)
    assert comparing.compared(differing) == {"restart": "reboot"}
    active.perform()
    after = active.at(operation)
    assert after.phase is Phase.SUCCEEDED
    assert after.evidence["differing_chunks"] == differing
    assert after.evidence["compared_chunks"] == 9
    assert after.evidence["differing_bytes"] == differing * 65536
    host = active.hosts.show("r1n1")
    assert (host.state, host.release) == (HostState.ACTIVE, operation.release)
    assert active.bmc().exchanges[-1].startswith("next_boot")
    assert f"differs from the release in {differing} of 9" in active.texts() or differing == 0


def test_a_lost_answer_is_given_again(active: Site, comparing: Agent) -> None:
    comparing.compared(2)
    rows = len(active.audit.rows())
    assert comparing.compared(2) == {"restart": "reboot"}
    assert len(active.audit.rows()) == rows
    for call in (comparing.progress, comparing.authorise, comparing.seed):
        with pytest.raises(TokenRefused):
            call()


def test_a_lost_answer_to_hello_is_given_again(active: Site) -> None:
    verify(active)
    active.worker.start_queued()
    active.perform()
    agent = Agent(active).boots()
    body = {"ticket": agent.ticket, "inventory": agent.inventory, "session": SESSION}
    first = active.agents.hello({**body, "attempt": 1}, GATEWAY)
    second = active.agents.hello({**body, "attempt": 2}, GATEWAY)
    assert first["token"] != second["token"]
    agent.token, agent.generation = second["token"], second["generation"]
    agent.compared()


def test_it_may_not_write_nor_have_a_seed(active: Site, comparing: Agent) -> None:
    before = active.hosts.show("r1n1")
    refused: list[tuple[Callable[[], object], type[Exception]]] = [
        (comparing.authorise, WriteRefused),
        (comparing.seed, TokenRefused),
        (comparing.done, NotAllowed),
    ]
    for call, kind in refused:
        with pytest.raises(kind):
            call()
    assert active.hosts.show("r1n1") == before
    comparing.compared()


def test_a_deployment_cannot_end_as_a_comparison(agent: Agent) -> None:
    agent.until(Phase.WRITING)
    with pytest.raises(NotAllowed):
        agent.compared()


def test_an_agent_that_fails_gives_the_host_back_to_its_disk(
    active: Site, comparing: Agent
) -> None:
    comparing.failed("disk_failed")
    active.perform()
    operation = comparing.operation()
    assert operation.phase is Phase.FAILED
    assert active.hosts.show("r1n1").state is HostState.ACTIVE
    assert active.bmc().changes()[-2:] == ["next_boot disk once", "reset"]
    with pytest.raises(NotAllowed):
        comparing.compared()


def test_it_is_cancelled_at_any_time(active: Site, comparing: Agent) -> None:
    active.operations.cancel(comparing.operation().id, actor=ACTOR)
    active.perform()
    assert active.bmc().changes()[-1] == "reset"
    assert comparing.operation().phase is Phase.CANCELLED
    assert active.hosts.show("r1n1").state is HostState.ACTIVE


def test_a_silent_agent_ends_it_without_a_word_of_writing(active: Site, comparing: Agent) -> None:
    active.pass_(LIMIT[Phase.VERIFYING] + timedelta(seconds=1))
    # Its last word may have been lost: a reset would hit a system at work.
    assert active.bmc().changes()[-1] == "next_boot disk once"
    error = comparing.operation().error
    assert error is not None
    assert error["code"] == "verifying_timed_out"
    assert "only read" in error["hint"]


# --- asking for one -----------------------------------------------------------------------


def test_another_release_may_be_named(active: Site) -> None:
    (operation,) = verify(active, release="tiny@2")
    assert operation.pins["release_name"] == "tiny@2"


def test_a_protected_host_is_verified_and_one_in_maintenance_is_not(active: Site) -> None:
    active.hosts.set_flags("r1n1", is_protected=True, actor=ACTOR)
    (operation,) = verify(active)
    active.worker.start_queued()
    assert active.phase(operation) is Phase.NETBOOTING
    active.operations.cancel(operation.id, actor=ACTOR)
    active.hosts.set_flags("r1n1", in_maintenance=True, actor=ACTOR)
    with pytest.raises(Conflict, match="is not verified: it is in maintenance"):
        verify(active)


def test_maintenance_in_between_leaves_the_host_alone(active: Site) -> None:
    (operation,) = verify(active)
    active.hosts.set_flags("r1n1", in_maintenance=True, actor=ACTOR)
    active.worker.start_queued()
    assert active.phase(operation) is Phase.FAILED


def test_a_revoked_release_may_still_be_looked_for(active: Site) -> None:
    active.releases.revoke("tiny@1", "bad", actor=ACTOR)
    assert len(verify(active)) == 1


def test_a_host_that_runs_nothing_of_ours_needs_a_release_named(site: Site) -> None:
    site.add_host()
    with pytest.raises(Conflict, match="not known to run a release") as caught:
        verify(site)
    assert caught.value.host == "r1n1"
    verify(site, release="tiny@1")


def test_one_bad_host_spoils_the_whole_request(active: Site) -> None:
    active.add_host(2)
    with pytest.raises(Conflict, match="r1n2"):
        verify(active, "r1n1", "r1n2")
    with pytest.raises(RequestError, match="twice"):
        verify(active, "r1n1", "r1n1")
    with pytest.raises(RequestError, match="empty selection"):
        active.operations.request_verification([], None, actor=ACTOR)
    assert active.operations.list() == []
