"""Whose a boot ticket is: one host, one session, one address, one use. Whoever else comes with
it ends the operation for all, and what could be two hosts gets none."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from provisioner.core.bootplan import LocalDisk, Ramdisk
from provisioner.core.guard import TicketPermit
from provisioner.core.lifecycle import LIMIT, E
from provisioner.core.model import BootDevice, Event, HostState, Json, Kind, Phase
from provisioner.errors import RequestError
from provisioner.service.agents import TicketRefused, TokenRefused
from provisioner.service.chance import digest_of
from provisioner.service.identity import IdentityDoubtful, TicketContested
from tests.parts.service_site import (
    ACTOR,
    GATEWAY,
    PROFILE_SECRET,
    Agent,
    Site,
    inventory,
    mac,
    tamper,
)
from tests.parts.test_service_boot import reason

ZEROS = "00000000-0000-0000-0000-000000000000"
ONES = "ffffffff-ffff-ffff-ffff-ffffffffffff"
SESSION, OTHER = "5e" * 32, "07" * 32
ATTACKER = "10.77.0.66"


def body(agent: Agent, session: str = SESSION, attempt: int = 1, **found: Any) -> Json:
    return {
        "ticket": agent.ticket,
        "inventory": {**agent.inventory, **found},
        "session": session,
        "attempt": attempt,
    }


def open_with(agent: Agent, source: str = GATEWAY, **more: Any) -> None:
    """Say hello as the host that the agent runs on does, and keep what is told."""
    told = agent.site.agents.hello(body(agent, **more), source)
    agent.token, agent.generation = told["token"], told["generation"]
    agent.release = told["release"]


def alarms(site: Site) -> list[tuple[str, str]]:
    wanted = ("ticket_contested", "identity_doubtful")
    return [(row.action, row.subject) for row in site.audit.rows() if row.action in wanted]


def line_with(site: Site, text: str) -> Event:
    return next(event for _, event in site.hosts.timeline("r1n1") if text in event.text)


def go_to(agent: Agent, phase: Phase) -> None:
    """Bring a deployment to a phase, with a session."""
    agent.boots()
    open_with(agent)
    steps: dict[Phase, Callable[[], object]] = {
        Phase.PREPARING: lambda: None,
        Phase.WRITING: agent.authorise,
        Phase.VERIFYING: lambda: (agent.seed(), agent.progress("verifying")),
        Phase.BOOTING: agent.done,
        Phase.PROVING: agent.phone_home,
    }
    for reached, step in steps.items():
        step()
        agent.site.perform()
        if reached is phase:
            return


# --- a second claimant ------------------------------------------------------------------------

CLAIMS: dict[str, Json] = {
    "another session": {"session": OTHER},
    "another host": {"attempt": 2, "nics": [{"name": "eth0", "mac": mac(2), "link": True}]},
    "another UUID": {"attempt": 2, "uuid": inventory(2)["uuid"]},
    "another serial": {"attempt": 2, "serial": "SN-2"},
}


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
def test_field_20_a_second_claimant_ends_it_for_both_before_the_first_write(
    site: Site, agent: Agent, claim: Json
) -> None:
    """Any machine on the network could read another's configuration. Here neither gets any."""
    go_to(agent, Phase.PREPARING)
    with pytest.raises(TicketContested) as caught:
        site.agents.hello(body(agent, **claim), ATTACKER)
    assert (caught.value.code, caught.value.host) == ("ticket_contested", "r1n1")
    operation = agent.operation()
    assert operation.phase is Phase.FAILED
    assert (operation.error or {})["code"] == "ticket_contested"
    assert alarms(site) == [("ticket_contested", "r1n1")]
    line = line_with(site, "ticket_contested")
    assert line.detail["address"] == ATTACKER
    for call in (agent.authorise, agent.progress, agent.seed, agent.done):
        with pytest.raises(TokenRefused):
            call()
    # The host goes back to its own disk, which nobody has touched.
    site.perform()
    assert site.bmc().booted[-1] is BootDevice.DISK
    assert site.hosts.show("r1n1").state is not HostState.AVAILABLE
    assert reason(site.ask()) == "no boot ticket"


