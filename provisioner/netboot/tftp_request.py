"""Reads TFTP requests with tftpy's packet types, behind a guard. No sockets.

tftpy's own server loop ends on the first packet that it cannot parse (`blksize=abc`). Here
every such packet becomes one `BadRequest`, and options are judged by us.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from tftpy.TftpPacketFactory import TftpPacketFactory
from tftpy.TftpPacketTypes import TftpPacketERR, TftpPacketOACK, TftpPacketRRQ, TftpPacketWRQ
from tftpy.TftpShared import TftpException

REQUEST_BYTES_MAX: Final = 512  # RFC 2347
NAME_CHARACTERS_MAX: Final = 128
WINDOW_BLOCKS_MAX: Final = 16  # measured: at 0.2 ms of delay a larger window gains little

BLOCK_BYTES_DEFAULT: Final = 512  # RFC 1350
# The largest that an Ethernet frame of 1500 bytes carries: 20 bytes IP, 8 UDP, 4 TFTP. A
# larger block would travel in fragments, which many boot ROMs cannot put together.
BLOCK_BYTES_MAX: Final = 1468


class ErrorCode(IntEnum):
    """The error numbers of RFC 1350 and RFC 2347 that we send."""

    NOT_FOUND = 1
    ACCESS = 2
    ILLEGAL = 4
    OPTIONS = 8


class BadRequest(Exception):
    """A packet that is not a read request we serve. `answer` is what the sender is told;
    None where an answer would only feed a loop."""

    def __init__(self, reason: str, answer: ErrorCode | None, name: str = "") -> None:
        super().__init__(reason)
        self.answer = answer
        self.name = name


@dataclass(frozen=True)
class ReadRequest:
    """A read request with its options as we grant them; None where it did not ask.

    `window_blocks` is how many blocks may be on their way unacknowledged (RFC 7440).
    """

    name: str
    block_bytes: int | None
    window_blocks: int | None
    wants_size: bool


def read_request(packet: bytes) -> ReadRequest:
    """Return the read request in a packet that came to the listening port.

    Raises BadRequest for everything else: other operations, modes but octet, malformed
    names and options. Unknown options are left out, as RFC 2347 asks.
    """
    if len(packet) > REQUEST_BYTES_MAX:
        raise BadRequest("longer than a request may be", ErrorCode.ILLEGAL)
    parsed = _parsed(packet)
    if isinstance(parsed, TftpPacketWRQ):
        raise BadRequest("a write request", ErrorCode.ACCESS, _shown(parsed.filename))
    if not isinstance(parsed, TftpPacketRRQ):
        raise BadRequest("not a request", None)
    name = _shown(parsed.filename)
    if parsed.mode != "octet":
        raise BadRequest(f"mode {_shown(parsed.mode)}", ErrorCode.ILLEGAL, name)
    try:
        return _granted(name, {key.lower(): value for key, value in parsed.options.items()})
    except ValueError as error:
        raise BadRequest(str(error), ErrorCode.OPTIONS, name) from error


def error_packet(code: ErrorCode) -> bytes:
    """Return an ERROR packet with the standard's own text for the code."""
    packet = TftpPacketERR()
    packet.errorcode = int(code)
    return bytes(packet.encode().buffer)


def options_packet(request: ReadRequest, size_bytes: int) -> bytes | None:
    """Return the OACK that grants a request's options, or None when it asked for none."""
    options: dict[str, int] = {}
    if request.block_bytes is not None:
        options["blksize"] = request.block_bytes
    if request.wants_size:
        options["tsize"] = size_bytes
    if request.window_blocks is not None:
        options["windowsize"] = request.window_blocks
    if not options:
        return None
    packet = TftpPacketOACK()
    packet.options = {key: str(value) for key, value in options.items()}
    return bytes(packet.encode().buffer)


def _parsed(packet: bytes) -> object:
    # Some boot ROMs fill the datagram up with zeros, which tftpy takes for empty options.
    if packet.endswith(b"\0\0"):
        packet = packet.rstrip(b"\0") + b"\0"
    try:
        return TftpPacketFactory().parse(packet)
    except (TftpException, struct.error, ValueError, IndexError, TypeError) as error:
        is_request = packet[:2] in (b"\0\1", b"\0\2")
        answer = ErrorCode.ILLEGAL if is_request else None
        raise BadRequest(f"malformed: {type(error).__name__}", answer) from error


def _granted(name: str, options: dict[str, str]) -> ReadRequest:
    block_bytes = window = None
    if "blksize" in options:
        asked = _number(options["blksize"], "blksize", least=8, most=65464)
        # A server may grant less than was asked, never more; below 512 we leave the option
        # out, and the default of 512 stands.
        block_bytes = min(asked, BLOCK_BYTES_MAX) if asked >= BLOCK_BYTES_DEFAULT else None
    if "windowsize" in options:
        asked = _number(options["windowsize"], "windowsize", least=1, most=65535)
        window = min(asked, WINDOW_BLOCKS_MAX)
    if "tsize" in options:
        _number(options["tsize"], "tsize", least=0, most=2**63)
    return ReadRequest(name, block_bytes, window, "tsize" in options)


def _number(text: str, option: str, *, least: int, most: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20 and least <= int(text) <= most):
        raise ValueError(f"option {option} is not a number from {least} to {most}")
    return int(text)


def _shown(text: str) -> str:
    """Return a name from the wire as fit for a log: printable, one line, not too long."""
    cut = text[:NAME_CHARACTERS_MAX]
    return cut if cut == text and cut.isprintable() else ascii(cut)
