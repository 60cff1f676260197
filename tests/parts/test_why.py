"""`provisioner why` over a whole service: the real use cases make the timeline it reads."""

import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from click import unstyle

from provisioner.cli.why import lines_of
from provisioner.client import Client
from provisioner.core.model import Operation, Phase
from provisioner.errors import NotFound
from provisioner.netboot.dnsmasq import DhcpClient, DhcpEvent
from provisioner.netboot.network_lines import dhcp_line, tftp_line
from provisioner.netboot.tftp import Outcome, TftpEvent
from provisioner.web.api import create_app
from tests.parts.command_line import Cli, commands_of
from tests.parts.http_listener import listening
from tests.parts.recovery_site import with_a_profile_that_proves
from tests.parts.service_site import (
    ACTOR,
    GATEWAY,
    RAMDISK,
    Agent,
    Site,
    keep,
    mac,
    profile_document,
)

GRUB_INITRD: Final = f"/ramdisks/{RAMDISK}/initrd"
GOLDEN: Final = Path(__file__).parents[1] / "golden" / "why"


@pytest.fixture
def cli(site: Site) -> Iterator[Cli]:
    with commands_of(site) as cli:
        yield cli


def cause(site: Site) -> str:
    return site.why.ask("r1n1").diagnosis.cause


def hears(site: Site, kind: str, client: DhcpClient = DhcpClient.FIRMWARE, text: str = "") -> None:
    """Let our DHCP see a packet of host r1n1."""
    line = dhcp_line(DhcpEvent(kind, mac(1), GATEWAY, text, client), site.clock())
    assert line is not None
    _keep(site, line)


def hands_out(site: Site, outcome: Outcome, file: str = "undionly.kpxe") -> None:
    _keep(site, tftp_line(TftpEvent(GATEWAY, file, outcome), site.clock()))


def _keep(site: Site, line: Any) -> None:
    keep(site.store, replace(line, host_id=site.hosts.show("r1n1").id))
    site.clock.pass_(1)


def started(site: Site) -> Operation:
    """Return a deployment whose host was switched on."""
    site.add_host()
    operation = site.deploy("r1n1")
    site.perform()
    site.clock.pass_(1)
    return operation


def give_up(site: Site) -> None:
    """Let all three starts run out of time."""
    for _ in range(3):
        site.pass_(timedelta(minutes=10, seconds=1))


def test_nothing_was_ever_done(site: Site) -> None:
    site.add_host()
    assert cause(site) == "idle"
    with pytest.raises(NotFound, match="r1n9"):
        site.why.ask("r1n9")


def test_a_deployment_that_goes_well_is_told_at_each_step(site: Site) -> None:
    with_a_profile_that_proves(site)
    site.add_host()
    seen = [cause(site)]
    operation = site.deploy("r1n1")
    site.perform()
    agent = Agent(site)
    seen.append(cause(site))
    for phase in (Phase.PREPARING, Phase.WRITING, Phase.VERIFYING, Phase.BOOTING, Phase.PROVING):
        agent = agent.until(phase) if phase is Phase.PREPARING else _on(agent, phase)
        assert site.phase(operation) is phase
        seen.append(cause(site))
    while site.phase(operation) is Phase.PROVING:
        site.clock.pass_(5)
        agent.phone_home()
        site.worker.check(operation.id)
    seen.append(cause(site))
    assert site.phase(operation) is Phase.SUCCEEDED
    works = ["agent_works"] * 3
    assert seen == ["idle", "netbooting", *works, "system_starts", "soaks", "healthy"]


def _on(agent: Agent, phase: Phase) -> Agent:
    """Take the one step that leads to `phase`."""
    steps: dict[Phase, list[Callable[[], object]]] = {
        Phase.WRITING: [agent.authorise],
        Phase.VERIFYING: [agent.seed, lambda: agent.progress("verifying")],
        Phase.BOOTING: [agent.done],
        Phase.PROVING: [agent.phone_home],
    }
    for step in steps[phase]:
        step()
    agent.site.perform()
    return agent