@pytest.mark.parametrize(
    "phase", [Phase.WRITING, Phase.VERIFYING, Phase.BOOTING, Phase.PROVING], ids=str
)
def test_after_the_first_write_it_fails_with_the_disk_as_it_is(
    site: Site, agent: Agent, phase: Phase
) -> None:
    go_to(agent, phase)
    assert agent.operation().phase is phase
    started = len(site.bmc().booted)
    with pytest.raises(TicketContested):
        site.agents.hello(body(agent, OTHER), ATTACKER)
    assert agent.operation().phase is Phase.FAILED
    assert site.hosts.show("r1n1").state is HostState.DIRTY
    site.perform()
    assert len(site.bmc().booted) == started, "nobody restarts a host that holds half a system"
    with pytest.raises(TokenRefused):
        agent.seed()


def test_a_comparison_is_contested_as_well(site: Site) -> None:
    site.add_host()
    site.operations.request_verification(["r1n1"], "tiny@1", actor=ACTOR)
    site.worker.start_queued()
    site.perform()
    agent = Agent(site).boots()
    open_with(agent)
    assert agent.operation().kind is Kind.VERIFICATION
    with pytest.raises(TicketContested):
        site.agents.hello(body(agent, OTHER), ATTACKER)
    assert agent.operation().phase is Phase.FAILED


def test_the_session_that_used_it_is_no_second_claimant(site: Site, agent: Agent) -> None:
    """Its answer was lost, it came late, or a proxy sent it twice: the host is the same."""
    agent.boots()
    open_with(agent)
    open_with(agent, attempt=3)
    for attempt in (1, 2, 3):
        with pytest.raises(TicketRefused) as caught:
            site.agents.hello(body(agent, attempt=attempt), GATEWAY)
        assert not isinstance(caught.value, TicketContested)
    agent.authorise()
    with pytest.raises(TicketRefused) as caught:
        site.agents.hello(body(agent, attempt=4), GATEWAY)
    assert not isinstance(caught.value, TicketContested)
    assert agent.operation().phase is Phase.WRITING
    assert alarms(site) == []


@pytest.mark.parametrize("invented", ["bt_" + "A" * 43, "x", "op_1", "bt_"])
def test_invented_tickets_stop_nobody(site: Site, agent: Agent, invented: str) -> None:
    """Or anybody on the network could end every deployment."""
    go_to(agent, Phase.PREPARING)
    genuine, agent.ticket = agent.ticket, invented
    rows = len(site.audit.rows())
    for _ in range(20):
        with pytest.raises(TicketRefused):
            site.agents.hello(body(agent, OTHER), ATTACKER)
    assert len(site.audit.rows()) == rows
    agent.ticket = genuine
    assert agent.authorise()["permitted"] is True


def test_the_ticket_of_an_earlier_operation_contests_no_later_one(site: Site, agent: Agent) -> None:
    agent.boots()
    old = agent.ticket
    open_with(agent)
    agent.failed()
    site.clock.pass_(1)
    site.deploy("r1n1")
    site.perform()
    agent.boots()
    open_with(agent, session=OTHER)
    current, agent.ticket = agent.ticket, old
    for _ in range(50):
        with pytest.raises(TicketContested):
            site.agents.hello(body(agent, "aa" * 32), ATTACKER)
    agent.ticket = current
    assert agent.operation().phase is Phase.PREPARING
    assert alarms(site) == [("ticket_contested", "r1n1")], "one row, however often it is repeated"


def failed_at_once(agent: Agent) -> None:
    agent.authorise()
    assert PROFILE_SECRET in agent.seed()["user-data"]
    agent.failed()


def proven_without_a_write(agent: Agent) -> None:
    agent.authorise()
    agent.seed()
    agent.done()
    agent.phone_home()
    operation = agent.operation()
    with agent.site.store.begin() as tx:
        agent.site.transitions.apply(
            tx, operation.id, E.SOAKED, generation=operation.generation, actor=ACTOR
        )


