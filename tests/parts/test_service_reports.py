"""What agents and freshly booted systems report, what is believed of it, and the record of it."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from provisioner.core.disks import NoDiskMatches
from provisioner.core.guard import WriteRefused
from provisioner.core.lifecycle import NotAllowed
from provisioner.core.model import HostState, Phase
from provisioner.errors import Gone, RequestError, TrustError
from provisioner.service.agents import TokenRefused
from tests.parts.service_site import (
    ACTOR,
    BMC_PASSWORD,
    PROFILE_SECRET,
    Agent,
    Site,
    inventory,
    profile_document,
    state_of,
    tamper,
)

# --- seed, reports, the end ---------------------------------------------------------------


def test_the_seed_leaves_once(site: Site, agent: Agent) -> None:
    agent.until(Phase.WRITING)
    assert PROFILE_SECRET in agent.seed()["user-data"]
    with pytest.raises(Gone) as caught:
        agent.seed()
    assert caught.value.status == 410
    assert [row.action for row in site.audit.rows()][-2:] == ["seed.taken", "seed.refused"]


def test_the_seed_is_only_for_an_agent_that_writes(agent: Agent) -> None:
    agent.until(Phase.PREPARING)
    with pytest.raises(TokenRefused, match="writes"):
        agent.seed()


@pytest.mark.parametrize("reached", [Phase.VERIFYING, Phase.BOOTING, Phase.PROVING])
def test_a_second_request_for_the_seed_is_noted_in_every_phase(
    site: Site, agent: Agent, reached: Phase
) -> None:
    agent.until(reached)
    with pytest.raises(Gone):
        agent.seed()
    assert site.audit.rows()[-1].action == "seed.refused"


def change_host(site: Site, **changes: Any) -> None:
    """Change the host's row, whatever it is that somebody may change."""
    host = site.hosts.show("r1n1")
    with site.store.begin() as tx:
        tx.save_host(replace(host, **changes))


@pytest.mark.parametrize("flag", ["is_protected", "in_maintenance"])
def test_who_may_not_write_any_more_gets_no_seed(site: Site, agent: Agent, flag: str) -> None:
    agent.until(Phase.WRITING)
    change_host(site, **{flag: True})
    with pytest.raises(WriteRefused):
        agent.seed()
    assert site.audit.rows()[-1].action == "write.refused"
    change_host(site, **{flag: False})
    assert PROFILE_SECRET in agent.seed()["user-data"], "it had not left"


def test_a_disk_that_went_since_the_hello_ends_the_write_at_once(site: Site, agent: Agent) -> None:
    """An answer that says "not now" would have the agent ask for ten minutes."""
    agent.until(Phase.PREPARING)
    change_host(site, inventory={**agent.inventory, "disks": []})
    with pytest.raises(NoDiskMatches) as caught:
        agent.authorise()
    assert (caught.value.status, caught.value.code) == (403, "no_disk_matches")
    assert caught.value.expected is not None
    assert site.audit.rows()[-1].action == "write.refused"


@pytest.mark.parametrize(
    ("serial", "wwn", "is_accepted"),
    [("S1", "eui.0001", True), ("S1", None, True), ("S1", "0002", False), ("S2", "0001", False)],
)
def test_field_26_a_name_space_beside_the_written_one_is_another_disk(
    site: Site, agent: Agent, serial: str, wwn: str | None, is_accepted: bool
) -> None:
    agent.until(Phase.BOOTING)
    operation = agent.operation()
    with site.store.begin() as tx:
        disk = {"serial": "S1", "wwn": "eui.0001", "size_bytes": 8 * 1024**3}
        tx.save_operation(replace(operation, evidence={**operation.evidence, "disk": disk}))
    told = agent.phone_home(root_disk={"name": "nvme0n2", "serial": serial, "wwn": wwn})
    assert told["accepted"] == is_accepted
    assert site.phase(operation) is (Phase.PROVING if is_accepted else Phase.FAILED)


