"""What DHCP and TFTP saw gets into the timelines of known hosts, and of nobody else."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from provisioner.core.bootplan import Loader
from provisioner.core.downloads import SEEN
from provisioner.core.model import Event
from provisioner.netboot.dnsmasq import DhcpClient, DhcpEvent
from provisioner.netboot.leases import leases_in
from provisioner.netboot.neighbours import neighbour_at
from provisioner.netboot.network_lines import NAME_CHARACTERS_MAX, dhcp_line, tftp_line
from provisioner.netboot.tftp import Outcome, TftpEvent
from provisioner.service.network_lines import (
    MACS_LOOK_S,
    OF_A_CLIENT,
    WHILE_BUSY,
    WHILE_IDLE,
    Admission,
    NetworkLines,
    Quota,
    SeenFrom,
)
from provisioner.store.engine import open_engine
from provisioner.store.sql_store import SqlStore
from tests.parts.processes import until
from tests.parts.service_site import Outbox, Site, mac
from tests.parts.stores import NOW, a_host, sealing

AT_HOST = "10.77.0.101"
STRANGER = "52:54:00:99:99:99"


class Ticking:
    """A monotonic clock that tests move."""

    def __init__(self) -> None:
        self.at = 0.0

    def __call__(self) -> float:
        return self.at


@pytest.fixture
def ticking() -> Ticking:
    return Ticking()


@pytest.fixture
def lines(site: Site, ticking: Ticking) -> Iterator[NetworkLines]:
    made = NetworkLines(site.store, {AT_HOST: mac(1)}.get, ticking)
    yield made
    made.close()


def discover(who: str = mac(1), client: DhcpClient = DhcpClient.FIRMWARE, text: str = "") -> Event:
    line = dhcp_line(DhcpEvent("DISCOVER", who, None, text, client), NOW)
    assert line is not None
    return line


def transfer(client: str = AT_HOST, file: str = "undionly.kpxe") -> Event:
    return tftp_line(TftpEvent(client, file, Outcome.SERVED, "", 69632, 0.4), NOW)


def saved(site: Site, name: str = "r1n1") -> list[Event]:
    return [
        one for _, one in site.hosts.timeline(name, limit=1000) if one.source in ("dhcp", "tftp")
    ]


def test_a_packet_and_a_transfer_become_lines_of_their_host(
    site: Site, lines: NetworkLines
) -> None:
    host = site.add_host()
    lines.add(discover())
    lines.add(transfer())
    lines.close()
    first, second = saved(site)
    assert (first.host_id, first.mac) == (second.host_id, second.mac) == (host.id, mac(1))
    assert first.text == "the firmware asks for an address (DHCP DISCOVER)"
    assert first.detail == {"packet": "DISCOVER", "client": "firmware", "address": None}
    assert second.text == "undionly.kpxe: served, 69632 bytes in 0.4 s"
    assert second.detail["outcome"] == "served"


def test_strangers_leave_no_trace_and_cost_one_look_in_a_while(
    site: Site, ticking: Ticking
) -> None:
    site.add_host()
    admit = Admission(site.store, {AT_HOST: mac(1)}.get, ticking)
    assert admit([discover(STRANGER), transfer("10.77.0.222")]) == []
    site.add_host(2)
    assert admit([discover(mac(2))]) == [], "looked at a moment ago"
    ticking.at += MACS_LOOK_S
    (known,) = admit([discover(STRANGER), discover(mac(2))])
    assert known.mac == mac(2)
    with site.store.read() as tx:
        assert not [one for _, one in tx.events() if one.mac == STRANGER]


def test_a_system_that_renews_its_lease_is_of_interest_while_something_is_under_way(
    site: Site, ticking: Ticking
) -> None:
    site.add_host()
    admit = Admission(site.store, lambda _: None, ticking)
    renewal = discover(client=DhcpClient.SYSTEM)
    assert admit([renewal]) == []
    site.deploy("r1n1")
    assert len(admit([renewal])) == 1


def test_a_host_that_asks_on_and_on_pushes_nothing_else_out(site: Site, ticking: Ticking) -> None:
    site.add_host()
    admit = Admission(site.store, lambda _: None, ticking)
    assert len(admit([discover()] * 1000)) == WHILE_IDLE.lines
    ticking.at += WHILE_IDLE.seconds_per_line
    assert len(admit([discover()] * 1000)) == 1
    site.deploy("r1n1")
    assert len(admit([discover()] * 1000)) == WHILE_BUSY.lines, "an operation begins with its own"
    ticking.at += 10 * WHILE_BUSY.seconds_per_line
    assert len(admit([discover()] * 1000)) == 10


def test_one_client_does_not_fill_the_queue_for_the_others(site: Site, lines: NetworkLines) -> None:
    site.add_host(1)
    site.add_host(2)
    for _ in range(OF_A_CLIENT.lines * 100):
        lines.add(discover(mac(1)))
        lines.add(transfer())
    lines.add(discover(mac(2)))
    lines.close()
    assert len(saved(site, "r1n2")) == 1
    assert len(saved(site)) == WHILE_IDLE.lines


def test_clients_are_forgotten_the_longest_silent_first(ticking: Ticking) -> None:
    quota = Quota(replace(WHILE_IDLE, lines=1), ticking, clients_max=2)
    assert [quota.takes(name) for name in ("a", "a", "b", "a", "c")] == [
        *(True, False, True, False, True)
    ]
    assert quota.takes("b"), "forgotten, so it begins anew"
    assert not quota.takes("c")


def test_without_a_database_lines_are_lost_and_nobody_waits(tmp_path: Path) -> None:
    store = SqlStore(open_engine(f"sqlite:///{tmp_path / 'none.db'}"), Outbox(), sealing())
    lines = NetworkLines(store, lambda _: None)
    with capture_logs() as logs:

        def said(text: str) -> bool:
            return text in [one["event"] for one in logs]

        lines.add(discover())
        until(lambda: said("events wait for the database"), 60)
        lines.add(discover())
        assert not said("events were not saved"), "taken while the first one still waited"
        lines.close()
        until(lambda: said("events were not saved"), 60)
    store.close()


def test_names_from_the_network_are_cut_and_printable() -> None:
    line = tftp_line(TftpEvent(AT_HOST, "a\x1b[2J\n" + "x" * 1000, Outcome.NOT_FOUND), NOW)
    assert line.text.isprintable()
    assert len(line.detail["file"]) == NAME_CHARACTERS_MAX
    told = discover(text="no address available\n\x07")
    assert told.detail["trouble"] == "no address available??"
    assert told.text.isprintable()


def told_to_boot(address: str, loader: Loader = Loader.IPXE, answer: str = "ramdisk") -> Event:
    detail = {"address": address, "answer": answer, "loader": str(loader)}
    return Event(NOW, "http", "boot script", mac=mac(1), detail=detail)


def test_a_boot_script_notes_whether_its_downloads_will_be_seen() -> None:
    """Only where the address that asked is known for the host's: not behind a router or proxy."""
    noted = SeenFrom({AT_HOST: mac(1), "10.77.0.102": mac(2)}.get)
    elsewhere = ("10.77.0.102", "192.0.2.1")
    scripts = [told_to_boot(AT_HOST), *(told_to_boot(one) for one in elsewhere)]
    assert [one.detail[SEEN] for one in noted(scripts)] == [True, False, False]
    others = [told_to_boot(AT_HOST, Loader.GRUB), told_to_boot(AT_HOST, answer="disk"), discover()]
    assert noted(others) == others


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("OFFER", "10.77.0.101 offered to the iPXE (DHCP OFFER)"),
        ("ACK", "10.77.0.101 given to the iPXE (DHCP ACK)"),
        ("NAK", "the iPXE was refused the address it asked for: wrong network (DHCP NAK)"),
        ("RELEASE", None),
        ("BOOTFILE", None),
    ],
)
def test_what_a_client_calls_itself_stays_out(kind: str, text: str | None) -> None:
    said = "wrong network" if kind == "NAK" else "my-secret-name"
    line = dhcp_line(DhcpEvent(kind, mac(1), AT_HOST, said, DhcpClient.IPXE), NOW)
    assert (line.text if line else None) == text


def test_the_kernel_knows_who_was_heard_at_an_address(tmp_path: Path) -> None:
    table = tmp_path / "arp"
    table.write_text(
        "IP address       HW type     Flags       HW address            Mask     Device\n"
        f"10.77.0.101      0x1         0x2         {mac(1)}     *        br0\n"
        "10.77.0.102      0x1         0x0         00:00:00:00:00:00     *        br0\n"
    )
    assert neighbour_at("10.77.0.101", table) == mac(1)
    assert neighbour_at("10.77.0.102", table) is None
    assert neighbour_at("10.77.0.10", table) is None
    assert neighbour_at("10.77.0.101", tmp_path / "none") is None
    assert neighbour_at("203.0.113.77") is None
    assert leases_in(tmp_path / "none") is None


def test_the_macs_of_all_hosts_are_read_at_once(store: SqlStore) -> None:
    with store.begin() as tx:
        tx.add_host(a_host())
    with store.read() as tx:
        assert dict(tx.macs()) == {one: a_host().id for one in a_host().macs}