@pytest.mark.parametrize("ending", [failed_at_once, proven_without_a_write])
def test_who_comes_first_cannot_silence_the_alarm_by_ending_the_operation(
    site: Site, agent: Agent, ending: Callable[[Agent], None]
) -> None:
    agent.boots()
    open_with(agent, session=OTHER, source=ATTACKER)
    ending(agent)
    ended = agent.operation()
    assert ended.is_final
    with pytest.raises(TicketContested):
        site.agents.hello(body(agent), GATEWAY)
    assert alarms(site) == [("ticket_contested", "r1n1")]
    site.pass_(timedelta(hours=1))
    assert agent.operation().id == ended.id, "nothing follows"
    assert agent.operation().follow_up_at is None


def test_an_inspection_that_another_answered_is_contested(site: Site) -> None:
    site.add_host()
    site.operations.request_inspection("r1n1", actor=ACTOR)
    site.worker.start_queued()
    site.perform()
    agent = Agent(site).boots()
    site.agents.hello(body(agent, OTHER, uuid=inventory(2)["uuid"], serial="SN-2"), ATTACKER)
    assert agent.operation().phase is Phase.SUCCEEDED
    with pytest.raises(TicketContested):
        site.agents.hello(body(agent), GATEWAY)
    assert alarms(site) == [("ticket_contested", "r1n1")]


def test_a_ticket_that_was_taken_back_unused_raises_no_alarm(site: Site, agent: Agent) -> None:
    agent.boots()
    site.operations.cancel(agent.operation().id, actor=ACTOR)
    with pytest.raises(TicketRefused) as caught:
        site.agents.hello(body(agent), GATEWAY)
    assert not isinstance(caught.value, TicketContested)
    assert alarms(site) == []


@pytest.mark.parametrize("flag", ["is_protected", "in_maintenance"])
def test_a_host_that_is_flagged_on_its_way_gets_no_ticket_and_is_given_back(
    site: Site, agent: Agent, flag: str
) -> None:
    agent.boots()
    tamper(site, f"UPDATE hosts SET {flag} = true")
    assert isinstance(site.ask(), LocalDisk)
    with pytest.raises(TicketRefused, match="is left alone"):
        open_with(agent)
    site.pass_(LIMIT[Phase.NETBOOTING])
    operation = agent.operation()
    assert (operation.phase, operation.rung) == (Phase.FAILED, 0)
    assert (operation.error or {})["code"] == "host_refused"
    assert site.bmc().next_boot is BootDevice.DISK
    assert site.bmc().is_on


def test_a_uuid_with_a_blank_is_the_same_uuid(site: Site, agent: Agent) -> None:
    uuid = inventory()["uuid"]
    agent.boots()
    open_with(agent, uuid=f" {uuid} ")
    assert site.hosts.show("r1n1").uuid == uuid


def test_a_contest_says_its_ticket_to_nobody(site: Site, agent: Agent) -> None:
    go_to(agent, Phase.PREPARING)
    with pytest.raises(TicketContested):
        site.agents.hello(body(agent, OTHER), ATTACKER)
    told = site.texts() + repr(agent.operation())
    assert agent.ticket not in told
    assert agent.token not in told
    assert OTHER not in told


# --- bound to the host as it was enrolled ---------------------------------------------------------


def test_a_ticket_is_for_the_host_as_it_was_enrolled_when_it_was_issued(site: Site) -> None:
    site.add_host(uuid=inventory(1)["uuid"].upper(), serial="SN-1 ")
    site.deploy("r1n1")
    agent = Agent(site).boots()
    with site.store.read() as tx:
        ticket = tx.ticket(digest_of(agent.ticket))
    assert ticket is not None
    assert (ticket.macs, ticket.uuid, ticket.serial) == ((mac(1),), inventory(1)["uuid"], "sn-1")
    # Whatever is written into the host's row in between does not move the ticket.
    other = inventory(2)
    tamper(site, f"UPDATE hosts SET uuid = '{other['uuid']}', serial = 'SN-2'")
    agent.inventory = {**other, "nics": agent.inventory["nics"]}
    with pytest.raises(TicketRefused, match="another UUID"):
        agent.hello()


