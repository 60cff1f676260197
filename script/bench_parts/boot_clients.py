"""Many hosts that ask for their boot script once each. A program of its own, with its own clock.

Reads a wish as JSON on standard input, writes p50, p99 and failures as JSON. Imports only the
standard library: it runs in the lab's network by path.
"""

import json
import random
import select
import socket
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

ROUND_LIMIT_S = 15.0
SEED = 7


@dataclass
class Client:
    """One request on its way. Times are of time.perf_counter."""

    due: float
    request: bytes
    link: socket.socket | None = None
    began: float = 0.0
    sent: bool = False
    answer: bytes = b""

    def start(self, address: tuple[str, int]) -> int:
        self.began = time.perf_counter()
        self.link = socket.socket()
        self.link.setblocking(False)
        self.link.connect_ex(address)
        return self.link.fileno()


def main() -> None:
    wish = json.load(sys.stdin)
    parts = urlsplit(wish["url"])
    address = (str(parts.hostname), int(parts.port or 80))
    chance = random.Random(SEED)
    times: list[float] = []
    failures = 0
    for _ in range(wish["rounds"]):
        answers = _round(address, wish, chance)
        failures += len(wish["paths"]) - len(answers)
        times += answers
    cuts = statistics.quantiles(times, n=100, method="inclusive")
    figures = {"p50_ms": cuts[49] * 1000, "p99_ms": cuts[98] * 1000, "failures": failures}
    print(json.dumps(figures))


def _round(address: tuple[str, int], wish: dict[str, Any], chance: random.Random) -> list[float]:
    """Return the seconds of each answer that was right."""
    now = time.perf_counter()
    waiting = [
        Client(now + chance.random() * wish["over_s"], _request(path, address))
        for path in wish["paths"]
    ]
    waiting.sort(key=lambda client: -client.due)
    running: dict[int, Client] = {}
    poll = select.epoll()
    times = []
    ends = now + wish["over_s"] + ROUND_LIMIT_S
    while (waiting or running) and time.perf_counter() < ends:
        while waiting and waiting[-1].due <= time.perf_counter():
            client = waiting.pop()
            handle = client.start(address)
            running[handle] = client
            poll.register(handle, select.EPOLLOUT)
        pause = waiting[-1].due - time.perf_counter() if waiting else 1.0
        for handle, _ in poll.poll(max(pause, 0)):
            client = running[handle]
            if _go_on(client, poll, handle):
                del running[handle]
                if _is_right(client.answer, wish["expected"]):
                    times.append(time.perf_counter() - client.began)
    for client in running.values():
        if client.link:
            client.link.close()
    poll.close()
    return times


def _go_on(client: Client, poll: select.epoll, handle: int) -> bool:
    """Send or receive; return whether the answer has ended."""
    assert client.link is not None
    try:
        if not client.sent:
            client.link.send(client.request)
            client.sent = True
            poll.modify(handle, select.EPOLLIN)
            return False
        received = client.link.recv(65536)
    except OSError:
        received = b""
    client.answer += received
    if received:
        return False
    poll.unregister(handle)
    client.link.close()
    return True


def _request(path: str, address: tuple[str, int]) -> bytes:
    # iPXE, too, asks for the connection to be closed.
    head = f"GET {path} HTTP/1.1\r\nHost: {address[0]}:{address[1]}\r\nConnection: close\r\n"
    return f"{head}User-Agent: iPXE/1.21\r\n\r\n".encode()


def _is_right(answer: bytes, expected: str) -> bool:
    return answer.startswith(b"HTTP/1.1 200 ") and expected.encode() in answer


if __name__ == "__main__":
    main()