def test_a_seed_whose_profile_was_changed_since_is_the_pinned_one(site: Site, agent: Agent) -> None:
    agent.until(Phase.WRITING)
    site.profiles.save("web", {**profile_document(), "cloud_config": {"x": "new"}}, actor=ACTOR)
    assert "new" not in agent.seed()["user-data"]


def test_field_02_reports_may_be_repeated(site: Site, agent: Agent) -> None:
    agent.until(Phase.WRITING)
    agent.seed()
    assert agent.progress("verifying") == agent.progress("verifying")
    assert agent.done() == agent.done()
    assert site.phase(agent.operation()) is Phase.BOOTING
    assert agent.phone_home() == agent.phone_home()
    assert agent.done() == {"restart": "reboot"}
    assert site.phase(agent.operation()) is Phase.PROVING


@pytest.mark.parametrize("reached", [Phase.PREPARING, Phase.WRITING, Phase.VERIFYING])
def test_a_failure_is_kept_with_its_reason_and_may_be_repeated(
    agent: Agent, reached: Phase
) -> None:
    agent.until(reached)
    assert agent.failed() == agent.failed() == {}
    operation = agent.operation()
    assert operation.phase is Phase.FAILED
    assert (operation.error or {})["code"] == "disk_failed"
    assert (operation.error or {})["host"] == "r1n1"
    with pytest.raises(TokenRefused):
        agent.authorise()
    with pytest.raises(TokenRefused):
        agent.progress()


def test_a_host_that_failed_while_written_boots_its_disk_and_is_dirty(
    site: Site, agent: Agent
) -> None:
    agent.until(Phase.WRITING)
    agent.failed()
    site.perform()
    assert site.bmc().changes()[-1] == "next_boot disk once"
    host = site.hosts.show("r1n1")
    assert (host.state, host.release) == (HostState.DIRTY, None)


def test_done_for_another_release_is_not_believed(site: Site, agent: Agent) -> None:
    agent.until(Phase.VERIFYING)
    agent.release = site.releases.show("tiny@2").digest
    with pytest.raises(TrustError, match="another release"):
        agent.done()
    assert site.phase(agent.operation()) is Phase.VERIFYING


def test_done_without_a_permission_is_refused(agent: Agent) -> None:
    agent.until(Phase.PREPARING)
    with pytest.raises(NotAllowed):
        agent.done()


# --- phone home ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("report", "code"),
    [
        ({"release_id": "f" * 32}, "wrong_system"),
        ({"release_id": None}, "wrong_system"),
        ({"root_disk": {"name": "sdb", "serial": "OLD"}}, "wrong_disk"),
        ({"root_disk": None}, "wrong_disk"),
        ({"root_disk": "sda"}, "wrong_disk"),
    ],
    ids=str,
)
@pytest.mark.parametrize("reached", [Phase.BOOTING, Phase.PROVING])
def test_field_26_another_system_that_phones_home_fails_the_deployment(
    site: Site, agent: Agent, report: dict[str, object], code: str, reached: Phase
) -> None:
    agent.until(reached)
    assert agent.phone_home(**report) == {"accepted": False, "ask_again": False}
    operation, host = agent.operation(), site.hosts.show("r1n1")
    assert operation.phase is Phase.FAILED
    assert (operation.error or {})["code"] == code
    assert (host.state, host.release) == (HostState.DIRTY, None)
    assert operation.evidence["refused_report"]


def test_a_disk_known_by_its_wwn_alone_is_compared_by_it(agent: Agent) -> None:
    disk = {**inventory()["disks"][0], "serial": None, "wwn": "naa.5000C500A1B2C3D4"}
    agent.inventory = inventory(1, disks=[disk])
    agent.until(Phase.BOOTING)
    same = {"name": "sda", "serial": "x", "wwn": "0x5000c500a1b2c3d4"}
    assert agent.phone_home(root_disk=same) == {"accepted": True, "ask_again": True}
    assert agent.phone_home(root_disk={**same, "wwn": "0x5000c500ffffffff"}) == {
        "accepted": False,
        "ask_again": False,
    }