@pytest.mark.parametrize("serial", ["To be filled by O.E.M.", "Default string", "none"])
def test_a_serial_that_a_maker_left_blank_binds_nothing(site: Site, serial: str) -> None:
    site.add_host(serial=serial)
    site.deploy("r1n1")
    assert isinstance(site.ask(serial="SN-1"), Ramdisk)
    Agent(site).boots().hello()


def test_another_serial_than_the_enrolled_one_boots_the_disk(site: Site) -> None:
    site.add_host(serial="SN-1")
    site.deploy("r1n1")
    assert "enrolled with sn-1" in reason(site.ask(serial="SN-2"))
    assert isinstance(site.ask(serial="sn-1"), Ramdisk)
    assert isinstance(site.ask(serial="Not Specified"), Ramdisk)


def test_a_ticket_needs_the_permit_of_its_own_operation(site: Site, agent: Agent) -> None:
    operation, host = agent.operation(), site.hosts.show("r1n1")
    for permit in (None, TicketPermit(operation.id, operation.generation + 1)):
        with pytest.raises(TypeError), site.store.begin() as tx:
            site.transitions.issue_ticket(tx, operation, host, permit)  # type: ignore[arg-type] # that is the test


# --- who could be two hosts -------------------------------------------------------------------


@pytest.mark.parametrize("uuid", [ZEROS, ONES, ONES.upper()])
def test_public_a_uuid_that_identifies_nobody_gets_no_ticket(site: Site, uuid: str) -> None:
    site.add_host()
    site.deploy("r1n1")
    assert "identifies nobody" in reason(site.ask(uuid=uuid))
    assert "identifies nobody" in line_with(site, "boot script").text
    agent = Agent(site).boots()
    with pytest.raises(IdentityDoubtful):
        site.agents.hello(body(agent, uuid=uuid), GATEWAY)
    operation = agent.operation()
    assert (operation.phase, (operation.error or {})["code"]) == (
        Phase.FAILED,
        "identity_doubtful",
    )
    assert alarms(site) == [("identity_doubtful", "r1n1")]
    assert "identity_doubtful" in line_with(site, "identity_doubtful").text
    assert site.hosts.show("r1n1").uuid is None


@pytest.mark.parametrize("uuid", [ZEROS, ONES])
def test_a_host_cannot_be_enrolled_as_nobody(site: Site, uuid: str) -> None:
    with pytest.raises(RequestError, match="identifies nobody"):
        site.add_host(uuid=uuid)


@pytest.mark.discovering
def test_a_machine_that_is_nobody_is_not_discovered(site: Site) -> None:
    assert "identifies nobody" in reason(site.ask(9, uuid=ZEROS))
    assert site.hosts.list() == []
    assert f"{mac(9)}" in site.texts()


def test_public_a_duplicate_uuid_overwrites_nobody(site: Site) -> None:
    """The last writer won, in public. Here the identity is written once, and doubt stops."""
    same = inventory(1)["uuid"]
    site.add_host(2, uuid=same)
    site.add_host(1)  # its UUID is not known yet
    site.deploy("r1n1")
    agent = Agent(site).boots()
    with pytest.raises(IdentityDoubtful) as caught:
        agent.hello()
    assert caught.value.found == {"uuid": {same: ["r1n2"]}, "macs": {}}
    assert agent.operation().phase is Phase.FAILED
    assert site.hosts.show("r1n1").uuid is None
    assert site.hosts.show("r1n2").uuid == same
    assert alarms(site) == [("identity_doubtful", "r1n1")]


def test_a_uuid_that_a_twin_got_after_the_start_boots_the_disk(site: Site) -> None:
    same = inventory(1)["uuid"]
    site.add_host(1, uuid=same)
    site.deploy("r1n1")
    site.add_host(2, uuid=same)
    assert "known for r1n1, r1n2" in reason(site.ask())
    assert "known for r1n1, r1n2" in line_with(site, "boot script").text


def test_a_host_with_the_nic_of_another_one_is_stopped(site: Site, agent: Agent) -> None:
    site.add_host(2)
    agent.boots()
    nics = [{"name": f"eth{n}", "mac": mac(n), "link": True} for n in (1, 2)]
    with pytest.raises(IdentityDoubtful) as caught:
        site.agents.hello(body(agent, nics=nics), GATEWAY)
    assert caught.value.found == {"macs": {mac(2): ["r1n2"]}}
    assert agent.operation().phase is Phase.FAILED


