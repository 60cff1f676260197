"""What a host is told that asks the network how to boot: its own disk, but for one case."""

import threading
from dataclasses import replace
from datetime import timedelta

import pytest

from provisioner.core.bootplan import BootPlan, LocalDisk, Ramdisk
from provisioner.core.lifecycle import LIMIT
from provisioner.core.model import HostState, Kind, LocalBoot, Phase
from provisioner.errors import Conflict
from provisioner.service.hosts import HostSpec
from tests.parts.service_site import (
    ACTOR,
    RAMDISK,
    TICKET_LIFETIME,
    Agent,
    Site,
    inventory,
    mac,
)


def reason(plan: BootPlan) -> str:
    assert isinstance(plan, LocalDisk), plan
    return plan.reason


# --- the rule -----------------------------------------------------------------------------


def test_an_unknown_host_boots_its_disk_and_leaves_no_trace(site: Site) -> None:
    before = site.texts()
    assert reason(site.ask(9)) == "no host with this MAC is managed here"
    assert site.texts() == before


def test_a_host_without_an_operation_boots_its_disk_and_that_is_noted(site: Site) -> None:
    site.add_host()
    assert reason(site.ask()) == "no boot ticket"
    assert "boot script" in site.hosts.timeline("r1n1")[-1][1].text


@pytest.mark.parametrize("local_boot", LocalBoot)
def test_field_03_a_host_boots_its_disk_the_way_it_can(site: Site, local_boot: LocalBoot) -> None:
    site.add_host(local_boot=local_boot)
    plan = site.ask()
    assert isinstance(plan, LocalDisk)
    assert plan.method is local_boot


def test_a_live_ticket_boots_the_pinned_ramdisk(site: Site) -> None:
    site.add_host(local_boot=LocalBoot.SANBOOT)
    site.deploy("r1n1")
    plan = site.ask()
    assert isinstance(plan, Ramdisk)
    assert plan.digest == RAMDISK
    assert plan.local_boot is LocalBoot.SANBOOT


def test_a_queued_deployment_gives_no_ticket_yet(site: Site) -> None:
    site.add_host()
    site.operations.request_deployment(["r1n1"], "tiny@1", options={}, actor=ACTOR)
    assert reason(site.ask()) == "no boot ticket"


@pytest.mark.parametrize(
    "reached", [Phase.PREPARING, Phase.WRITING, Phase.VERIFYING, Phase.BOOTING, Phase.PROVING]
)
def test_field_01_a_used_ticket_never_boots_the_ramdisk_again(site: Site, reached: Phase) -> None:
    """Whatever the host's boot order: once the agent was there, it comes up from its disk."""
    site.add_host()
    site.deploy("r1n1")
    site.perform()
    Agent(site).until(reached)
    for _ in range(10):
        reason(site.ask())


def test_an_expired_ticket_boots_the_disk(site: Site) -> None:
    site.add_host()
    site.deploy("r1n1")
    site.clock.pass_((TICKET_LIFETIME - timedelta(seconds=1)).total_seconds())
    assert isinstance(site.ask(), Ramdisk)
    site.clock.pass_(1)
    assert "expired" in reason(site.ask())


@pytest.mark.parametrize("how", ["cancelled", "timed out"])
def test_an_operation_that_ended_boots_the_disk(site: Site, how: str) -> None:
    site.add_host()
    operation = site.deploy("r1n1")
    if how == "cancelled":
        site.operations.cancel(operation.id, actor=ACTOR)
    else:
        for _ in range(3):
            site.pass_(LIMIT[Phase.NETBOOTING])
    assert reason(site.ask()) == "no boot ticket"


# --- doubts about identity ----------------------------------------------------------------


def test_another_uuid_than_the_enrolled_one_boots_the_disk(site: Site) -> None:
    site.add_host(uuid=inventory(1)["uuid"])
    site.deploy("r1n1")
    assert "enrolled with" in reason(site.ask(uuid=inventory(2)["uuid"]))
    assert isinstance(site.ask(uuid=inventory(1)["uuid"].upper()), Ramdisk)


@pytest.mark.parametrize("uuid", [None, "", " "])
def test_a_loader_that_tells_no_uuid_is_known_by_its_mac(site: Site, uuid: str | None) -> None:
    site.add_host(uuid=inventory(1)["uuid"])
    site.deploy("r1n1")
    assert isinstance(site.ask(uuid=uuid), Ramdisk)


def test_a_uuid_that_two_hosts_have_boots_the_disk(site: Site) -> None:
    same = inventory(1)["uuid"]
    site.add_host(1, uuid=same)
    site.add_host(2, uuid=same)
    site.deploy("r1n1")
    assert "known for r1n1, r1n2" in reason(site.ask(uuid=same))