def test_a_bmc_that_agrees_and_does_nothing(site: Site) -> None:
    site.add_host()
    site.bmc().lies_about_off = True
    site.deploy("r1n1")
    site.perform()
    found = site.why.ask("r1n1").diagnosis
    assert found.cause == "bmc_disobeyed"
    assert "its BMC acknowledged and reports it on" in found.why


def test_a_bmc_that_takes_its_time(site: Site) -> None:
    site.add_host()
    site.deploy("r1n1")
    assert cause(site) == "netbooting"
    site.clock.pass_(61)
    assert cause(site) == "bmc_not_done_yet"
    site.perform()
    assert cause(site) == "netbooting"


def test_a_bmc_that_is_silent_and_one_that_refuses_the_login(site: Site) -> None:
    site.add_host()
    site.bmc().is_silent = True
    site.deploy("r1n1")
    site.perform()
    assert cause(site) == "bmc_unreachable"
    site.bmc().is_silent, site.bmc().refuses_login = False, True
    site.deploy("r1n1")
    site.perform()
    found = site.why.ask("r1n1").diagnosis
    assert found.cause == "bmc_wrong_password"
    assert "127.0.1.1 port 623" in found.why
    assert found.evidence[-1].source in ("bmc", "service")


@pytest.mark.parametrize(
    ("packets", "expected"),
    [
        ([], "nothing_heard"),
        (["DISCOVER"], "dhcp_silent"),
        (["DISCOVER", "OFFER"], "dhcp_offer_not_taken"),
        (["DISCOVER", "OFFER", "REQUEST", "ACK"], "no_tftp"),
    ],
    ids=["nothing", "asked", "offered", "addressed"],
)
def test_how_far_dhcp_came(site: Site, packets: list[str], expected: str) -> None:
    started(site)
    for packet in packets:
        hears(site, packet)
    assert cause(site) == "netbooting"
    site.clock.pass_(5 * 60)
    assert cause(site) == expected
    give_up(site)
    assert cause(site) == expected


def test_a_full_range_and_a_host_that_started_its_own_disk(site: Site) -> None:
    started(site)
    hears(site, "DISCOVER", DhcpClient.SYSTEM)
    give_up(site)
    assert cause(site) == "booted_its_disk"
    site.deploy("r1n1")
    site.perform()
    hears(site, "DISCOVER", text="no address available")
    give_up(site)
    found = site.why.ask("r1n1").diagnosis
    assert found.cause == "dhcp_no_address"
    assert "no address available" in found.why


def test_how_far_tftp_and_the_boot_script_came(site: Site) -> None:
    operation = started(site)
    for packet in ("DISCOVER", "OFFER", "REQUEST", "ACK"):
        hears(site, packet)
    steps = (
        ("tftp_not_found", lambda: hands_out(site, Outcome.NOT_FOUND, "pxelinux.0")),
        ("tftp_aborted", lambda: hands_out(site, Outcome.TIMED_OUT)),
        ("no_boot_script", lambda: hands_out(site, Outcome.SERVED)),
        ("ramdisk_not_heard", site.ask),
        ("download_cut", lambda: hands_out(site, Outcome.TIMED_OUT, GRUB_INITRD)),
        ("ramdisk_silent", lambda: hands_out(site, Outcome.SERVED, GRUB_INITRD)),
        ("agent_not_heard", lambda: hears(site, "DISCOVER", DhcpClient.SYSTEM)),
    )
    for expected, happen in steps:
        happen()
        site.clock.pass_(90)
        assert cause(site) == expected
    give_up(site)
    assert site.phase(operation) is Phase.FAILED
    assert cause(site) == "agent_not_heard"


