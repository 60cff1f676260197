"""Workers under stress: many processes, killed workers, dead parents, and where secrets are."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from provisioner.bmc.ipmi import IpmiPool
from provisioner.bmc.workers import Workers
from provisioner.core.model import BmcAddress, PowerState
from provisioner.errors import BmcBusy, BmcUnreachable
from tests.parts.processes import children, is_gone, until

from .ipmi import PASSWORD, IpmiSim, running_ipmi_sim, running_relay

# Nothing ends an exchange by itself within so long: a child that is stopped cannot give up,
# and the deadline is far away.
KILLED_SECONDS = 60.0
FAR_AWAY = timedelta(hours=1)

ROOT = Path(__file__).parents[2]

# Reads its orders from stdin, so that the password is in no argument here either.
CLIENT = """
import json, sys, threading
from pathlib import Path
from provisioner.bmc.ipmi import IpmiPool
from provisioner.core.model import BmcAddress, Secret

order = json.loads(sys.stdin.readline())
pool = IpmiPool(Path(order["locks"]))
failures = []

def work(port):
    bmc = pool.bmc(BmcAddress("127.0.0.1", port, "admin", Secret(order["password"])))
    for _ in range(order["exchanges"]):
        try:
            bmc.power()
        except Exception as error:
            failures.append(repr(error))

threads = [threading.Thread(target=work, args=(port,)) for port in order["ports"]]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
pool.close()
print(json.dumps(failures))
"""


# Has only so many file handles left, and then enough again.
SHORT_OF_HANDLES = """
import json, os, resource, sys
from pathlib import Path
from provisioner.bmc.ipmi import IpmiPool
from provisioner.core.model import BmcAddress, Secret
from provisioner.errors import DeviceError

