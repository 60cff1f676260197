"""Several hundred BMCs in one process: a UDP socket on loopback each, one thread for all.

What they say is up to their `Faults`; what their hosts do is written down by the hosts.
"""

import asyncio
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from typing import Final, cast

from provisioner.core.model import BmcAddress, Secret

from .faults import MANGLINGS, Command, Faults, Traits
from .packets import (
    IPMI,
    IPMI_15_NO_AUTH,
    Malformed,
    Message,
    answer,
    outside,
    parse,
    parse_message,
    sealed,
    unseal,
    unsealed,
)
from .sessions import Session, SessionTable
from .simulated_host import Flags, SimulatedHost, Source

USER: Final = "admin"
PASSWORD: Final = "correct-horse-42"
OTHER_PASSWORD: Final = "factory-default"

CHASSIS, APPLICATION = 0x00, 0x06
DONE, UNKNOWN_COMMAND, BAD_LENGTH, BAD_FIELD = 0x00, 0xC1, 0xC7, 0xCC
NO_SUCH_PARAMETER: Final = 0x80
CONTROLS: Final = {
    0x00: Command.OFF,
    0x01: Command.ON,
    0x03: Command.RESET,
    0x05: Command.SOFT_OFF,
}
BOOT_SOURCES: Final = {0x04: Source.NETWORK, 0x08: Source.DISK}
# Channel 1, IPMI 2.0 with extended capabilities, no null users; table 22-15.
CAPABILITIES: Final = bytes.fromhex("0180140200000000")
DEVICE: Final = bytes.fromhex("200100010002bf000000000000")
RECEIVE_BUFFER_BYTES: Final = 1 << 20