def test_a_host_that_is_not_the_enrolled_one_is_sent_to_its_disk(site: Site) -> None:
    site.add_host(uuid="7b3d2a52-0c65-4d5b-9d3c-2c6a2f3f0001")
    site.deploy("r1n1")
    site.perform()
    site.clock.pass_(1)
    site.ask(uuid="7b3d2a52-0c65-4d5b-9d3c-2c6a2f3f0099")
    site.clock.pass_(300)
    found = site.why.ask("r1n1").diagnosis
    assert found.cause == "sent_to_its_disk"
    assert "was enrolled with 7b3d2a52-0c65-4d5b-9d3c-2c6a2f3f0001" in found.why


@pytest.mark.parametrize(
    ("phase", "code", "expected"),
    [
        (Phase.PREPARING, "no_disk_matches", "no_disk_matches"),
        (Phase.PREPARING, "several_disks_match", "several_disks_match"),
        (Phase.PREPARING, "disk_too_small", "disk_too_small"),
        (Phase.WRITING, "disk_failed", "disk_write_failed"),
        (Phase.VERIFYING, "disk_failed", "disk_read_failed"),
        (Phase.VERIFYING, "read_back_mismatch", "read_back_mismatch"),
        (Phase.WRITING, "chunk_corrupt", "chunk_corrupt"),
        (Phase.WRITING, "chunk_unavailable", "chunk_unavailable"),
    ],
)
def test_what_an_agent_says_is_the_cause(
    agent: Agent, site: Site, phase: Phase, code: str, expected: str
) -> None:
    agent.until(phase).failed(code)
    site.perform()
    found = site.why.ask("r1n1").diagnosis
    assert found.cause == expected
    assert f"failed in {phase}" in found.stands


def test_an_agent_that_falls_silent(agent: Agent, site: Site) -> None:
    agent.until(Phase.WRITING)
    agent.progress(done_bytes=30, total_bytes=120)
    site.clock.pass_(61)
    assert cause(site) == "agent_silent"
    site.pass_(timedelta(minutes=4))
    found = site.why.ask("r1n1").diagnosis
    assert found.cause == "agent_silent"
    assert "25 % of 120 bytes" in found.why
    assert "follows at" in found.stands


def test_a_contested_ticket_and_a_doubtful_identity(agent: Agent, site: Site) -> None:
    agent.until(Phase.PREPARING)
    with pytest.raises(Exception, match="ticket"):
        Agent(site, ticket=agent.ticket).hello()
    site.perform()
    assert cause(site) == "ticket_contested"


def test_field_26_a_stale_system_is_named_by_the_disk_that_it_runs_from(
    agent: Agent, site: Site
) -> None:
    agent.until(Phase.BOOTING)
    agent.phone_home(root_disk={"name": "sdb", "serial": "ANOTHER-DISK", "wwn": None})
    site.perform()
    found = site.why.ask("r1n1").diagnosis
    assert found.cause == "wrong_disk"
    assert "ANOTHER-DISK" in found.why


def test_a_stale_release_and_a_system_that_is_never_heard(agent: Agent, site: Site) -> None:
    agent.until(Phase.BOOTING)
    site.clock.pass_(7 * 60)
    assert cause(site) == "system_not_heard"
    hears(site, "DISCOVER", DhcpClient.SYSTEM)
    assert cause(site) == "system_without_word"
    agent.phone_home(release_id="an old one")
    assert cause(site) == "wrong_system"


def test_the_check_that_fails_is_named(site: Site) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # and nobody listens there
        site.profiles.save("web", profile_document(silent.getsockname()[1]), actor=ACTOR)
        site.add_host()
        site.deploy("r1n1")
        site.perform()
        agent = Agent(site).until(Phase.PROVING)
        site.worker.check(agent.operation().id)
    found = site.why.ask("r1n1").diagnosis
    assert found.cause == "unhealthy"
    assert "ssh" in found.why


