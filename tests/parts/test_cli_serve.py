"""`provisioner init` and `provisioner serve` as processes: readiness, failures, clean ends."""

import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest

from provisioner.cli.serve.parts import PEER_SILENCE_S, bind_listeners
from provisioner.client import Client
from provisioner.settings import Settings, load
from provisioner.wiring import trust_policy
from tests.parts.ports import free_ports
from tests.parts.processes import below, is_gone

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 120.0


def provisioner(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "provisioner", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A new installation on free ports of the loopback."""
    api, boot, agent, tftp = map(str, free_ports(4))
    folder = tmp_path / "installation"
    ports = ("--boot-port", boot, "--agent-port", agent, "--tftp-port", tftp)
    done = provisioner("init", str(folder), "--api-listen", f"127.0.0.1:{api}", *ports)
    assert done.returncode == 0, done.stderr
    return folder / "provisioner.toml"


@dataclass
class Served:
    """A running service."""

    process: "subprocess.Popen[str]"
    settings: Settings
    folder: Path

    @property
    def api(self) -> str:
        return f"http://{self.settings.api.listen}"

    def children(self) -> dict[int, str]:
        """Return every process below the service, with its name."""
        return below(self.process.pid)

    def log(self) -> str:
        return (self.folder / "log").read_text()


@contextlib.contextmanager
def serving(config: Path, *more: str) -> Iterator[Served]:
    folder = config.parent
    ready = folder / "ready"
    ready.unlink(missing_ok=True)
    command = [sys.executable, "-m", "provisioner", "serve", "--config", str(config)]
    with (folder / "log").open("a") as log:
        process = subprocess.Popen(
            [*command, "--ready-file", str(ready), *more],
            cwd=ROOT,
            stdout=log,
            stderr=log,
            text=True,
        )
    served = Served(process, load(config), folder)
    try:
        wait_until(lambda: ready.exists() or process.poll() is not None, served)
        assert process.poll() is None, served.log()
        yield served
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(LIMIT_S)


def wait_until(condition: object, served: Served) -> None:
    ends_at = time.monotonic() + LIMIT_S
    assert callable(condition)
    while not condition():
        assert time.monotonic() < ends_at, served.log()
        time.sleep(0.02)


def test_every_part_answers_once_it_says_ready_and_stops_cleanly(config: Path) -> None:
    with serving(config) as served:
        settings = served.settings
        with Client(served.api, settings.keys.admin_token) as client:
            assert client.hosts() == []
        script = httpx.get(f"{settings.boot.url}/boot/ipxe?mac=52:54:00:00:00:01", timeout=60)
        assert script.text.startswith("#!ipxe\n")
        assert script.text.endswith("exit 1\n")
        assert "kernel" not in script.text
        trust = ssl.create_default_context(cafile=str(settings.keys.agent_tls_pem))
        refused = httpx.post(
            f"{settings.agent.url}/agent/v1/hello", json={}, verify=trust, timeout=60
        )
        assert refused.json()["code"] == "request"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(LIMIT_S)
            where = (settings.tftp.listen.host, settings.tftp.listen.port)
            sock.sendto(b"\0\1undionly.kpxe\0octet\0", where)
            assert sock.recv(1024)[:4] == b"\0\3\0\1"
        said = (served.folder / "ready").read_text()
        assert f"api=http://{settings.api.listen}" in said
        assert f"ready {said}" in served.log()
        below = served.children()
        assert {"prov-worker", "prov-api", "prov-boot", "prov-agent"} <= set(below.values())
        served.process.terminate()
        assert served.process.wait(LIMIT_S) == 0
        assert not [pid for pid in below if not is_gone(pid)]
        assert not (served.folder / "ready").exists()
        secret = settings.keys.admin_token.reveal()
        assert secret not in served.log()


def test_killed_without_a_word_it_leaves_no_process_and_starts_again(config: Path) -> None:
    with serving(config) as served:
        below = served.children()
        served.process.kill()
        served.process.wait(LIMIT_S)
        wait_until(lambda: not [pid for pid in below if not is_gone(pid)], served)
    with serving(config) as served:
        assert httpx.get(f"{served.api}/healthz", timeout=60).is_success


def test_a_part_that_dies_is_started_again(config: Path) -> None:
    with serving(config, "--only", "api") as served:

        def named(name: str) -> list[int]:
            return [pid for pid, found in served.children().items() if found == name]

        # A worker that was started a moment ago has no name of its own yet.
        wait_until(lambda: len(named("prov-api")) == 1, served)
        (arbiter,) = named("prov-api")
        os.kill(arbiter, signal.SIGKILL)

        def is_back() -> bool:
            return arbiter not in named("prov-api") and bool(named("prov-api-w"))

        wait_until(is_back, served)
        assert httpx.get(f"{served.api}/healthz", timeout=LIMIT_S).is_success
        assert "ended, starting it again" in served.log()


def test_only_the_named_parts_run(config: Path) -> None:
    with serving(config, "--only", "tftp") as served:
        assert set(served.children().values()) == {"prov-tftp"}
        assert not (served.folder / "state.db").exists()
        assert "api=" not in (served.folder / "ready").read_text()


def test_a_taken_port_is_a_clear_error(config: Path) -> None:
    settings = load(config)
    with socket.socket() as sock:
        sock.bind((settings.boot.listen.host, settings.boot.listen.port))
        sock.listen()
        done = provisioner("serve", "--config", str(config))
    assert done.returncode == 78
    assert f"boot.listen: {settings.boot.listen}: Address already in use" in done.stderr
    assert f"sport = :{settings.boot.listen.port}" in done.stderr
    assert "api.listen" not in done.stderr


def test_a_host_that_takes_nothing_more_is_given_up(config: Path) -> None:
    """One that lost its power in the middle of a download: no thread waits for it for long."""
    settings = load(config)
    where = (settings.boot.listen.host, settings.boot.listen.port)
    listeners = bind_listeners(settings, frozenset({"boot", "agent"}))
    with (
        listeners["agent"],
        listeners["boot"] as listener,
        socket.create_connection(where),
        listener.accept()[0] as sock,
    ):
        limit_ms = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
    assert limit_ms == PEER_SILENCE_S * 1000


TWICE = """
import signal, sys, time
from pathlib import Path
from provisioner.cli.serve.supervisor import Part, Supervisor

folder = Path(sys.argv[1])

def run(ready):
    ready()
    while not (folder / "heard").exists():
        time.sleep(0.01)
    ready()
    (folder / "twice").touch()
    signal.pause()

Supervisor([Part("part", run, signal.SIGKILL)], on_ready=(folder / "heard").touch).run()
"""


def test_a_part_may_say_again_that_it_is_ready(tmp_path: Path) -> None:
    """As one does that has started its program anew."""
    with subprocess.Popen([sys.executable, "-c", TWICE, str(tmp_path)]) as supervisor:
        try:
            ends_at = time.monotonic() + LIMIT_S
            while not (tmp_path / "twice").exists():
                assert time.monotonic() < ends_at
                assert supervisor.poll() is None
                time.sleep(0.01)
        finally:
            supervisor.terminate()
        assert supervisor.wait(LIMIT_S) == 0


def test_a_wrong_configuration_listens_nowhere(config: Path) -> None:
    text = config.read_text()
    config.write_text(text + '\n[limits]\nnetboting_s = 5\nwriting_s = "long"\n')
    done = provisioner("serve", "--config", str(config))
    assert done.returncode == 78
    assert "has 2 problems" in done.stderr
    assert "did you mean netbooting_s?" in done.stderr
    assert not (config.parent / "state.db").exists()


def test_a_part_that_is_none_is_named(config: Path) -> None:
    done = provisioner("serve", "--config", str(config), "--only", "bot", "--only", "api")
    assert (done.returncode, "bot" in done.stderr) == (2, True)


def test_a_second_worker_on_one_database_stops_itself(config: Path) -> None:
    """Two reconcilers of one name would do everything twice."""
    with serving(config, "--only", "worker"):
        done = provisioner("serve", "--config", str(config), "--only", "worker")
    assert done.returncode == 78, done.stderr
    assert "another worker named" in done.stderr


def test_init_twice_changes_nothing(config: Path) -> None:
    before = config.read_bytes()
    done = provisioner("init", str(config.parent))
    assert done.returncode == 2
    assert "nothing was changed" in done.stderr
    assert config.read_bytes() == before


def test_init_takes_no_password_from_its_arguments(tmp_path: Path) -> None:
    url = "postgresql+psycopg://p:hush@db/provisioner"
    done = provisioner("init", str(tmp_path / "x"), "--database", url)
    assert done.returncode == 2
    assert not (tmp_path / "x").exists()
    assert "hush" not in done.stderr


def test_the_doctor_finds_what_is_missing(config: Path) -> None:
    done = provisioner("doctor", "--config", str(config))
    assert done.returncode == 78
    lines = done.stdout.splitlines()
    assert any(line.startswith("fail  ramdisk:") for line in lines)
    assert "      → provisioner ramdisk build" in lines
    assert any(line.startswith("ok    configuration:") for line in lines)
    (config.parent / "keys" / "master.key").chmod(0o644)
    done = provisioner("doctor", "--config", str(config))
    assert "others may read it" in done.stdout


def test_the_doctor_says_when_an_own_host_is_misspelt(config: Path) -> None:
    with serving(config, "--only", "api"):
        pass
    text = config.read_text().replace("[service]", '[service]\nown_hosts = ["r9n9"]')
    config.write_text(text)
    lines = provisioner("doctor", "--config", str(config)).stdout.splitlines()
    assert "warn  the service's own host: no host is named r9n9" in lines


def test_the_doctor_compares_what_the_ramdisk_pins_with_the_configuration(config: Path) -> None:
    """Thresholds and keys may have changed since the ramdisk was built."""
    policy = trust_policy(load(config))
    ramdisk = config.parent / "ramdisks" / ("ab" * 32)
    ramdisk.mkdir(parents=True)
    cases: list[tuple[dict[str, object], str]] = [
        ({}, "warn  trust in releases: the ramdisk abababababab does not say what it pins"),
        ({"release_trust": 5}, "warn  trust in releases: the ramdisk abababababab: "),
        ({"release_trust": json.loads(policy.to_bytes())}, "ok    trust in releases: "),
        (
            {"release_trust": json.loads(replace(policy, channels={"stable": 1}).to_bytes())},
            "warn  trust in releases: the ramdisk abababababab pins other thresholds than",
        ),
        (
            {"release_trust": json.loads(replace(policy, keys=("ab" * 32,)).to_bytes())},
            "warn  trust in releases: the ramdisk abababababab pins other keys than",
        ),
    ]
    for about, told in cases:
        (ramdisk / "ramdisk.json").write_text(json.dumps(about))
        lines = provisioner("doctor", "--config", str(config)).stdout.splitlines()
        assert any(line.startswith(told) for line in lines), lines
