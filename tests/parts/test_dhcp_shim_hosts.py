"""The list of hosts that our dnsmasq gives shim to, as the database's answers change."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from provisioner.errors import Unavailable
from provisioner.netboot.shim_hosts import ShimHosts

ONE, TWO = "52:54:00:77:00:01", "52:54:00:77:00:02"
LINE = f"dhcp-host={ONE},id:*,set:secure-boot\n"


class Database:
    """What is enrolled with Secure Boot on, or None while the database is away."""

    def __init__(self, macs: Sequence[str] | None) -> None:
        self.macs = macs

    def __call__(self) -> Sequence[str]:
        if self.macs is None:
            raise Unavailable("the database cannot serve now")
        return self.macs


def test_the_file_follows_the_database_and_says_when_it_changed(tmp_path: Path) -> None:
    file, database = tmp_path / "hosts", Database([])
    hosts = ShimHosts(file, database, on_change=lambda: None)
    assert (hosts.look(), file.read_text(), hosts.look()) == (True, "", False)
    database.macs = [ONE]
    assert (hosts.look(), file.read_text(), hosts.look()) == (True, LINE, False)
    database.macs = [TWO, ONE]
    assert hosts.look()
    assert file.read_text() == LINE + LINE.replace(ONE, TWO)
    assert [path.name for path in tmp_path.iterdir()] == ["hosts"]


def test_while_the_database_is_away_the_list_stays(tmp_path: Path) -> None:
    """And where there is none yet, an empty one lets dnsmasq start."""
    file, database = tmp_path / "hosts", Database(None)
    hosts = ShimHosts(file, database, on_change=lambda: None)
    assert (hosts.look(), file.read_text()) == (True, "")
    database.macs = [ONE]
    assert hosts.look()
    database.macs = None
    assert (hosts.look(), file.read_text()) == (False, LINE)


def test_a_mac_that_is_none_keeps_the_list_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text(LINE)
    hosts = ShimHosts(file, lambda: [f"{TWO}\nport=53"], on_change=lambda: None)
    assert (hosts.look(), file.read_text()) == (False, LINE)


def test_a_disk_that_takes_nothing_is_tried_again(tmp_path: Path) -> None:
    """Until then, and also where the word to dnsmasq was what failed."""
    changes, stop, failed = threading.Semaphore(0), threading.Event(), threading.Event()

    def tell() -> None:
        if not failed.is_set():
            failed.set()
            raise ProcessLookupError
        changes.release()

    file = tmp_path / "not yet there" / "hosts"
    hosts = ShimHosts(file, Database([ONE]), on_change=tell, look_s=0.01)
    with pytest.raises(FileNotFoundError):
        hosts.look()
    thread = threading.Thread(target=hosts.run, args=(stop,))
    thread.start()
    time.sleep(0.1)
    assert thread.is_alive()
    file.parent.mkdir()
    assert changes.acquire(timeout=60)
    assert file.read_text() == LINE
    stop.set()
    thread.join(60)
    assert not thread.is_alive()
    assert not changes.acquire(blocking=False), "told of it once"


def test_dnsmasq_is_told_of_each_change_until_the_end(tmp_path: Path) -> None:
    changes, stop, database = threading.Semaphore(0), threading.Event(), Database([])
    hosts = ShimHosts(tmp_path / "hosts", database, on_change=changes.release, look_s=0.01)
    thread = threading.Thread(target=hosts.run, args=(stop,))
    thread.start()
    for macs in ([ONE], [ONE, TWO]):
        time.sleep(0.02)
        database.macs = macs
        assert changes.acquire(timeout=60)
    stop.set()
    thread.join(60)
    assert not thread.is_alive()