@pytest.mark.rules(in_flight_max=1)
def test_why_it_waits(site: Site) -> None:
    site.add_host(2)
    site.deploy("r1n2")
    site.add_host()
    site.deploy("r1n1")
    found = site.why.ask("r1n1").diagnosis
    assert found.cause == "waits_for_its_turn"
    assert "limits.deployments_in_flight_max 1" in found.why


def test_a_flag_that_was_set_while_it_waited(site: Site) -> None:
    site.add_host()
    site.operations.request_deployment(["r1n1"], "tiny@1", options={}, actor=ACTOR)
    site.hosts.set_flags("r1n1", in_maintenance=True, actor=ACTOR)
    site.worker.start_queued()
    assert cause(site) == "in_maintenance"
    site.hosts.set_flags("r1n1", in_maintenance=False, actor=ACTOR)
    assert cause(site) == "host_refused"


def test_a_quarantined_host_keeps_its_cause_and_shows_the_way_out(agent: Agent, site: Site) -> None:
    operation = agent.operation()
    agent.until(Phase.WRITING).failed()
    site.operations.cancel(operation.id, actor=ACTOR)
    found = site.why.ask("r1n1").diagnosis
    assert found.cause == "disk_write_failed"
    assert "quarantined (" in found.stands
    assert found.next[-1] == "provisioner host release r1n1: ends its quarantine"


def test_an_attempt_says_which_failure_it_follows(agent: Agent, site: Site) -> None:
    first = agent.operation()
    agent.until(Phase.WRITING).failed()
    site.perform()
    site.clock.pass_(61)
    site.recovery.take_due()
    assert (
        f"another attempt, since {first.id} failed (disk_failed)"
        in site.why.ask("r1n1").diagnosis.stands
    )


def test_a_viewer_may_ask_and_nobody_else(site: Site) -> None:
    started(site)
    token = site.tokens.create("eyes", "viewer", expires_in=None, actor=ACTOR).reveal()
    with listening(create_app(site)) as url:
        with Client(url, token) as client:
            answer = client.why("r1n1")
        refused = httpx.get(f"{url}/api/v1/hosts/r1n1/why")
    assert refused.status_code == 401
    assert answer["host"] == "r1n1"
    assert (answer["kind"], answer["phase"], answer["cause"]) == (
        "deployment",
        "netbooting",
        "netbooting",
    )
    assert {line["source"] for line in answer["evidence"]} == {"bmc", "service"}


def test_the_command_prints_it_in_each_format(cli: Cli, site: Site) -> None:
    started(site)
    document = cli.json("why", "r1n1")
    assert document["cause"] == "netbooting"
    assert "cause: netbooting" in cli("why", "r1n1", "-o", "yaml").stdout
    assert cli("why", "r1n1", "-o", "name").stdout == "netbooting\n"
    assert cli("why", "r1n1").stdout.startswith("r1n1")
    assert "did you mean r1n1" in cli("why", "r1n", exit_code=2).stderr


def silent_dhcp(site: Site) -> None:
    started(site)
    for _ in range(3):
        hears(site, "DISCOVER")
    site.clock.pass_(300)


def dying_disk(site: Site) -> None:
    started(site)
    Agent(site).until(Phase.WRITING).failed()
    site.perform()


def nothing_wrong(site: Site) -> None:
    site.add_host()


@pytest.fixture
def in_utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Local time is UTC, and what it was again for the tests that follow."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize("happens", [silent_dhcp, dying_disk, nothing_wrong])
def test_what_a_person_reads_is_kept_as_it_is(
    cli: Cli, site: Site, happens: Callable[[Site], None], in_utc: None
) -> None:
    """To change a golden page, write it anew, and read it as if at three in the morning."""
    del in_utc
    happens(site)
    answer = cli.json("why", "r1n1")
    text = "\n".join([*map(unstyle, lines_of(answer, site.clock())), ""])
    shown = text.replace(answer["operation"] or "op_1", "op_1")
    assert shown == (GOLDEN / f"{happens.__name__}.txt").read_text()