@pytest.mark.parametrize("reached", [Phase.PREPARING, Phase.WRITING])
def test_a_system_cannot_phone_home_before_it_was_written(
    site: Site, agent: Agent, reached: Phase
) -> None:
    agent.until(reached)
    with pytest.raises(NotAllowed):
        agent.phone_home()
    assert site.phase(agent.operation()) is reached


@pytest.mark.parametrize("nonce", ["", "op_unknown.x", "x", None, 5])
def test_a_wrong_nonce_changes_nothing(site: Site, agent: Agent, nonce: object) -> None:
    agent.until(Phase.BOOTING)
    before = state_of(site)
    with pytest.raises((TrustError, RequestError)):
        agent.phone_home(nonce=nonce)
    with pytest.raises(TrustError):
        agent.phone_home(nonce=f"{agent.operation().id}.{'A' * 43}")
    assert state_of(site) == before


def test_odd_reports_are_kept_short_and_break_nothing(agent: Agent) -> None:
    agent.until(Phase.BOOTING)
    odd = {"ssh_host_keys": None, "failed_units": ["x" * 9999] * 999, "os_release": 5}
    assert agent.phone_home(**odd) == {"accepted": True, "ask_again": True}
    assert len(str(agent.operation().evidence["failed_units"])) < 110_000


def test_a_late_report_of_an_ended_deployment_changes_nothing(site: Site, agent: Agent) -> None:
    agent.until(Phase.BOOTING)
    site.pass_(timedelta(minutes=20))
    assert site.phase(agent.operation()) is Phase.FAILED
    before = state_of(site)
    with pytest.raises(Gone):
        agent.phone_home()
    assert state_of(site) == before


# --- the record ---------------------------------------------------------------------------


def test_field_21_the_record_holds_together_and_no_secret(site: Site, agent: Agent) -> None:
    agent.until(Phase.PROVING)
    seed = site.derived.nonce(agent.operation().id, 1).reveal()
    assert site.pool.passwords == {BMC_PASSWORD}
    assert site.audit.verify() > 8
    texts = site.texts()
    for secret in (BMC_PASSWORD, PROFILE_SECRET, agent.ticket, agent.token, seed):
        assert secret not in texts
    actions = [row.action for row in site.audit.rows()]
    wanted = ["deployment.requested", "deployment.netbooting", "deployment.preparing"]
    wanted += ["deployment.writing", "seed.taken", "deployment.verifying", "deployment.booting"]
    assert [action for action in actions if action in {*wanted, "deployment.proving"}] == [
        *wanted,
        "deployment.proving",
    ]


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit SET actor = 'token:nobody' WHERE number = 3",
        "DELETE FROM audit WHERE number = 3",
        "UPDATE audit SET number = number + 1000 WHERE number = 3",
    ],
)
def test_a_record_changed_behind_our_back_is_found(
    site: Site, agent: Agent, statement: str
) -> None:
    assert agent.number == 1
    tamper(site, statement)
    with pytest.raises(TrustError, match="row 3"):
        site.audit.verify()


def test_no_secret_stands_in_the_database_in_clear(site: Site, agent: Agent) -> None:
    agent.until(Phase.PROVING)
    site.store.close()
    path = site.store._engine.url.database
    assert path is not None
    with open(path, "rb") as file:
        content = file.read()
    for secret in (BMC_PASSWORD, agent.ticket, agent.token):
        assert secret.encode() not in content


def test_what_is_kept_of_a_report_is_bounded(site: Site, agent: Agent) -> None:
    """An agent may send a body of a mebibyte; rows that are read at every look may not hold it."""
    agent.until(Phase.PREPARING)
    site.agents.failed(
        agent.token,
        {"generation": agent.generation, "code": "x", "message": "m", "found": "f" * 500_000},
        agent.source,
    )
    error = agent.operation().error
    assert error is not None
    assert len(error["found"]) < 3000
    assert "500002 bytes" in error["found"]


def test_an_inventory_without_end_is_refused(agent: Agent) -> None:
    agent.inventory = {**inventory(1), "cpu": {"model": "x" * 200_000, "count": 1}}
    with pytest.raises(RequestError, match="too large"):
        agent.boots().hello()
