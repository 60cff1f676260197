"""Measures our TFTP server beside dnsmasq's: a 1 MiB file to 1, 8 and 40 clients at once.

Part of `script/bench serving`, and runs alone: `python script/bench_parts/serving_tftp.py`.
Both servers run in a network namespace of their own, since dnsmasq knows only port 69.
"""

import argparse
import json
import os
import select
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

SIZE_BYTES: Final = 1024 * 1024
BLOCK_BYTES: Final = 1428
CLIENTS: Final = (1, 8, 40)
ROUNDS: Final = 5
ROUND_LIMIT_S: Final = 60
RESEND_S: Final = 1.0

OURS: Final = ("127.0.0.2", 69)
DNSMASQ: Final = ("127.0.0.1", 69)
_OURS_PROGRAM: Final = """
import sys
from pathlib import Path
from provisioner.netboot.tftp import TftpLimits, serve_tftp
limits = TftpLimits(sessions_per_source=64)
files = {"file": Path(sys.argv[1])}
serve_tftp(("127.0.0.2", 69), files, on_event=lambda event: None, limits=limits)
"""

Figures = dict[str, object]


def measure(rounds: int = ROUNDS) -> Figures:
    """Return MiB/s by server and number of clients, their ratio at 40 clients, and failures."""
    if os.getuid() != 0:
        # dnsmasq changes its groups, which a user namespace does not allow.
        raise SystemExit("the TFTP benchmark needs root, for a network namespace with port 69")
    command = ["unshare", "--net", sys.executable, __file__, "--inside"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(
        [*command, "--rounds", str(rounds)],
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
        timeout=rounds * len(CLIENTS) * 2 * ROUND_LIMIT_S,
    )
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


def _measure_inside(rounds: int) -> Figures:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        content = os.urandom(SIZE_BYTES)
        (folder / "file").write_bytes(content)
        with _running(_dnsmasq(folder), DNSMASQ), _running(_ours(folder), OURS):
            return _compare(content, rounds)


def _compare(content: bytes, rounds: int) -> Figures:
    servers = {"ours": OURS, "dnsmasq": DNSMASQ}
    rates: dict[tuple[str, int], list[float]] = {}
    failures = dict.fromkeys(servers, 0)
    for _ in range(rounds):
        for clients in CLIENTS:
            for name, address in servers.items():
                seconds, failed = download(address, clients, content)
                failures[name] += failed
                rates.setdefault((name, clients), []).append(clients / seconds)
    median = {key: statistics.median(values) for key, values in rates.items()}
    return {
        "tftp_ratio_to_dnsmasq": round(median["ours", 40] / median["dnsmasq", 40], 2),
        "tftp_mib_s": {
            name: {str(clients): round(median[name, clients], 1) for clients in CLIENTS}
            for name in servers
        },
        "tftp_spread_mib_s": {
            name: {
                str(clients): [round(end(rates[name, clients]), 1) for end in (min, max)]
                for clients in CLIENTS
            }
            for name in servers
        },
        "tftp_failures": failures,
        "tftp_rounds": rounds,
    }


def _dnsmasq(folder: Path) -> list[str]:
    options = ["--port=0", "--user=root", "--conf-file=/dev/null", "--enable-tftp"]
    where = [f"--tftp-root={folder}", "--listen-address=127.0.0.1", "--bind-interfaces"]
    pid_file = f"--pid-file={folder / 'dnsmasq.pid'}"
    return ["dnsmasq", "--keep-in-foreground", "--tftp-max=200", *options, *where, pid_file]


def _ours(folder: Path) -> list[str]:
    return [sys.executable, "-c", _OURS_PROGRAM, str(folder / "file")]


@contextmanager
def _running(command: list[str], address: tuple[str, int]) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_until_it_answers(address)
        yield
    finally:
        process.terminate()
        process.wait(10)


def _wait_until_it_answers(address: tuple[str, int]) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(0.1)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            sock.sendto(b"\0\1no-such-file\0octet\0", address)
            try:
                sock.recvfrom(600)
                return
            except OSError:
                continue
    raise SystemExit(f"no TFTP server answers at {address}")


class _Download:
    """One client: asks, acknowledges, collects. As plain as it goes, so that it is not what
    is measured."""

    def __init__(self, server: tuple[str, int]) -> None:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.socket.bind(("127.0.0.1", 0))
        self.blocks: list[bytes] = []
        self.last = b"\0\1file\0octet\0blksize\0" + str(BLOCK_BYTES).encode() + b"\0"
        self.to = server
        self.sent_at = time.monotonic()
        self.socket.sendto(self.last, server)

    def take(self) -> bool:
        """Take one packet; return whether the file is whole."""
        packet, self.to = self.socket.recvfrom(2048)
        opcode, number = struct.unpack_from("!HH", packet)
        is_last = False
        if opcode == 3:
            if number != len(self.blocks) + 1:
                return False
            self.blocks.append(packet[4:])
            is_last = len(packet) < BLOCK_BYTES + 4
        elif opcode == 6:
            number = 0
        else:
            raise SystemExit(f"a TFTP server answered {packet[:40]!r}")
        self.last = struct.pack("!HH", 4, number)
        self.sent_at = time.monotonic()
        self.socket.sendto(self.last, self.to)
        return is_last


def download(server: tuple[str, int], clients: int, content: bytes) -> tuple[float, int]:
    """Download the file `clients` times at once; return seconds and how many failed."""
    started_at = time.monotonic()
    running = {}
    poll = select.epoll()
    for _ in range(clients):
        client = _Download(server)
        running[client.socket.fileno()] = client
        poll.register(client.socket, select.EPOLLIN)
    whole = []
    while running and time.monotonic() - started_at < ROUND_LIMIT_S:
        ready = poll.poll(0.1)
        for fd, _ in ready:
            if running[fd].take():
                poll.unregister(fd)
                whole.append(running.pop(fd))
        if not ready:
            for client in running.values():
                if time.monotonic() - client.sent_at > RESEND_S:
                    client.sent_at = time.monotonic()
                    client.socket.sendto(client.last, client.to)
    seconds = time.monotonic() - started_at
    failed = clients - sum(b"".join(client.blocks) == content for client in whole)
    for client in (*whole, *running.values()):
        client.socket.close()
    poll.close()
    return seconds, failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        print(json.dumps(_measure_inside(arguments.rounds)))
    else:
        print(json.dumps(measure(arguments.rounds), indent=2))


if __name__ == "__main__":
    main()
