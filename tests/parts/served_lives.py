"""An installation of the real service that is killed and started again, many times and quickly.

Run as a program, this file does what `provisioner serve` does, with its own pieces, but forks
each life from a process that has everything imported and holds the listeners.
"""

import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from provisioner import keys, wiring
from provisioner.cli.serve import parts
from provisioner.cli.serve.command import bring_up_to_date
from provisioner.cli.serve.logs import set_up_logs
from provisioner.cli.serve.supervisor import Supervisor, die_with_parent
from provisioner.client import Client
from provisioner.core.model import BmcAddress
from provisioner.failpoints import (
    ARMED,
    CONSENT,
    FIRED,
    TRACE,
    VARIABLE,
    Failpoints,
    find_failpoints,
)
from provisioner.setting_types import Address
from provisioner.settings import Settings, load
from provisioner.setup import Plan, initialise
from tests.parts.ports import free_ports
from tests.parts.processes import below, is_gone
from tests.parts.service_site import RAMDISK, mac
from tests.parts.test_imaging_archive import FACTS, make_disk

ROOT: Final = Path(__file__).resolve().parents[2]
LIMIT_S: Final = 120.0
HOST: Final = "r1n1"
PROFILE: Final = {
    "cloud_config": {"hostname": "${host.name}"},
    "disk": {"bus": "virtio", "size_min_bytes": 1 << 30},
    "health": {"soak_s": 0, "checks": [{"type": "systemd"}]},
}


def until(
    holds: Callable[[], Any], what: str, limit_s: float = LIMIT_S, *, pause_s: float = 0.01
) -> Any:
    """Wait until it holds, and return what it said then."""
    end = time.monotonic() + limit_s
    while not (found := holds()):
        assert time.monotonic() < end, f"not within {limit_s:g} s: {what}"
        time.sleep(pause_s)
    return found


def install(
    folder: Path,
    *,
    database: str = "sqlite:///state.db",
    more: str = "",
    s3_credentials: str = "",
) -> Settings:
    """Make an installation with one release, `tiny@1`, one ramdisk, and the profile `web`."""
    api, boot, agent, tftp = free_ports(4)
    plan = Plan(
        api=Address("127.0.0.1", api),
        boot_port=boot,
        agent_port=agent,
        tftp_port=tftp,
        database=database,
    )
    initialise(folder, plan)
    with (folder / "provisioner.toml").open("a") as config:
        config.write(more)
    if s3_credentials:
        (folder / keys.FOLDER / keys.S3_CREDENTIALS).touch(mode=0o600)
        (folder / keys.FOLDER / keys.S3_CREDENTIALS).write_text(s3_credentials)
    settings = load(folder / "provisioner.toml")
    ramdisk = folder / "ramdisks" / RAMDISK
    ramdisk.mkdir(parents=True)
    for name in ("ramdisk.json", "initrd", "vmlinuz"):
        (ramdisk / name).write_text("{}")
    wiring.prepare(settings)
    service = wiring.build(settings)
    try:
        disk = make_disk(folder / "disk.raw", b"a system")
        wiring.publisher(settings, service, actor="test").publish(disk, FACTS)
        service.profiles.save("web", PROFILE, actor="test")
    finally:
        service.close()
    return settings


def publish(settings: Settings, version: str) -> str:
    """Make another release of `tiny`, while nothing is alive, and return its digest."""
    facts = replace(
        FACTS, version=version, release_id=hashlib.sha256(version.encode()).hexdigest()[:32]
    )
    service = wiring.build(settings)
    try:
        disk = make_disk(settings.data_dir / f"disk-{version}.raw", version.encode())
        return wiring.publisher(settings, service, actor="test").publish(disk, facts).digest
    finally:
        service.close()


def enrol(settings: Settings, bmc: BmcAddress, number: int = 1) -> None:
    """Add host r1n1, or another number, whose BMC answers there."""
    from provisioner.service.hosts import HostSpec

    service = wiring.build(settings)
    try:
        spec = HostSpec(name=f"r1n{number}", macs=(mac(number),), bmc=bmc, profile="web")
        service.hosts.add(spec, actor="test")
    finally:
        service.close()


