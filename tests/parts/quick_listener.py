"""The files of a folder, served by gunicorn with the worker of the real service.

Run as a program, this file is the server: its arguments are the folder and a listening socket.
"""

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from provisioner.cli.serve.http import HttpServer, run_http
from provisioner.web.file_source import LocalFiles
from tests.parts.release_store import files_app

ROOT: Final = Path(__file__).resolve().parents[2]
THREADS: Final = 4
LIMIT_S: Final = 60.0


@contextmanager
def quick_listener(
    folder: Path, *, meets_the_silent: bool = False
) -> Iterator[tuple[tuple[str, int], "subprocess.Popen[str]"]]:
    """Serve what lies below the folder by one worker; yields the address and the process.

    The worker does not wait long for the first request of a connection before it leaves that to
    gunicorn. By default it learns of a connection together with its first request, however long
    a busy machine takes from the one to the other.
    """
    with socket.create_server(("127.0.0.1", 0)) as sock:
        if not meets_the_silent:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, int(LIMIT_S))
        command = [sys.executable, "-m", "tests.parts.quick_listener", str(folder)]
        fd = sock.fileno()
        process = subprocess.Popen(
            [*command, str(fd)], cwd=ROOT, pass_fds=[fd], stdout=subprocess.PIPE, text=True
        )
        address = sock.getsockname()
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield address, process
    finally:
        process.terminate()
        process.communicate(timeout=LIMIT_S)


def main(folder: str, fd: str) -> None:
    """Serve until SIGTERM."""
    server = HttpServer(
        "test", lambda: files_app(LocalFiles(Path(folder))), workers=1, threads=THREADS
    )
    with socket.socket(fileno=int(fd)) as sock:
        run_http(server, sock, lambda: print("ready", flush=True))  # noqa: T201 read by the test


if __name__ == "__main__":
    main(*sys.argv[1:])
