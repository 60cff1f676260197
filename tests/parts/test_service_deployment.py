"""One deployment by calls as the agent makes them, and everything that may come between."""

import socket
import threading
from collections.abc import Iterator
from datetime import timedelta

import pytest

from provisioner.core.guard import WriteRefused
from provisioner.core.model import Firmware, HostState, Phase
from provisioner.errors import Conflict, ProvisionerError, RequestError, TrustError
from provisioner.service.agents import TicketRefused, TokenRefused
from provisioner.service.identity import with_inventory
from tests.parts.service_site import (
    ACTOR,
    TICKET_LIFETIME,
    Agent,
    Site,
    inventory,
    mac,
    profile_document,
    state_of,
)


@pytest.fixture
def ssh_port() -> Iterator[int]:
    """The port of a server that greets as an SSH server does."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.sendall(b"SSH-2.0-OpenSSH_9.2p1\r\n")

        threading.Thread(target=greet, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


# --- the whole way ------------------------------------------------------------------------


def test_a_host_is_rebuilt_and_proven(site: Site, ssh_port: int) -> None:
    site.profiles.save("web", profile_document(ssh_port), actor=ACTOR)
    site.add_host()
    operation = site.deploy("r1n1")
    assert site.perform() == 3
    agent = Agent(site).until(Phase.PREPARING)
    assert site.hosts.show("r1n1").state is HostState.DIRTY
    agent.authorise()
    agent.progress(done_bytes=1, total_bytes=2)
    seed = agent.seed()
    agent.progress("verifying", done_bytes=2, total_bytes=2)
    assert agent.done() == {"restart": "reboot"}
    site.perform()
    assert agent.phone_home() == {"accepted": True, "ask_again": True}

    site.worker.check(operation.id)
    site.clock.pass_(9)
    agent.phone_home()
    site.worker.check(operation.id)
    assert site.phase(operation) is Phase.PROVING
    site.clock.pass_(1)
    site.worker.check(operation.id)

    ended, host = site.at(operation), site.hosts.show("r1n1")
    release = site.releases.show("tiny@1")
    assert ended.phase is Phase.SUCCEEDED
    assert (host.state, host.release, host.last_good) == ("active", release.digest, release.digest)
    assert host.root_disk == {"serial": "LAB-r1n1-0", "wwn": None, "size_bytes": 8 * 1024**3}
    assert (host.uuid, host.serial, host.firmware) == (inventory()["uuid"], "SN-1", "bios")
    assert ended.evidence["release_id"] == release.release_id
    assert ended.evidence["checks"][f"ssh:{ssh_port}"]["found"] == "SSH-2.0-OpenSSH_9.2p1"
    assert "hostname: r1n1" in seed["user-data"]
    assert f"instance-id: {operation.id}-1" in seed["meta-data"]
    assert site.bmc().changes() == [
        "soft_off",
        "next_boot network once",
        "power_on",
        "next_boot disk once",
    ]
    assert set(ended.phase_seconds) == {str(p) for p in Phase} - {
        "succeeded",
        "failed",
        "cancelled",
    }


def test_the_second_release_replaces_the_first(site: Site, ssh_port: int) -> None:
    site.profiles.save("web", profile_document(ssh_port), actor=ACTOR)
    site.add_host()
    instance_ids = set()
    for release in ("tiny@1", "tiny@2"):
        operation = site.deploy("r1n1", release=release)
        site.perform()
        agent = Agent(site).until(Phase.WRITING)
        assert site.hosts.show("r1n1").release is None
        instance_ids.add(agent.seed()["meta-data"].splitlines()[0])
        agent.done()
        agent.phone_home()
        site.worker.check(operation.id)
        site.clock.pass_(10)
        agent.phone_home()
        site.worker.check(operation.id)
        assert site.hosts.show("r1n1").release == site.releases.show(release).digest
    assert len(instance_ids) == 2


def test_an_unhealthy_system_begins_its_soak_anew(site: Site, ssh_port: int) -> None:
    site.profiles.save("web", profile_document(ssh_port), actor=ACTOR)
    site.add_host()
    operation = site.deploy("r1n1")
    site.perform()
    agent = Agent(site).until(Phase.PROVING)
    site.worker.check(operation.id)
    site.clock.pass_(8)
    agent.phone_home(failed_units=["nginx.service"])
    site.worker.check(operation.id)
    assert site.at(operation).evidence["checks"]["systemd"]["found"] == "nginx.service"
    agent.phone_home()
    site.worker.check(operation.id)
    site.clock.pass_(8)
    site.worker.check(operation.id)
    assert site.phase(operation) is Phase.PROVING
    site.clock.pass_(2)
    agent.phone_home()
    site.worker.check(operation.id)
    assert site.phase(operation) is Phase.SUCCEEDED


# --- tickets ------------------------------------------------------------------------------


def test_the_ticket_of_an_ended_operation_is_refused_and_noted(site: Site, agent: Agent) -> None:
    agent.boots().hello()
    agent.failed()
    before = state_of(site)
    with pytest.raises(TicketRefused, match="used already"):
        agent.hello()
    assert state_of(site) == before
    assert any("refused" in line.text for _, line in site.hosts.timeline("r1n1"))
    assert site.audit.rows()[-1].action == "ticket.refused"


def test_an_unknown_ticket_is_refused_and_noted(site: Site, agent: Agent) -> None:
    before = state_of(site)
    agent.ticket = "bt_" + "A" * 43
    with pytest.raises(TicketRefused, match="not known"):
        agent.hello()
    assert state_of(site) == before
    # Anybody can invent tickets, so they reach the bounded timeline and not the audit log.
    assert site.audit.rows()[-1].action != "ticket.refused"
    assert "not known" in site.texts()


def test_an_expired_ticket_is_refused(site: Site, agent: Agent) -> None:
    agent.boots()
    site.clock.pass_(TICKET_LIFETIME.total_seconds())
    before = state_of(site)
    with pytest.raises(TicketRefused, match="expired"):
        agent.hello()
    assert state_of(site) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"nics": [{"name": "eth0", "mac": mac(2), "link": True}]},
        {"nics": []},
        {"nics": ["eth0"]},
    ],
    ids=str,
)
def test_another_hosts_inventory_does_not_use_up_a_ticket(
    agent: Agent, changes: dict[str, object]
) -> None:
    agent.boots()
    agent.inventory = inventory(1, **changes)
    with pytest.raises(TicketRefused, match="another host"):
        agent.hello()
    agent.inventory = inventory(1)
    assert agent.hello()["host"] == "r1n1"


def test_a_uuid_that_is_known_must_come_back(site: Site) -> None:
    site.add_host(uuid=inventory()["uuid"].upper())
    site.deploy("r1n1")
    site.perform()
    agent = Agent(site, inventory=inventory(1, uuid=inventory(2)["uuid"])).boots()
    with pytest.raises(TicketRefused, match="another UUID"):
        agent.hello()


def test_identity_is_written_once(site: Site, agent: Agent) -> None:
    agent.inventory = inventory(1, serial="SN-1")
    agent.boots().hello()
    agent.failed()
    site.deploy("r1n1")
    site.perform()
    other = Agent(site, inventory=inventory(1, serial="SN-other")).boots()
    with pytest.raises(TicketRefused, match="another serial"):
        other.hello()
    again = Agent(site, inventory=inventory(1, serial="sn-1 ", firmware="uefi"))
    again.boots().hello()
    host = site.hosts.show("r1n1")
    # The firmware's mode is no identity: it may be switched, and then the boot flag follows.
    assert (host.serial, host.firmware) == ("SN-1", "uefi")


@pytest.mark.parametrize(
    ("enrolled", "reported", "kept"),
    [
        (None, "secure-boot", Firmware.SECURE_BOOT),
        (Firmware.UEFI, "secure-boot", Firmware.SECURE_BOOT),
        (Firmware.SECURE_BOOT, "uefi", Firmware.SECURE_BOOT),
        (Firmware.SECURE_BOOT, "bios", Firmware.BIOS),
        (Firmware.SECURE_BOOT, "nonsense", Firmware.SECURE_BOOT),
        (Firmware.SECURE_BOOT, ["uefi"], Firmware.SECURE_BOOT),
    ],
)
def test_a_host_known_for_secure_boot_keeps_the_way_that_always_netboots(
    site: Site, enrolled: Firmware | None, reported: object, kept: Firmware
) -> None:
    host = site.add_host(1, firmware=enrolled)
    assert with_inventory(host, {"firmware": reported}).firmware is kept


def test_a_ticket_of_an_operation_that_was_cancelled_is_refused(site: Site, agent: Agent) -> None:
    agent.boots()
    site.operations.cancel(agent.operation().id, actor=ACTOR)
    with pytest.raises(TicketRefused):
        agent.hello()


def test_a_boot_script_asked_for_twice_carries_the_same_ticket(site: Site, agent: Agent) -> None:
    first = agent.boots().ticket
    assert agent.boots().ticket == first
    assert first not in site.texts()


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"ticket": 5, "inventory": inventory()},
        {"ticket": "x" * 5000, "inventory": inventory()},
        {"ticket": "x", "inventory": []},
        {"ticket": "x", "inventory": {"disks": [], "nics": {}}},
        {"ticket": "x", "inventory": {**inventory(), "disks": [{}]}},
        {"ticket": "x", "inventory": {**inventory(), "disks": inventory()["disks"] * 300}},
    ],
    ids=lambda body: str(body)[:30],
)
def test_a_hello_that_no_agent_of_ours_would_send_is_refused(
    site: Site, body: dict[str, object]
) -> None:
    with pytest.raises(RequestError):
        site.agents.hello(body, "127.0.0.1")


# --- the permission to write --------------------------------------------------------------


def test_the_host_is_dirty_before_the_agent_hears_that_it_may_write(
    site: Site, agent: Agent
) -> None:
    agent.until(Phase.PREPARING)
    assert agent.authorise() == {"permitted": True, "expires_in_s": 30}
    host = site.hosts.show("r1n1")
    assert (host.state, host.release) == (HostState.DIRTY, None)
    assert "LAB-r1n1-0" in " ".join(line.text for _, line in site.hosts.timeline("r1n1"))


def test_field_26_a_disk_swapped_after_hello_is_not_written(site: Site, agent: Agent) -> None:
    agent.until(Phase.PREPARING)
    with pytest.raises(WriteRefused, match="rule picks"):
        agent.authorise(serial="LAB-r1n1-1")
    assert site.audit.rows()[-1].action == "write.refused"
    assert site.audit.rows()[-1].detail["found"]["serial"] == "LAB-r1n1-1"
    assert site.phase(agent.operation()) is Phase.PREPARING


def test_a_disk_swapped_while_writing_is_not_written_further(agent: Agent) -> None:
    agent.until(Phase.WRITING)
    assert agent.authorise(name="sdb")["permitted"]
    with pytest.raises(WriteRefused):
        agent.authorise(serial="LAB-r1n1-1")


@pytest.mark.parametrize("flags", [{"is_protected": True}, {"in_maintenance": True}], ids=str)
@pytest.mark.parametrize("reached", [Phase.PREPARING, Phase.WRITING])
def test_a_host_flagged_in_between_is_not_written(
    site: Site, agent: Agent, flags: dict[str, bool], reached: Phase
) -> None:
    agent.until(reached)
    site.hosts.set_flags("r1n1", actor=ACTOR, **flags)
    with pytest.raises(WriteRefused):
        agent.authorise()
    assert site.phase(agent.operation()) is reached


@pytest.mark.parametrize("flags", [{"is_protected": True}, {"in_maintenance": True}], ids=str)
def test_a_host_flagged_while_queued_is_left_alone(site: Site, flags: dict[str, bool]) -> None:
    site.add_host()
    (operation,) = site.operations.request_deployment(["r1n1"], "tiny@1", options={}, actor=ACTOR)
    site.hosts.set_flags("r1n1", actor=ACTOR, **flags)
    site.worker.start_queued()
    site.perform()
    assert site.phase(operation) is Phase.FAILED
    assert (site.at(operation).error or {})["code"] == "host_refused"
    assert site.bmc().exchanges == []


@pytest.mark.parametrize("disks", [0, 2])
def test_none_or_several_disks_that_fit_are_not_written(
    site: Site, agent: Agent, disks: int
) -> None:
    one = inventory()["disks"][0]
    agent.inventory = inventory(1, disks=[{**one, "serial": f"S{n}"} for n in range(disks)])
    agent.boots().hello()
    with pytest.raises(ProvisionerError) as caught:
        site.agents.authorise(
            agent.token,
            {"generation": 1, "release": agent.release, "disk": {**one, "serial": "S0"}},
            agent.source,
        )
    assert caught.value.code in ("no_disk_matches", "several_disks_match")
    assert site.hosts.show("r1n1").state is HostState.DIRTY  # inspected, and not known further
    assert site.phase(agent.operation()) is Phase.PREPARING


def test_another_release_or_generation_is_not_permitted(site: Site, agent: Agent) -> None:
    agent.until(Phase.PREPARING)
    before = state_of(site)
    right = agent.release
    agent.release = site.releases.show("tiny@2").digest
    with pytest.raises(WriteRefused, match="release"):
        agent.authorise()
    agent.release, agent.generation = right, 2
    with pytest.raises(WriteRefused, match="generation"):
        agent.authorise()
    assert state_of(site) == before


def test_an_agent_without_a_token_is_nobody(agent: Agent) -> None:
    agent.until(Phase.WRITING)
    agent.token = "at_" + "A" * 43
    for call in (agent.authorise, agent.progress, agent.seed, agent.failed, agent.done):
        with pytest.raises(TokenRefused):
            call()


def test_an_agent_of_an_older_operation_is_stopped_everywhere(site: Site, agent: Agent) -> None:
    """It hung, its operation ended, the host was started again, and then it wakes up."""
    agent.until(Phase.WRITING)
    old = Agent(site, ticket=agent.ticket, token=agent.token, generation=1, release=agent.release)
    site.pass_(timedelta(minutes=3))
    assert site.phase(agent.operation()) is Phase.FAILED
    site.deploy("r1n1")
    site.perform()
    agent.until(Phase.WRITING)
    before = state_of(site)
    for call in (old.authorise, old.progress, old.seed, old.failed, old.done, old.hello):
        with pytest.raises(TrustError):
            call()
    assert site.phase(agent.operation()) is Phase.WRITING
    assert state_of(site) == before


def test_a_busy_host_takes_no_second_operation(site: Site, agent: Agent) -> None:
    operation = agent.operation()
    for request in (
        lambda: site.operations.request_deployment(["r1n1"], "tiny@2", options={}, actor=ACTOR),
        lambda: site.operations.request_inspection("r1n1", actor=ACTOR),
    ):
        with pytest.raises(Conflict) as caught:
            request()
        assert operation.id in caught.value.message
        assert "cancel" in (caught.value.hint or "")
    with pytest.raises(Conflict, match="belongs to"):
        site.hosts.power("r1n1", "off", actor=ACTOR)
    with pytest.raises(Conflict, match="not deleted"):
        site.hosts.delete("r1n1", actor=ACTOR)
    assert site.hosts.power("r1n1", "status", actor=ACTOR) == "on"