@dataclass
class Lives:
    """The service's process that forks lives. At most one of them at a time."""

    settings: Settings
    process: "subprocess.Popen[str]"
    log: Path
    deaths: int = field(default=0)

    @property
    def failpoints(self) -> Path:
        return self.settings.data_dir / "failpoints"

    @property
    def data_dir(self) -> Path:
        """Where its process sees its data, perhaps by mounts of its own."""
        return Path(f"/proc/{self.process.pid}/root{self.settings.data_dir}")

    @property
    def database_url(self) -> str:
        return self.settings.database.url.replace(
            f"sqlite:///{self.settings.data_dir}", f"sqlite:///{self.data_dir}"
        )

    def begin(self) -> None:
        """Start a life, and return when all its parts answer."""
        self._tell("begin")

    def kill(self) -> None:
        """Kill everything at once, as kill -9 does, and return when it is gone."""
        self._tell("kill")
        self.deaths += 1

    def _tell(self, word: str) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(word, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        assert answer.strip() == word, f"{answer!r}\n{self.log.read_text()[-4000:]}"

    def client(self) -> Client:
        return Client(f"http://{self.settings.api.listen}", self.settings.keys.admin_token)

    def pid_of(self, name: str) -> int:
        """Return the one process of a part, such as prov-worker."""
        (pid,) = until(lambda: self._pids_of(name), f"one {name}")
        return int(pid)

    def _pids_of(self, name: str) -> list[int] | None:
        found = [pid for pid, comm in below(self.process.pid).items() if comm == name]
        return found if len(found) == 1 else None

    def arm(self, armed: str) -> None:
        """Have a failpoint fire once, counted from now on."""
        self.disarm()
        aside = self.failpoints / "arming"
        aside.write_text(armed)
        aside.rename(self.failpoints / ARMED)

    def disarm(self) -> None:
        for name in (ARMED, FIRED, TRACE):
            (self.failpoints / name).unlink(missing_ok=True)

    def has_fired(self) -> bool:
        return (self.failpoints / FIRED).exists()

    def trace(self) -> list[str]:
        """Return every point that was reached since the last arming: `part point`."""
        with suppress(FileNotFoundError):
            return (self.failpoints / TRACE).read_text().splitlines()
        return []


# Run in a mount namespace of its own: data_dir moves onto a file system that is soon full.
ON_A_SMALL_DISK: Final = """\
set -e
cp -a "$1" "$1.kept"
mount -t tmpfs -o size=24m tmpfs "$1"
cp -a "$1.kept/." "$1"
shift
exec "$@"
"""


@contextmanager
def lives(settings: Settings, *, small_disk: bool = False) -> Iterator[Lives]:
    """Run the forking process, with failpoints on; no life has begun yet.

    With `small_disk` the installation is on a tmpfs of its own and has no failpoints: they
    would fail there themselves.
    """
    folder = settings.data_dir
    before: list[str] = []
    if small_disk:
        kind = "-m" if os.geteuid() == 0 else "-Urm"
        before = ["unshare", kind, "sh", "-c", ON_A_SMALL_DISK, "sh", str(folder)]
    (folder / "failpoints").mkdir(exist_ok=True)
    (folder / "failpoints" / CONSENT).touch()
    log_path = folder.with_name(f"{folder.name}.log")
    with log_path.open("a") as log:
        process = subprocess.Popen(
            [*before, sys.executable, "-m", "tests.parts.served_lives", str(settings.path)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, VARIABLE: "" if small_disk else str(folder / "failpoints")},
        )
    run = Lives(settings, process, log_path)
    try:
        yield run
    finally:
        with suppress(AssertionError, OSError):
            if process.poll() is None:
                run.kill()
        process.kill()
        process.communicate(timeout=LIMIT_S)


def sibling_of(settings: Settings, folder: Path, name: str) -> Settings:
    """Install a second service beside a first that does not run yet: the same keys, releases
    and PostgreSQL, other ports, and another name."""
    shutil.copytree(settings.data_dir, folder)
    config = folder / "provisioner.toml"
    words = config.read_text()
    places = (settings.api.listen, settings.boot.listen, settings.agent.listen)
    for place, port in zip(places, free_ports(3), strict=True):
        words = words.replace(f":{place.port}", f":{port}")
    config.write_text(words.replace("[service]", f'[service]\nname = "{name}"'))
    return load(config)


def main(config: str) -> None:
    """Fork lives as told on standard input: `begin` and `kill`, each answered when done."""
    settings = load(Path(config))
    set_up_logs("json", "service")
    failpoints = find_failpoints(os.environ.get(VARIABLE))
    chosen = frozenset({"api", "boot", "worker"})
    listeners = parts.bind_listeners(settings, chosen)
    parts.preload(settings, chosen)
    me, life = os.getpid(), 0
    for line in sys.stdin:
        word = line.strip()
        if word == "begin":
            ready, ready_end = os.pipe()
            life = os.fork()
            if life == 0:
                die_with_parent(me)
                os.close(ready)
                _live(settings, listeners, failpoints, ready_end)
            os.close(ready_end)
            word = word if os.read(ready, 1) else "died"
            os.close(ready)
        elif life:
            family = below(life)
            with suppress(ProcessLookupError):
                os.kill(life, signal.SIGKILL)
            os.waitpid(life, 0)
            life = 0
            while [pid for pid in family if not is_gone(pid)]:
                time.sleep(0.005)
        sys.stdout.write(f"{word}\n")
        sys.stdout.flush()


def _live(
    settings: Settings,
    listeners: dict[str, socket.socket],
    failpoints: Failpoints | None,
    ready_end: int,
) -> None:
    code = 70
    try:
        bring_up_to_date(settings, failpoints)
        made = parts.make_parts(
            settings, frozenset({"api", "boot", "worker"}), listeners, failpoints
        )
        Supervisor(made, lambda: _write(ready_end)).run()
        code = 0
    finally:
        os._exit(code)


def _write(ready_end: int) -> None:
    os.write(ready_end, b"r")


if __name__ == "__main__":
    main(sys.argv[1])
