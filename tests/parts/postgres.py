"""A private PostgreSQL for tests: Debian's server on a Unix socket in a directory of its own.

No TCP, no shared cluster, nothing left behind.
"""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

START_LIMIT_S = 60


@dataclass
class Postgres:
    """A running server; `socket_dir` is where its only socket lives."""

    socket_dir: Path
    data: Path
    user: str | None  # whom it runs as
    server: "subprocess.Popen[bytes]"
    _numbers: Iterator[int] = field(default_factory=count)

    def new_database(self, template: str = "template1") -> str:
        """Create an empty database, or a copy of `template`, and return its URL."""
        name = f"test_{next(self._numbers)}"
        who = ["-h", str(self.socket_dir), "-U", "provisioner"]
        subprocess.run(
            ["createdb", *who, "-T", template, name],
            check=True,
            capture_output=True,
            cwd="/",
        )
        return f"postgresql://provisioner@/{name}?host={self.socket_dir}"

    def stand_by(self) -> None:
        """Begin anew as a standby: every session ends, and no writes are taken any more."""
        self.server.send_signal(signal.SIGINT)  # it waits for no session
        self.server.wait(START_LIMIT_S)
        (self.data / "standby.signal").touch()
        self.server = _start(self.data, self.socket_dir, self.user)

    def promote(self) -> None:
        """Take writes again, as the standby that has become the first one."""
        who = ["-h", str(self.socket_dir), "-U", "provisioner", "postgres"]
        ask = ["psql", *who, "-c", "SELECT pg_promote()"]
        subprocess.run(ask, check=True, capture_output=True, cwd="/")


def _bin() -> Path:
    """Debian keeps the server's programs per version, outside the PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        raise RuntimeError("no PostgreSQL server: apt-get install postgresql")
    return found[-1].parent


@contextmanager
def running_postgres() -> Iterator[Postgres]:
    """Start a server and stop it afterwards. It refuses root, so root lends it a user."""
    user = "postgres" if os.geteuid() == 0 else None
    # Not pytest's tmp_path: a socket's path may have no more than 107 bytes, and the
    # server's user must be able to reach it.
    directory = Path(tempfile.mkdtemp(prefix="pg-"))
    try:
        if user is not None:
            os.chown(directory, pwd.getpwnam(user).pw_uid, -1)
        directory.chmod(0o755)
        data = directory / "data"
        _initialise(data, user)
        postgres = Postgres(directory, data, user, _start(data, directory, user))
        try:
            yield postgres
        finally:
            postgres.server.send_signal(signal.SIGINT)  # it waits for no session
            postgres.server.wait(START_LIMIT_S)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _initialise(data: Path, user: str | None) -> None:
    where = ["-D", str(data), "-U", "provisioner", "-A", "trust"]
    subprocess.run(
        [str(_bin() / "initdb"), *where, "-E", "UTF8", "--locale=C.UTF-8", "--no-sync"],
        check=True,
        capture_output=True,
        user=user,
        cwd="/",
    )


def _start(data: Path, socket_dir: Path, user: str | None) -> subprocess.Popen[bytes]:
    settings = {
        "listen_addresses": "",
        "unix_socket_directories": str(socket_dir),
        # The data is thrown away: a crash of the machine need not be survived.
        "fsync": "off",
        "full_page_writes": "off",
        "shared_buffers": "32MB",
        "max_connections": "150",
    }
    options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    with (socket_dir / "log").open("wb") as log:
        server = subprocess.Popen(
            [str(_bin() / "postgres"), "-D", str(data), *options],
            stdout=log,
            stderr=log,
            user=user,
            cwd="/",
        )
    ask = f"until pg_isready -q -h {socket_dir}; do sleep 0.05; done"
    answer = subprocess.run(["timeout", str(START_LIMIT_S), "sh", "-c", ask], check=False)
    if answer.returncode != 0:
        server.kill()
        raise RuntimeError((socket_dir / "log").read_text())
    return server
