"""Whose address it is, by a file of leases that dnsmasq empties and writes anew all the time."""

import threading
from pathlib import Path

from provisioner.netboot.leases import leases_in
from provisioner.service.addresses import LOOKS, Addresses

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
    """Each answer to one host has the file written anew, while another asks for its script."""
    file, stop = tmp_path / "leases", threading.Event()
    file.write_text(TEXT)

    def dnsmasq() -> None:
        with file.open("r+") as stream:
            while not stop.wait(0.002):
                stream.seek(0)
                stream.truncate()
                for line in TEXT.splitlines(keepends=True):
                    stream.write(line)
                stream.flush()

    writer = threading.Thread(target=dnsmasq)
    writer.start()
    try:
        seen = [leases_in(file) or {} for _ in range(3000)]
        addresses = Addresses(lambda: leases_in(file))
        doubts = [addresses.doubt([MAC], ADDRESS) for _ in range(300)]
    finally:
        stop.set()
        writer.join()
    assert any(MAC not in leases for leases in seen), "it was caught while it wrote"
    assert doubts == [None] * 300
