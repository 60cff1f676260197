"""A real S3 server on loopback for the tests that need one: moto's, in its own process."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.parts.ports import free_ports

READY_LIMIT_S: Final = 60.0


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """Yield the endpoint of a running server with no buckets."""
    program = Path(sys.prefix) / "s3-server" / "bin" / "moto_server"
    (port,) = free_ports(1)
    with (folder / "s3-server.log").open("wb") as log:
        server = subprocess.Popen(
            [program, "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log
        )
    try:
        wait_until_open(port, folder / "s3-server.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def wait_until_open(port: int, log: Path) -> None:
    """Return when the port answers; fail with the server's log when it does not."""
    deadline = time.monotonic() + READY_LIMIT_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=10).close()
            return
        except OSError:
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.05)


def make_bucket(endpoint: str, name: str) -> None:
    """Make an empty bucket. (The server takes any credentials for it.)"""
    request = urllib.request.Request(f"{endpoint}/{name}", method="PUT")
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.status == 200
