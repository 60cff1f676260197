"""An attacker's machines on the provisioning network, while hosts are being deployed.

They know what the network tells everybody: names, MACs, UUIDs, serial numbers, our ramdisk. No
secret gets to them, and what they do is noticed. Every secret here is searched for in all that
others may read, and in all that went over the wires.
"""

import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Final

import pytest

from provisioner.core.model import Json
from provisioner.imaging.ramdisk import ramdisks_in
from provisioner.lab import LabHost
from provisioner.lab.site import Site
from tests.lab.attack_site import (
    DISK_MIB,
    Attack,
    assert_nothing_leaked,
    audit_rows,
    begun,
    cannot_boot,
    has_line,
    is_reported,
    last_connection,
    no_seed_left,
    save_profile,
    secrets_of,
)
from tests.lab.attacker import ADDRESS, MAC, Attacker, Twin, be_a_hub, standing_still
from tests.lab.capture import Capture
from tests.lab.conftest import Tell
from tests.lab.sites import (
    MIB,
    OLD_SYSTEM,
    a_site,
    disk_digest,
    disk_path,
    host_of,
    publish_tiny,
    put_old_system,
    reached,
    restart_with,
    says,
    spoken,
    until,
)

pytestmark = pytest.mark.lab

CONTEST_LIMIT_S: Final = 10.0
STEP_LIMIT: Final = timedelta(minutes=3)
FAILED_LIMIT: Final = timedelta(minutes=5)
# A heartbeat is due every three seconds; a refused one ends the writing.
HEARTBEAT_S: Final = 3
LIMITS: Final[dict[str, object]] = {
    "netbooting_s": 120,
    "booting_s": 15,
    "soft_shutdown_s": 1,
    "bmc_exchange_s": 4,
}
# Longer than a BIOS takes to the ramdisk, and over when a service that was restarted then ends
# something; and as short as it can be.
ROGUE_RUNG_S, HASTY_RUNG_S = 75, 3
# Drivers say so when they have found something, and only then does a test know where it is.
SAYS_MORE: Final[dict[str, object]] = {"kernel_arguments": ["no_timer_check", "ignore_loglevel"]}
RANGE: Final[dict[str, object]] = {"range_start": "10.77.0.100", "range_end": "10.77.0.109"}
DISK_FOUND: Final = "[vda]"
ONE, TWO, THREE = "lab-1", "lab-2", "lab-3"


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attack]:
    """Three hosts with old systems, a profile full of secrets, and an attacker on the bridge."""
    directory = tmp_path_factory.mktemp("attack")
    hosts = [LabHost("bios", disks_mib=(DISK_MIB,)) for _ in range(3)]
    changes = {"limits": LIMITS, "ramdisk": SAYS_MORE, "dhcp": RANGE}
    with a_site(directory, hosts, changes) as site:
        captures = [Capture(site.lab, name, directory / f"{name}.pcap") for name in ("br0", "lo")]
        save_profile(site)
        publish_tiny(site, directory, "1", size_mib=DISK_MIB - 32)
        for host in site.lab.hosts:
            site.enrol(host)
        attack = Attack(site, Attacker(site, directory / "attacker"), captures, directory)
        attack.secrets |= secrets_of(site)
        try:
            yield attack
            # Once, at the end: what goes over the wires is mostly ramdisks.
            assert_nothing_leaked(attack)
        finally:
            attack.attacker.end()
            for twin in attack.twins:
                twin.end()
            for capture in captures:
                capture.stop()


@pytest.fixture
def attack(attacked: Attack) -> Iterator[Attack]:
    """The site, with every host off and sound."""
    for host in attacked.site.lab.hosts:
        attacked.site.lab.clear(host.name)
        attacked.site.lab.power(host.name, "off")
        put_old_system(disk_path(attacked.site, host.name))
    assert "provisioner.ticket=" not in attacked.asks_as(ONE), "nothing is to be done there"
    yield attacked
    for host in attacked.site.lab.hosts:
        attacked.site.lab.power(host.name, "off")