class FaultyBmc(asyncio.DatagramProtocol):
    """One BMC and its host. Written to by one thread, and read by that of the test."""

    def __init__(
        self, faults: Faults, traits: Traits, clock: Callable[[], float], *, seed: int = 0
    ) -> None:
        self.faults = faults
        self.host = SimulatedHost(clock, traits, faults)
        self.commands: list[Command] = []
        self.exchanges: list[object] = []  # the client's address of each, in order
        self.exchanged_at: list[float] = []
        self.is_overlapped = False
        self._clock = clock
        self._born_at = clock()
        self._password = PASSWORD
        self.sessions = SessionTable(
            clock,
            USER,
            lambda: self._password,
            slots=faults.slots,
            idle_seconds=faults.session_seconds,
            taken=faults.taken_slots,
            refuses_proof=faults.refuses_proof,
            takes_suite_0=faults.takes_suite_0,
            nobodys_password=faults.nobodys_password,
        )
        self._chance = Random(seed)
        self._unanswered = dict(faults.not_answered)
        self._sent: list[bytes] = []
        self._transport: asyncio.DatagramTransport | None = None
        self.address, self.port = "", 0

    def where(self, *, password: str = PASSWORD) -> BmcAddress:
        return BmcAddress(self.address, self.port, USER, Secret(password))

    # --- datagrams ---------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)
        self.address, self.port = transport.get_extra_info("sockname")[:2]

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self._note_exchange(data, addr)
        if not self.faults.answers(len(self.exchanges), self._clock() - self._born_at):
            return
        try:
            reply, delay = self._reply_to(data)
        except Malformed:
            return
        if reply:
            delay += self.faults.real_delay
            asyncio.get_running_loop().call_later(delay, self._send, reply, addr)

    def _note_exchange(self, data: bytes, client: tuple[str, int]) -> None:
        """Each exchange has a socket of its own, and begins outside of RMCP+. Whoever goes on
        with one after another began overlaps it."""
        if self.exchanges and self.exchanges[-1] == client:
            return
        begins = data[4:5] == bytes([IPMI_15_NO_AUTH])
        self.is_overlapped = self.is_overlapped or not begins
        self.exchanges.append(client)
        self.exchanged_at.append(self._clock())

    def _send(self, reply: bytes, client: tuple[str, int]) -> None:
        assert self._transport is not None
        mangle = MANGLINGS.get(self.faults.mangling or "")
        self._sent.append(reply)
        for datagram in mangle(reply, self._sent, self._chance) if mangle else [reply]:
            self._transport.sendto(datagram, client)

    def _reply_to(self, data: bytes) -> tuple[bytes, float]:
        """Return what to send back, b"" for nothing, and how late. Raises Malformed."""
        packet = parse(data)
        if packet.payload_type is None:
            payload, _ = self._do(parse_message(packet.payload), None)
            return outside(payload), 0.0
        if packet.payload_type in self.faults.not_answered_login:
            self.sessions.log_in(packet.payload_type, packet.payload)
            return b"", 0.0
        if packet.payload_type != IPMI:
            return unsealed(*self.sessions.log_in(packet.payload_type, packet.payload)), 0.0
        session = self.sessions.row(packet.session_id)
        assert session.keys is not None
        if not packet.is_sealed:
            raise Malformed
        payload, delay = self._do(parse_message(unseal(packet, session.keys)), session)
        if not payload:
            return b"", delay
        session.sent += 1
        return sealed(payload, session.console_id, session.sent, session.keys), delay

    # --- commands ----------------------------------------------------------------------------

    def _do(self, message: Message, session: Session | None) -> tuple[bytes, float]:
        """Do one request; return the payload that answers it, b"" for none, and how late."""
        if message.netfn == APPLICATION:
            return self._do_application(message, session), 0.0
        if message.netfn != CHASSIS or session is None:
            return answer(message, UNKNOWN_COMMAND), 0.0
        try:
            command, code, data = self._do_chassis(message)
        except (KeyError, IndexError):
            return answer(message, BAD_FIELD), 0.0
        if self.faults.password_changes_after is command:
            self._password = OTHER_PASSWORD
        if self._unanswered.get(command, 0) > 0:
            self._unanswered[command] -= 1
            return b"", 0.0
        if self.faults.short_answers:
            data = b""
        return answer(message, code, data), self.faults.real_command_delay

    def _do_application(self, message: Message, session: Session | None) -> bytes:
        if message.command == 0x38:
            return answer(message, DONE, CAPABILITIES)
        if session is None:
            return answer(message, UNKNOWN_COMMAND)
        if message.command == 0x3B:  # set session privilege level
            return answer(message, DONE, message.data[:1])
        if message.command == 0x3C and len(message.data) >= 4:
            if self.faults.ignores_logout:
                return answer(message, DONE)
            is_closed = self.sessions.close(struct.unpack_from("<I", message.data)[0])
            return answer(message, DONE if is_closed else 0x87)
        if message.command == 0x01:
            return answer(message, DONE, DEVICE)
        return answer(message, UNKNOWN_COMMAND)

    def _do_chassis(self, message: Message) -> tuple[Command, int, bytes]:
        """Raises KeyError or IndexError for what no BMC knows."""
        command = self._command_of(message)
        self.commands.append(command)
        if command in self.faults.refused:
            return command, self.faults.refused[command], b""
        if command is Command.STATUS:
            return command, DONE, bytes([0x20 | self.host.power_read(), 0, 0])
        if command is Command.HOLD_TIMER:
            self.host.hold_timer(bool(message.data[1] & 0x08))
        elif command is Command.SET_FLAGS:
            bits, device = message.data[1], message.data[2]
            is_valid = bool(bits & 0x80)
            if is_valid and device in BOOT_SOURCES:
                flags = Flags(BOOT_SOURCES[device], bool(bits & 0x40), bool(bits & 0x20))
                self.host.set_flags(flags)
        else:
            self.host.obey(command)
        return command, DONE, b""

    def _command_of(self, message: Message) -> Command:
        if message.command == 0x01:
            return Command.STATUS
        if message.command == 0x02:
            return CONTROLS[message.data[0] & 0x0F]
        parameters = {0x03: Command.HOLD_TIMER, 0x05: Command.SET_FLAGS}
        return {0x08: parameters}[message.command][message.data[0] & 0x7F]


class Rack:
    """The BMCs of one process. Add as many as needed, each with faults of its own."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.bmcs: list[FaultyBmc] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="faulty-bmcs")
        self._thread.start()

    def add(self, faults: Faults | None = None, traits: Traits | None = None) -> FaultyBmc:
        """Start a BMC at a loopback address of its own, on a port that is free."""
        number = len(self.bmcs) + 1
        bmc = FaultyBmc(faults or Faults(), traits or Traits(), self.clock, seed=number)
        address = f"127.3.{number // 250}.{number % 250 + 1}"
        asyncio.run_coroutine_threadsafe(self._listen(bmc, address), self._loop).result(10)
        self.bmcs.append(bmc)
        return bmc

    async def _listen(self, bmc: FaultyBmc, address: str) -> None:
        listening = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        listening.bind((address, 0))
        await self._loop.create_datagram_endpoint(lambda: bmc, sock=listening)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        for bmc in self.bmcs:
            if bmc._transport is not None:
                bmc._transport.abort()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()


@contextmanager
def running_rack(clock: Callable[[], float] = time.monotonic) -> Iterator[Rack]:
    """Run BMCs whose hosts live by `clock`, in seconds."""
    rack = Rack(clock)
    try:
        yield rack
    finally:
        rack.close()
