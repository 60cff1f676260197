"""The service under the bench: `provisioner serve` as it is shipped, killed with kill -9."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import httpx

import provisioner
from provisioner.client import Client
from provisioner.settings import Settings
from script.bench_parts import servers
from tests.parts.processes import below
from tests.parts.served_lives import until

START_LIMIT_S: Final = 60.0
ROOT: Final = str(Path(provisioner.__file__).parents[1])
PARTS: Final = "api,boot,worker"
# The name of the supervisor, whose end is that of all.
ALL: Final = "all of it"


@dataclass
class Service:
    """One installation's service. `started_at` is when its last life began."""

    settings: Settings
    process: "subprocess.Popen[bytes] | None" = None
    started_at: float = field(default=0.0)

    @property
    def log(self) -> Path:
        return self.settings.data_dir / "bench-serve.log"

    def start(self) -> None:
        """Begin a life, and return at once."""
        command = [sys.executable, "-m", "provisioner", "serve"]
        command += ["--config", str(self.settings.path), "--only", PARTS]
        with self.log.open("ab") as log:
            self.started_at = time.monotonic()
            self.process = subprocess.Popen(
                command,
                cwd=self.settings.data_dir,
                env={**os.environ, "PYTHONPATH": ROOT},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def wait_until_healthy(self) -> float:
        """Return how long after its start it answered its first health request."""
        url = f"http://{self.settings.api.listen}/healthz"
        with httpx.Client(trust_env=False, timeout=START_LIMIT_S) as http:
            until(lambda: _is_well(http, url), f"an answer of {url}", START_LIMIT_S)
        return time.monotonic() - self.started_at

    def kill(self, victim: str = ALL, choose: Callable[[list[int]], int] = min) -> float:
        """Send SIGKILL to all of it or to one of the processes of that name, and start again
        what was killed, if nobody else does; return when it was started again."""
        assert self.process is not None
        if victim == ALL:
            self.process.kill()
            self.process.wait()
            self.start()
            return self.started_at
        before = self.processes()
        pid = choose([pid for pid, name in before.items() if name == victim])
        os.kill(pid, signal.SIGKILL)
        return float(until(lambda: self._replaced(victim, before), f"another {victim}"))

    def _replaced(self, victim: str, before: dict[int, str]) -> float | None:
        fresh = [pid for pid, name in self.processes().items() if name == victim]
        return time.monotonic() if set(fresh) - set(before) else None

    def processes(self) -> dict[int, str]:
        """Return every process below the supervisor, with its name."""
        assert self.process is not None
        return below(self.process.pid)

    def end(self) -> None:
        """Kill it, if it runs."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def client(self) -> Client:
        return Client(f"http://{self.settings.api.listen}", self.settings.keys.admin_token)


@contextlib.contextmanager
def served(settings: Settings) -> Iterator[Service]:
    """Run the service of an installation while the block runs."""
    service = Service(settings)
    service.start()
    try:
        service.wait_until_healthy()
        yield service
    finally:
        if service.process is not None:
            servers.stop(service.process)


def _is_well(http: httpx.Client, url: str) -> bool:
    try:
        return http.get(url).is_success
    except httpx.TransportError:
        return False