def test_of_a_host_and_its_twin_neither_gets_past(attack: Attack, tell: Tell) -> None:
    """Another machine with the host's MAC, UUID and serial boots from the network as the host
    does, with the host's own ticket, and with a disk that says it is the host's."""
    site, victim = attack.site, attack.site.lab.host(ONE)
    before, start = disk_digest(disk_path(site, ONE)), len(site.lab.console(ONE))
    twin = Twin(site, victim, attack.directory / "twin")
    attack.twins.append(twin)

    operation = begun(attack, ONE)
    says(site, ONE, DISK_FOUND, start=start)
    with standing_still(victim):
        # A host may be slow to start, and the other one be the first to say hello.
        twin.power_on()
        twin.says("permission to write", STEP_LIMIT)
        twin.stands_still()
        thawed_at = time.time()
    # It would write for some seconds, and the host may take longer than that to its hello.
    ended = reached(site, operation, "failed", limit=FAILED_LIMIT)
    said_before = twin.goes_on()

    assert ended["error"]["code"] == "ticket_contested"
    told_at = is_reported(attack, ONE, operation)
    asked_at = last_connection(attack, ended["evidence"]["agent_address"], told_at, thawed_at)
    tell(f"the host's claim was reported after {told_at - asked_at:.3f} s")
    assert told_at - asked_at < CONTEST_LIMIT_S

    # The host never had a permission: every byte is as it was, and its old system runs.
    says(site, ONE, OLD_SYSTEM, start=start)
    site.lab.power(ONE, "off")
    assert disk_digest(disk_path(site, ONE)) == before
    # And the other one was stopped, before it had a seed or a disk that boots.
    assert "FAILED" not in said_before
    twin.says("FAILED", STEP_LIMIT)
    no_seed_left(attack, ONE, operation)
    cannot_boot(Path(twin.disk.path))
    assert host_of(site, ONE)["operation"] is None, "nothing starts it again by itself"
    assert why(site, ONE) == "ticket_contested"


def test_field_20_what_was_heard_on_the_wire_opens_nothing(attack: Attack, tell: Tell) -> None:
    """A flooded switch lets the attacker hear the boot script, and so the ticket, of a host."""
    site = attack.site
    before, start = disk_digest(disk_path(site, ONE)), len(site.lab.console(ONE))
    be_a_hub(site, hub=True)
    try:
        attack.attacker.begins("sniff", limit_s=STEP_LIMIT.total_seconds() / 3)
        operation = begun(attack, ONE)
        ticket = attack.attacker.result()
    finally:
        be_a_hub(site, hub=False)
    assert operation in ticket
    until(
        "the host says hello",
        lambda: has_line(site, ONE, operation, "agent says hello"),
        STEP_LIMIT,
    )

    asked_at = time.time()
    answer = attack.calls("/agent/v1/hello", {**attack.papers(ONE), "ticket": ticket})
    assert (answer["status"], answer["code"]) == (403, "ticket_contested")
    assert "token" not in answer["names"]
    told_at = is_reported(attack, ONE, operation)
    tell(f"the attacker's claim was reported after {told_at - asked_at:.3f} s")
    assert 0 <= told_at - asked_at < CONTEST_LIMIT_S
    assert reached(site, operation, "failed")["error"]["code"] == "ticket_contested"
    assert why(site, ONE) == "ticket_contested"

    replays(attack, ONE, ticket)
    # Before its permission the host is sent back to its disk, after it the agent has to stop.
    until("the host stops", lambda: stopped(spoken(site, ONE, start)), STEP_LIMIT)
    after = disk_digest(disk_path(site, ONE))
    if after != before:
        cannot_boot(disk_path(site, ONE))
    time.sleep(HEARTBEAT_S)
    assert disk_digest(disk_path(site, ONE)) == after, "nothing more is written"
    no_seed_left(attack, ONE, operation)


