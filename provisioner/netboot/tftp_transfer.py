"""One file on its way to one TFTP client: block numbers, windows, patience. No sockets.

Times are seconds of a monotonic clock, given by the caller.
"""

import struct
from typing import Final

from provisioner.netboot.relay import Content
from provisioner.netboot.tftp_request import BLOCK_BYTES_DEFAULT, ReadRequest, options_packet

# Patience before a packet is sent again. It follows the measured round trip within these
# bounds, and doubles as long as nothing comes back.
RESEND_FIRST_S: Final = 0.5
RESEND_MIN_S: Final = 0.05
RESEND_MAX_S: Final = 1.0
ROUND_TRIPS_OF_PATIENCE: Final = 4

_DATA = struct.Struct("!HH")
_OPCODE_DATA: Final = 3


class Transfer:
    """The state of one transfer. `acked` counts the blocks that arrived; -1 before the
    client accepted the options. Blocks are numbered from 1; the last one is short."""

    __slots__ = (
        "_block_bytes",
        "_content",
        "_options",
        "_patience_s",
        "_resent",
        "_round_trip_s",
        "_sent_at",
        "_window",
        "acked",
        "last",
        "moved_at",
        "resend_at",
    )

    def __init__(self, content: Content, request: ReadRequest, now: float) -> None:
        self._content = content
        self._options = options_packet(request, len(content))
        self._block_bytes = request.block_bytes or BLOCK_BYTES_DEFAULT
        self._window = request.window_blocks or 1
        self.last = len(content) // self._block_bytes + 1
        self.acked = 0 if self._options is None else -1
        self._round_trip_s: float | None = None
        self._patience_s = RESEND_FIRST_S
        self._resent = False
        self._sent_at = now
        self.moved_at = now
        self.resend_at = now + self._patience_s

    @property
    def is_done(self) -> bool:
        return self.acked == self.last

    @property
    def is_begun(self) -> bool:
        """Whether the client has acknowledged anything at all."""
        return self.acked > 0 or (self.acked == 0 and self._options is not None)

    @property
    def lacks_only_last_ack(self) -> bool:
        return self.last - self._window <= self.acked < self.last

    @property
    def sent_bytes(self) -> int:
        """How much of the file the client has acknowledged."""
        return min(max(self.acked, 0) * self._block_bytes, len(self._content))

    def packets(self) -> list[bytes]:
        """Return what may be on its way now: the options, or the blocks of the window."""
        if self.acked < 0 and self._options is not None:
            return [self._options]
        size = self._block_bytes
        blocks = range(self.acked, min(self.acked + self._window, self.last))
        return [
            # Block numbers go on from 0 after 65535; every client that takes such large
            # files expects that.
            _DATA.pack(_OPCODE_DATA, (block + 1) & 0xFFFF)
            + self._content[block * size : (block + 1) * size]
            for block in blocks
        ]

    def acknowledge(self, number: int, now: float) -> bool:
        """Take an acknowledgement; return whether it moved the transfer on.

        One that does not is ignored. Answering a repeated one would double every packet
        from then on (RFC 1123 §4.2.3.1); the clock resends instead.
        """
        forward = 1 if self.acked < 0 and number == 0 else (number - self.acked) & 0xFFFF
        if self.acked < 0 and number != 0:
            return False
        if not 0 < forward <= self._window or self.acked + forward > self.last:
            return False
        self.acked += forward
        self._learn_round_trip(now)
        self.moved_at = self._sent_at = now
        self._resent = False
        self.resend_at = now + self._patience_s
        return True

    def resend(self, now: float) -> list[bytes]:
        """Return the packets to send again, and be more patient with the next ones."""
        self._resent = True
        self._patience_s = min(2 * self._patience_s, RESEND_MAX_S)
        self.resend_at = now + self._patience_s
        return self.packets()

    def _learn_round_trip(self, now: float) -> None:
        # An answer to a packet that was sent twice tells nothing about the time it took
        # (Karn's rule), but it does show that the client lives: begin with the old patience.
        if not self._resent:
            sample = now - self._sent_at
            old = self._round_trip_s
            self._round_trip_s = sample if old is None else 0.875 * old + 0.125 * sample
        trip = self._round_trip_s
        wanted = RESEND_FIRST_S if trip is None else ROUND_TRIPS_OF_PATIENCE * trip
        self._patience_s = min(max(wanted, RESEND_MIN_S), RESEND_MAX_S)
