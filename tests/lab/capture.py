"""What goes over the wires of a lab, kept as pcap files, and searched afterwards.

`Capture` listens to interfaces in the lab's network; QEMU's filter-dump writes the same format.
"""

import contextlib
import json
import mmap
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from provisioner.lab import Lab

ROOT: Final = Path(__file__).resolve().parents[2]
START_LIMIT_S: Final = 10
FRAME_BYTES_MAX: Final = 65535
BUFFER_BYTES: Final = 64 * 1024 * 1024
IPV4, TCP = 0x0800, 6
SYN, ACK = 0x02, 0x10
# linux/if_packet.h and asm-generic/socket.h, where Python has no name for them.
SOL_PACKET: Final = 263
PACKET_STATISTICS: Final = 6
SO_RCVBUFFORCE: Final = 33
ETHERNET: Final = 1
HEADER: Final = struct.Struct("<IHHiIII")
RECORD: Final = struct.Struct("<IIII")


@dataclass(frozen=True)
class Frame:
    """One frame with the time at which it was seen, in seconds since 1970."""

    at: float
    data: memoryview


@dataclass(frozen=True)
class Segment:
    """A TCP segment: who sent it to whom, (address, port) each, and what was in it."""

    at: float
    source: tuple[str, int]
    target: tuple[str, int]
    sequence: int
    flags: int
    payload: memoryview

    @property
    def opens(self) -> bool:
        """Say whether it is the first of a connection."""
        return self.flags & (SYN | ACK) == SYN


class Capture:
    """Listens to one interface of the lab until it is stopped; nothing may be missed."""

    def __init__(self, lab: Lab, interface: str, file: Path) -> None:
        self.file = file
        program = f"from {__name__} import listen; listen({interface!r}, {str(file)!r})"
        self._process = subprocess.Popen(
            [*lab.nsenter_argv(), "env", f"PYTHONPATH={ROOT}", sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "listening\n"

    def stop(self) -> None:
        """End it, and fail when the kernel had to drop a frame."""
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
            said, _ = self._process.communicate(timeout=START_LIMIT_S)
            assert json.loads(said) == {"dropped": 0}, f"the capture is not whole: {said}"


def listen(interface: str, file: str) -> None:
    """Run inside the lab's network: write what comes and goes until SIGTERM, and tell then how
    many frames were dropped."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as tap:
        tap.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER_BYTES)
        tap.bind((interface, 3))
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        sys.stdout.write("listening\n")
        sys.stdout.flush()
        with open(file, "wb") as out, contextlib.suppress(SystemExit):
            out.write(HEADER.pack(0xA1B2C3D4, 2, 4, 0, 0, FRAME_BYTES_MAX, ETHERNET))
            while True:
                data = tap.recv(FRAME_BYTES_MAX)
                now = time.time()
                whole = int(now)
                out.write(RECORD.pack(whole, int((now - whole) * 1e6), len(data), len(data)))
                out.write(data)
        counts = tap.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8)
        sys.stdout.write(json.dumps({"dropped": struct.unpack("II", counts)[1]}) + "\n")


def frames_in(file: Path) -> Iterator[Frame]:
    """Yield the whole frames of a pcap file, oldest first."""
    with file.open("rb") as opened:
        if file.stat().st_size < HEADER.size:
            return
        data = memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
    offset = HEADER.size
    while offset + RECORD.size <= len(data):
        seconds, micros, length, _ = RECORD.unpack_from(data, offset)
        offset += RECORD.size
        yield Frame(seconds + micros / 1e6, data[offset : offset + length])
        offset += length


def segment_of(frame: Frame) -> Segment | None:
    """Return the TCP segment (of IPv4) in a frame, or None for a frame of another kind."""
    data = frame.data
    if len(data) < 54 or int.from_bytes(data[12:14]) != IPV4 or data[23] != TCP:
        return None
    begin = 14 + (data[14] & 0xF) * 4
    end = 14 + int.from_bytes(data[16:18])
    return Segment(
        frame.at,
        (socket.inet_ntoa(data[26:30]), int.from_bytes(data[begin : begin + 2])),
        (socket.inet_ntoa(data[30:34]), int.from_bytes(data[begin + 2 : begin + 4])),
        int.from_bytes(data[begin + 4 : begin + 8]),
        data[begin + 13],
        data[begin + (data[begin + 12] >> 4) * 4 : end],
    )


def segments_in(file: Path) -> Iterator[Segment]:
    """Yield the TCP segments of a pcap file, oldest first."""
    for frame in frames_in(file):
        if segment := segment_of(frame):
            yield segment


def texts_in(file: Path) -> Iterator[tuple[str, bytes]]:
    """Yield all that was said, by a name for each: TCP streams put together again, and the
    frames of all other kinds."""
    others: list[memoryview] = []
    streams: dict[tuple[tuple[str, int], tuple[str, int]], dict[int, memoryview]]
    streams = defaultdict(dict)
    for frame in frames_in(file):
        segment = segment_of(frame)
        if segment is None:
            others.append(frame.data)
        elif segment.payload:
            # The longest wins: a repeated segment may hold more than its first try.
            parts = streams[segment.source, segment.target]
            kept = parts.get(segment.sequence)
            if kept is None or len(kept) < len(segment.payload):
                parts[segment.sequence] = segment.payload
    yield f"{file.name}: other frames", b"\n".join(others)
    for (source, target), parts in streams.items():
        name = f"{file.name}: {source[0]}:{source[1]} to {target[0]}:{target[1]}"
        yield name, b"".join(bytes(parts[number]) for number in sorted(parts))