def test_a_mac_cannot_be_enrolled_twice(site: Site) -> None:
    site.add_host(1)
    with pytest.raises(Conflict):
        site.hosts.add(HostSpec("r1n2", (mac(1).upper().replace(":", "-"),)), actor=ACTOR)
    assert [host.name for host in site.hosts.list()] == ["r1n1"]


def test_a_second_nic_of_the_same_host_gets_the_same_ticket(site: Site) -> None:
    site.add_host(1, macs=(mac(1), mac(11)))
    site.deploy("r1n1")
    assert site.ask(1) == site.ask(11)


# --- discovery ----------------------------------------------------------------------------


def test_without_discovery_an_unknown_host_is_not_inspected(site: Site) -> None:
    assert isinstance(site.ask(9, uuid=inventory(9)["uuid"]), LocalDisk)
    assert site.hosts.list() == []


@pytest.mark.discovering
def test_an_unknown_host_is_inspected_and_appears_to_be_confirmed(site: Site) -> None:
    agent = Agent(site, number=9).boots()
    told = agent.hello()
    assert (told["kind"], told["release"], told["disk_rule"]) == (Kind.INSPECTION, None, None)
    (host,) = site.hosts.list()
    assert host.name == "new-525400770009"
    assert (host.is_confirmed, host.state) == (False, HostState.DIRTY)
    assert host.inventory is not None
    assert (host.serial, host.uuid) == ("SN-9", inventory(9)["uuid"])
    assert site.outbox.waiting == []  # it has no BMC that could be told anything
    # From now on it boots its disk, and nothing may be written before a person says so.
    reason(site.ask(9))
    with pytest.raises(Conflict, match="nobody has confirmed it"):
        site.deploy(host.name)
    taken = site.add_host(1).bmc
    assert taken is not None
    with pytest.raises(Conflict, match="that of r1n1"):
        site.hosts.confirm(host.name, new_name="r1n9", bmc=taken, profile="web", actor=ACTOR)
    own = replace(taken, address="127.0.1.9")
    confirmed = site.hosts.confirm(host.name, new_name="r1n9", bmc=own, profile="web", actor=ACTOR)
    assert confirmed.is_confirmed
    assert site.deploy("r1n9").generation == 2
    with pytest.raises(Conflict, match="already confirmed"):
        site.hosts.confirm("r1n9", new_name=None, bmc=None, profile=None, actor=ACTOR)


@pytest.mark.discovering
def test_a_discovered_host_cannot_write(site: Site) -> None:
    agent = Agent(site, number=9).boots()
    agent.hello()
    agent.release = "ab" * 32
    for call in (agent.authorise, agent.progress, agent.seed, agent.done):
        with pytest.raises(Exception, match=r"over|writes no disk|not valid"):
            call()


@pytest.mark.discovering
def test_a_known_host_is_not_discovered(site: Site) -> None:
    site.add_host()
    assert reason(site.ask()) == "no boot ticket"
    assert len(site.hosts.list()) == 1


@pytest.mark.discovering
def test_an_inspection_that_never_came_back_is_offered_again(site: Site) -> None:
    first = Agent(site, number=9).boots().ticket
    site.pass_(LIMIT[Phase.NETBOOTING])
    second = Agent(site, number=9).boots()
    assert second.ticket != first
    assert second.hello()["generation"] == 2


@pytest.mark.discovering
def test_while_the_breaker_is_open_unknown_machines_leave_no_rows(site: Site) -> None:
    with site.store.begin() as tx:
        tx.save_breaker(replace(tx.breaker(), opened_at=site.clock(), reason="too many failed"))
    rows = len(site.audit.rows())
    for _ in range(3):
        assert "too many failed" in reason(site.ask(9))
    assert len(site.audit.rows()) == rows
    assert site.hosts.list() == []


@pytest.mark.discovering
def test_discovery_has_a_limit(site: Site) -> None:
    for number in (7, 8, 9):
        assert isinstance(site.ask(number), Ramdisk)
    assert "too many" in reason(site.ask(10))
    assert len(site.hosts.list()) == 3


@pytest.mark.discovering
def test_a_host_that_asks_twice_at_once_is_discovered_once(site: Site) -> None:
    """Firmware retries; the loser of the race must not become an error page."""
    plans: list[BootPlan | Exception] = []

    def ask() -> None:
        try:
            plans.append(site.ask(9))
        except Exception as error:  # noqa: BLE001 # the test looks at whatever it was
            plans.append(error)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(site.hosts.list()) == 1
    assert not [plan for plan in plans if isinstance(plan, Exception)]
    assert any(isinstance(plan, Ramdisk) for plan in plans)