def test_a_mac_that_is_known_for_two_hosts_boots_the_disk(site: Site) -> None:
    """Our tables have no room for it; a database that was merged by hand might."""
    site.add_host(1)
    site.add_host(2)
    site.deploy("r1n1")
    tamper(site, "CREATE TABLE kept AS SELECT * FROM nics")
    tamper(site, "DROP TABLE nics")
    tamper(site, "ALTER TABLE kept RENAME TO nics")
    tamper(site, f"UPDATE nics SET mac = '{mac(1)}'")
    plan = site.ask()
    assert isinstance(plan, LocalDisk)
    assert set(plan.reason.removeprefix("this MAC is known for ").split(", ")) == {"r1n1", "r1n2"}
    lines = [event.text for host in ("r1n1", "r1n2") for _, event in site.hosts.timeline(host)]
    assert any("this MAC is known for" in line for line in lines)


# --- its address, where our own DHCP gave it ------------------------------------------------------


def test_both_addresses_are_noted(site: Site, agent: Agent) -> None:
    agent.boots()
    open_with(agent)
    assert line_with(site, "boot script: deploy ramdisk").detail["address"] == GATEWAY
    assert agent.operation().evidence["agent_address"] == GATEWAY


def test_public_an_address_of_its_own_is_asked_for_where_our_dhcp_gives_it(
    site: Site, agent: Agent
) -> None:
    """Identity is never by address; but where we gave one, another one is a lie."""
    site.leases[mac(1)] = frozenset({"10.77.0.101"})
    told = reason(site.ask(source=ATTACKER))
    assert told == f"it asks from {ATTACKER}, and our DHCP gave it 10.77.0.101"
    assert told in line_with(site, "boot script: ").text
    agent.ticket = ""
    plan = site.ask(source="10.77.0.101")
    assert isinstance(plan, Ramdisk)
    agent.ticket = plan.ticket.reveal()
    with pytest.raises(TicketRefused, match="not its host's"):
        open_with(agent, source=ATTACKER)
    assert agent.operation().phase is Phase.NETBOOTING, "the host itself may still come"
    open_with(agent, source="10.77.0.101")
    # And the second one, from there, with the session that it may have overheard.
    with pytest.raises(TicketContested):
        open_with(agent, source=ATTACKER, attempt=2)
    assert agent.operation().phase is Phase.FAILED


def test_public_where_our_dhcp_answers_whoever_has_no_lease_gets_no_ticket(
    site: Site, agent: Agent
) -> None:
    """Before the host has asked for an address, nobody else has its name by saying it."""
    site.leases[mac(2)] = frozenset({ATTACKER})
    told = reason(site.ask(source=ATTACKER))
    assert told == f"it asks from {ATTACKER}, and our DHCP gave it no address"
    site.leases[mac(1)] = frozenset({"10.77.0.101"})
    agent.ticket = ""
    plan = site.ask(source="10.77.0.101")
    assert isinstance(plan, Ramdisk)
    agent.ticket = plan.ticket.reveal()
    del site.leases[mac(1)]
    with pytest.raises(TicketRefused, match="not its host's"):
        open_with(agent, source="10.77.0.101")
    assert agent.operation().phase is Phase.NETBOOTING


def test_where_others_give_out_addresses_they_may_change_on_the_way(agent: Agent) -> None:
    """Firmware, iPXE and Linux get three leases from some servers, and are one host."""
    agent.boots()
    open_with(agent, source="10.77.0.150")
    open_with(agent, source="10.77.0.151", attempt=2)
    assert agent.authorise()["permitted"] is True


def test_a_host_may_ask_by_any_of_its_nics(site: Site) -> None:
    site.add_host(1, macs=(mac(1), mac(11)))
    site.deploy("r1n1")
    site.leases[mac(1)] = frozenset({"10.77.0.101"})
    site.leases[mac(11)] = frozenset({"10.77.0.111"})
    for source in ("10.77.0.101", "10.77.0.111", "127.0.0.1"):
        assert isinstance(site.ask(source=source), Ramdisk)