def stopped(said: str) -> bool:
    return "FAILED" in said or OLD_SYSTEM in said


def why(site: Site, name: str) -> str:
    with site.client() as client:
        return str(client.why(name)["cause"])


def replays(attack: Attack, name: str, ticket: str) -> None:
    """The attacker comes again with what it heard, and with what it makes of that."""
    hello = {**attack.papers(name), "ticket": ticket}
    again = attack.calls("/agent/v1/hello", hello)
    assert (again["status"], again["code"]) == (403, "ticket_contested")
    stem = ticket.removeprefix("bt_").rpartition(".")[0]
    guesses = {
        "nothing": "",
        "the ticket": ticket,
        "a guess": "at_" + "A" * 43,
        "a guess in the right form": f"at_{stem}.host_0123456789abcdef.{'A' * 43}.{'B' * 43}",
        "the ticket as a token": f"at_{ticket.removeprefix('bt_')}",
    }
    for what, token in guesses.items():
        for call in ("seed", "authorise", "progress", "done", "failed"):
            refused = attack.calls(f"/agent/v1/{call}", _body_of(call), token)
            assert refused["status"] == (403 if token else 401), f"{call} with {what}: {refused}"
    for nonce in (f"{stem}.{'A' * 43}", ticket, ticket.removeprefix("bt_")):
        home = {"nonce": nonce, "release_id": "0" * 64, "root_disk": {}, "boot_id": "b"}
        assert attack.calls("/report/v1/phone-home", home)["status"] == 403
    assert "provisioner.ticket" not in attack.asks_as(name)


def _body_of(call: str) -> Json:
    disk = {"name": "vda", "serial": "LAB-lab-1-0", "wwn": None, "size_bytes": DISK_MIB * MIB}
    more: dict[str, Json] = {
        "authorise": {"release": "0" * 64, "disk": disk},
        "progress": {"phase": "writing", "done_bytes": 1, "total_bytes": 1},
        "done": {"release": "0" * 64, "written_bytes": 1, "fetched_bytes": 1, "seconds": {}},
        "failed": {"code": "x", "message": "x"},
    }
    return {"generation": 1, **more.get(call, {})}


def test_a_stolen_token_gets_no_second_seed_and_nothing_when_it_is_over(attack: Attack) -> None:
    """Whoever holds a token is its agent. Here a program says what lab-2's agent says, whose
    machine never comes, and then has its token stolen."""
    site, host = attack.site, attack.site.lab.host(TWO)
    before = disk_digest(disk_path(site, TWO))
    site.lab.fault(TWO, "link-down")
    attack.attacker.does("become", mac=host.mac)
    urls = {"url": site.settings.boot.url, "agent": site.settings.agent.url}
    order = {"query": attack.query(TWO), "body": attack.papers(TWO), "limit_s": 60}
    attack.attacker.begins("claim", **urls, **order)
    operation = begun(attack, TWO)
    hello = attack.attacker.result()
    assert hello["status"] == 200
    _, chance, mac = attack.attacker.does("reveal").rsplit(".", 2)
    attack.secrets |= {"agent token": chance, "agent token's code": mac}
    body = {"generation": hello["generation"]}
    assert attack.calls("/agent/v1/seed", body, "mine")["status"] == 403, "before it may write"
    disk = {key: attack.papers(TWO)["inventory"]["disks"][0][key] for key in ("name", "serial")}
    asked = {**body, "release": hello["release"], "disk": {**disk, "wwn": None}}
    asked["disk"]["size_bytes"] = host.disks[0].size_bytes
    assert attack.calls("/agent/v1/authorise", asked, "mine")["permitted"] is True

    seed = attack.calls("/agent/v1/seed", body, "mine")
    assert (seed["status"], "user-data" in seed["names"]) == (200, True)
    stolen = attack.calls("/agent/v1/seed", body, "mine")
    assert (stolen["status"], stolen["code"]) == (410, "gone")
    until(
        "the second request is in the timeline",
        lambda: has_line(site, TWO, operation, "seed asked for a second time, refused"),
        timedelta(seconds=CONTEST_LIMIT_S),
    )
    assert audit_rows(site, "seed.refused", operation)

    failed = {**body, "code": "given_up", "message": "the agent gave up"}
    assert attack.calls("/agent/v1/failed", failed, "mine")["status"] == 200
    reached(site, operation, "failed")
    for call in ("seed", "authorise", "progress", "done"):
        late = attack.calls(f"/agent/v1/{call}", {**_body_of(call), **body}, "mine")
        assert (late["status"], late["code"]) == (403, "token_refused"), call
    again = {**attack.papers(TWO), "ticket": hello["ticket"], "attempt": 2}
    assert attack.calls("/agent/v1/hello", again)["code"] == "ticket_refused"
    attack.attacker.does("be_oneself", mac=MAC, address=ADDRESS)
    assert disk_digest(disk_path(site, TWO)) == before