order = json.loads(sys.stdin.readline())
pool = IpmiPool(Path(order["locks"]))
bmc = pool.bmc(BmcAddress("127.0.0.1", order["port"], "admin", Secret(order["password"])))
free = os.open("/dev/null", os.O_RDONLY)
os.close(free)
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (free + order["left"], hard))
said = []
for _ in range(2):
    try:
        said.append(str(bmc.power()))
    except DeviceError as error:
        said.append(f"{error.code}: {error.message}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
pool.close()
print(json.dumps(said))
"""


@pytest.fixture
def sim(tmp_path: Path) -> Iterator[IpmiSim]:
    with running_ipmi_sim(tmp_path / "bmc") as sim:
        yield sim


def _client(locks: Path, ports: list[int], exchanges: int) -> subprocess.Popen[str]:
    client = subprocess.Popen(
        [sys.executable, "-c", CLIENT],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    order = {"locks": str(locks), "ports": ports, "exchanges": exchanges, "password": PASSWORD}
    assert client.stdin is not None
    client.stdin.write(json.dumps(order) + "\n")
    client.stdin.flush()
    return client


def _exchange_in_background(
    pool: IpmiPool, where: BmcAddress
) -> tuple[threading.Thread, list[object]]:
    results: list[object] = []

    def work() -> None:
        try:
            results.append(pool.bmc(where).power())
        except BmcUnreachable as error:
            results.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, results


def _stopped_child(worker: int) -> int:
    """Return the child that does the worker's exchange, stopped: it cannot end by itself."""
    until(lambda: len(children(worker)) == 1)
    [child] = children(worker)
    os.kill(child, signal.SIGSTOP)
    return child


@pytest.mark.parametrize(("left", "what"), [(0, "the lock of BMC"), (1, "a BMC worker")])
def test_a_machine_without_handles_or_memory_is_a_failure_that_passes(
    sim: IpmiSim, tmp_path: Path, left: int, what: str
) -> None:
    order = {"locks": str(tmp_path / "locks"), "port": sim.port, "password": PASSWORD, "left": left}
    run = subprocess.run(
        [sys.executable, "-c", SHORT_OF_HANDLES],
        cwd=ROOT,
        input=json.dumps(order) + "\n",
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    failed, then = json.loads(run.stdout)
    assert failed.startswith(f"bmc_unreachable: {what}")
    assert then in ("on", "off")


@pytest.mark.parametrize("bmcs", [1, 3])
def test_every_exchange_of_several_processes_and_threads_succeeds(
    bmcs: int, tmp_path: Path
) -> None:
    """Four processes of four threads: 160 exchanges, none lost, whatever they share."""
    sims = [running_ipmi_sim(tmp_path / f"bmc-{number}") for number in range(bmcs)]
    started = [sim.__enter__() for sim in sims]
    try:
        ports = [started[number % bmcs].port for number in range(4)]
        clients = [_client(tmp_path / "locks", ports, 10) for _ in range(4)]
        failures = [client.communicate(timeout=300)[0] for client in clients]
    finally:
        for sim in sims:
            sim.__exit__(None, None, None)
    assert [json.loads(found) for found in failures] == [[], [], [], []]
    assert sum(sim.log().count("Session started") for sim in started) >= 160


def test_a_worker_killed_in_an_exchange_fails_that_exchange_alone(
    sim: IpmiSim, tmp_path: Path
) -> None:
    pool = IpmiPool(tmp_path / "locks", exchange_limit=FAR_AWAY)
    try:
        pool.bmc(sim.where()).power()
        [worker] = pool.workers.pids()
        sim.pause()
        thread, results = _exchange_in_background(pool, sim.where())
        child = _stopped_child(worker)
        os.kill(worker, signal.SIGKILL)
        thread.join(KILLED_SECONDS)
        assert isinstance(results[0], BmcUnreachable)
        until(lambda: is_gone(child), KILLED_SECONDS)
        sim.resume()
        assert pool.bmc(sim.where()).power() is PowerState.OFF
        assert pool.workers.pids() != [worker]
    finally:
        pool.close()


def test_a_killed_child_fails_its_exchange_and_its_worker_goes_on(
    sim: IpmiSim, tmp_path: Path
) -> None:
    pool = IpmiPool(tmp_path / "locks", exchange_limit=FAR_AWAY)
    try:
        pool.bmc(sim.where()).power()
        [worker] = pool.workers.pids()
        sim.pause()
        thread, results = _exchange_in_background(pool, sim.where())
        os.kill(_stopped_child(worker), signal.SIGKILL)
        thread.join(KILLED_SECONDS)
        assert isinstance(results[0], BmcUnreachable)
        sim.resume()
        assert pool.bmc(sim.where()).power() is PowerState.OFF
        assert pool.workers.pids() == [worker]
    finally:
        pool.close()


def test_a_dead_parent_leaves_no_worker_and_no_child(sim: IpmiSim, tmp_path: Path) -> None:
    sim.pause()
    client = _client(tmp_path / "locks", [sim.port], 1)
    until(lambda: any(children(worker) for worker in children(client.pid)))
    [worker] = children(client.pid)
    child = _stopped_child(worker)
    client.kill()
    client.communicate()
    until(lambda: is_gone(worker) and is_gone(child), KILLED_SECONDS)


def test_pyghmi_starts_no_thread(sim: IpmiSim, tmp_path: Path) -> None:
    """Its thread misses packets; this fails when a new pyghmi has other inner names."""
    pool = IpmiPool(tmp_path / "locks")
    sim.pause()
    try:
        with running_relay(sim.port) as relay:
            thread, _ = _exchange_in_background(pool, sim.where(port=relay.port))
            until(lambda: relay.seen > 0)
            [worker] = pool.workers.pids()
            [child] = children(worker)
            assert len(list(Path(f"/proc/{child}/task").iterdir())) == 1
            sim.resume()
            thread.join(KILLED_SECONDS)
    finally:
        pool.close()


def test_closing_the_pool_ends_an_exchange_under_way(sim: IpmiSim, tmp_path: Path) -> None:
    pool = IpmiPool(tmp_path / "locks")
    pool.bmc(sim.where()).power()
    [worker] = pool.workers.pids()
    sim.pause()
    thread, results = _exchange_in_background(pool, sim.where())
    until(lambda: len(children(worker)) == 1)
    pool.close()
    thread.join(KILLED_SECONDS)
    assert isinstance(results[0], BmcUnreachable)
    assert is_gone(worker)
    with pytest.raises(BmcUnreachable):
        pool.bmc(sim.where()).power()


def test_field_21_the_password_is_in_no_argument_and_no_environment(
    sim: IpmiSim, tmp_path: Path
) -> None:
    pool = IpmiPool(tmp_path / "locks")
    try:
        pool.bmc(sim.where()).power()
        [worker] = pool.workers.pids()
        sim.pause()
        thread, _ = _exchange_in_background(pool, sim.where())
        until(lambda: len(children(worker)) == 1)
        for pid in (worker, *children(worker)):
            for part in ("cmdline", "environ"):
                assert PASSWORD.encode() not in Path(f"/proc/{pid}/{part}").read_bytes()
            assert Path(f"/proc/{pid}/environ").read_bytes() == b""
        sim.resume()
        thread.join(KILLED_SECONDS)
        for file in (tmp_path / "locks").iterdir():
            assert file.read_bytes() == b""
    finally:
        pool.close()


def test_a_worker_is_replaced_after_its_share_of_exchanges() -> None:
    workers = Workers(exchanges_max=2)
    request = {"address": "127.0.0.1", "port": 1, "user": "u", "password": "p", "arguments": {}}
    request["seconds"] = 60
    pids = []
    try:
        for _ in range(4):
            with workers.lent(timedelta(seconds=60)) as worker:
                pids.append(worker.pid)
                # A verb that is not on the list is refused before any packet is sent.
                answer = worker.exchange(request | {"verb": "raw"}, timedelta(seconds=60))
                assert answer == {"outcome": "crashed", "text": "KeyError"}
    finally:
        workers.close()
    assert pids[0] == pids[1] != pids[2] == pids[3]


def test_no_more_workers_than_allowed_are_lent() -> None:
    workers = Workers(workers_max=1)
    try:
        with (
            workers.lent(timedelta(seconds=60)),
            pytest.raises(BmcBusy, match="free"),
            workers.lent(timedelta(seconds=0.1)),
        ):
            pass
        with workers.lent(timedelta(seconds=60)) as again:
            assert again.pid in workers.pids()
    finally:
        workers.close()


def test_only_a_few_idle_workers_are_kept() -> None:
    workers = Workers(idle_workers_max=1)
    try:
        with workers.lent(timedelta(seconds=60)), workers.lent(timedelta(seconds=60)):
            assert len(workers.pids()) == 2
        assert len(workers.pids()) == 1
    finally:
        workers.close()
    assert workers.pids() == []
