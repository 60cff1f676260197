"""Whose address it is, by a file of leases that dnsmasq empties and writes anew all the time."""

import threading
from pathlib import Path

from provisioner.netboot.leases import leases_in
from provisioner.service.addresses import LOOKS, Addresses
from tests.parts.busy_machine import in_one_of

MAC, ADDRESS = "52:54:00:77:00:02", "10.77.0.102"
LINES = [
    f"1764075600 52:54:00:77:01:{n:02x} 10.77.1.{n} * ff:56:50:4d:98:00:02\n" for n in range(200)
]
TEXT = "".join(LINES) + f"1764075600 {MAC} {ADDRESS} * ff:56:50:4d:98:00:02\n"


def test_who_is_missing_for_a_moment_is_looked_for_again() -> None:
    looks = [{}, {MAC: frozenset({"10.77.0.1"})}, {MAC: frozenset({ADDRESS})}]
    assert Addresses(lambda: looks.pop(0), pause=lambda _: None).doubt([MAC], ADDRESS) is None
    assert looks == []


def test_who_is_missing_for_good_is_doubted_soon() -> None:
    pauses: list[float] = []
    doubt = Addresses(dict, pause=pauses.append).doubt([MAC], ADDRESS)
    assert doubt == f"it asks from {ADDRESS}, and our DHCP gave it no address"
    assert len(pauses) == LOOKS - 1
    assert sum(pauses) < 0.5, "a boot script waits for it"


def test_field_18_a_rack_that_boots_at_once_is_not_sent_to_its_disks(tmp_path: Path) -> None:
    """Each answer to one host has the file written anew, while another asks for its script: at
    whichever step of the writing it looks, and then again when that is over."""
    file = tmp_path / "leases"
    doubts, missing = [], 0
    for step in range(0, len(TEXT) + 1, 97):
        file.write_text(TEXT[:step])
        missing += MAC not in (leases_in(file) or {})
        addresses = Addresses(lambda: leases_in(file), pause=lambda _: write_all(file))
        doubts.append(addresses.doubt([MAC], ADDRESS))
    assert missing > 100, "it was caught while it wrote"
    assert doubts == [None] * len(doubts)


def test_the_pauses_are_long_enough_for_a_file_to_be_written(tmp_path: Path) -> None:
    file, stop = tmp_path / "leases", threading.Event()
    file.write_text(TEXT)

    def dnsmasq() -> None:
        while not stop.wait(0.002):
            write_all(file)

    def attempt() -> None:
        addresses = Addresses(lambda: leases_in(file))
        assert [addresses.doubt([MAC], ADDRESS) for _ in range(300)] == [None] * 300

    writer = threading.Thread(target=dnsmasq)
    writer.start()
    try:
        in_one_of(
            attempt, tries=20
        )  # a writer that stands still for long leaves a host at its disk
    finally:
        stop.set()
        writer.join()


def write_all(file: Path) -> None:
    """Write the file anew as dnsmasq does: empty at first, and line by line."""
    with file.open("r+") as stream:
        stream.truncate()
        for line in TEXT.splitlines(keepends=True):
            stream.write(line)