def test_a_rogue_dhcp_server_gets_a_host_and_nothing_else(attack: Attack, tell: Tell) -> None:
    """The attacker takes every address that our DHCP has, and then answers the host itself: it
    gives it a boot script that sends our own ramdisk to the attacker's own service."""
    site, host = attack.site, attack.site.lab.host(THREE)
    before, start = disk_digest(disk_path(site, THREE)), len(site.lab.console(THREE))
    restart_with(site, {"limits": {**LIMITS, "netbooting_s": ROGUE_RUNG_S}})
    ramdisk = ramdisks_in(site.settings.data_dir / "ramdisks")[0].name
    assert attack.attacker.does("starve", count=20) > 0
    script = ROGUE_SCRIPT.format(files=f"{site.settings.boot.url}/ramdisks/{ramdisk}", own=ADDRESS)
    attack.attacker.does(
        "rogue", mac=host.mac, own=ADDRESS, address="10.77.0.67", script=script, ports=[8080, 8443]
    )
    operation = begun(attack, THREE)
    assert "provisioner.ticket" not in attack.asks_as(THREE), "our DHCP knows no such address"
    said = says(site, THREE, "ROGUE-SCRIPT-RUNS", start=start)
    assert "10.77.0.67" in said or "10.77.0.66" in said

    def is_refused() -> bool:
        return any(line.startswith("TLS refused") for line in attack.attacker.does("heard"))

    until("the rogue's key is refused", is_refused, FAILED_LIMIT)
    # All has been seen; what is left is to wait for the end.
    restart_with(site, {"limits": {**LIMITS, "netbooting_s": HASTY_RUNG_S}})
    ended = reached(site, operation, "failed", limit=FAILED_LIMIT)
    restart_with(site, {"limits": LIMITS})
    assert ended["error"]["code"] == "netbooting_timed_out"
    heard = attack.attacker.does("heard")
    tell(f"the rogue heard: {sorted(set(heard))}")
    assert any(line.startswith("TLS refused") for line in heard), "its key is not the pinned one"
    assert not [line for line in heard if line.startswith("TLS said")]
    no_seed_left(attack, THREE, operation)
    assert has_line(site, THREE, operation, "wrong server-ID")
    assert why(site, THREE) == "other_dhcp_server"
    assert not has_line(site, THREE, operation, "agent says hello")
    assert not has_line(site, THREE, operation, "may write")
    site.lab.power(THREE, "off")
    assert disk_digest(disk_path(site, THREE)) == before


ROGUE_SCRIPT: Final = """\
#!ipxe
echo ROGUE-SCRIPT-RUNS
kernel {files}/vmlinuz initrd=initrd provisioner.boot=http://{own}:8080 \
provisioner.agent=https://{own}:8443 provisioner.ticket=bt_rogue \
provisioner.net=${{netX/mac}},${{netX/ip}},${{netX/netmask}}, \
console=ttyS0,115200 quiet no_timer_check panic=30
initrd --name initrd {files}/initrd
boot
"""
