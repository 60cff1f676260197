"""Asks the host's own BMC for its address on the network, by the kernel's IPMI device.

Only where the firmware says that there is a BMC. Whatever goes wrong means that the address
is not known; it is never an error, and never takes longer than its limits.

Source: linux/ipmi.h, "The userland interface"; IPMI 2.0, 23.2 and table 23-4 (Get LAN
Configuration Parameters); SMBIOS 3.6, 7.39 (IPMI device information).
"""

import array
import fcntl
import os
import select
import struct
import threading
import time
from collections.abc import Iterator
from typing import Final

DEVICE: Final = "dev/ipmi0"
MODPROBE: Final = "/sbin/modprobe"
# Debian's cloud kernel has none of these, and the address is then not known.
MODULES: Final = ("ipmi_si", "ipmi_devintf")
# Drivers included; some BMCs are slow while they boot themselves.
ANSWER_LIMIT_S: Final = 8.0
ONE_ANSWER_LIMIT_S: Final = 2.0
# Makers use 1; Dell and Supermicro boards with a shared port also use 8.
LAN_CHANNELS: Final = (1, 8)
DATA_BYTES_MAX: Final = 64
TABLE_BYTES_MAX: Final = 1 << 20

_SMBIOS_IPMI: Final = 38
_SMBIOS_END: Final = 127
_ACPI_IPMI: Final = "IPI0001"

# struct ipmi_req, ipmi_recv and ipmi_system_interface_addr, with native sizes and holes;
# struct ipmi_msg is their end: netfn, cmd, data_len, data.
_REQUEST: Final = struct.Struct("@PIlBBHP")
_ANSWER: Final = struct.Struct("@iPIlBBHP")
_ADDRESS: Final = struct.Struct("@ihBx")
# IPMICTL_SEND_COMMAND is _IOR('i', 13, struct ipmi_req), IPMICTL_RECEIVE_MSG_TRUNC is
# _IOWR('i', 11, struct ipmi_recv).
_SEND: Final = 2 << 30 | _REQUEST.size << 16 | ord("i") << 8 | 13
_RECEIVE: Final = 3 << 30 | _ANSWER.size << 16 | ord("i") << 8 | 11
_SYSTEM_INTERFACE: Final = 0x0C
_BMC_CHANNEL: Final = 0x0F
_IS_RESPONSE: Final = 1

_TRANSPORT: Final = 0x0C
_GET_LAN_PARAMETERS: Final = 0x02
_IP_ADDRESS: Final = 3


class BmcQuestion:
    """The question for the address, asked by a thread of its own while others work."""

    def __init__(self, root: str = "/") -> None:
        self._root = root
        self._address: str | None = None
        self._ends_at = time.monotonic() + ANSWER_LIMIT_S
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin, unless the host has no BMC."""
        if has_bmc(self._root):
            self._thread = threading.Thread(target=self._ask, daemon=True)
            self._thread.start()

    def answer(self) -> str | None:
        """Return the address, or None when it did not come within ANSWER_LIMIT_S."""
        if self._thread is not None:
            self._thread.join(max(0.0, self._ends_at - time.monotonic()))
        return self._address

    def _ask(self) -> None:
        try:
            load_drivers()
            self._address = lan_address(os.path.join(self._root, DEVICE), self._ends_at)
        except OSError:
            return


def has_bmc(root: str = "/") -> bool:
    """Say whether ACPI or SMBIOS names an IPMI interface."""
    try:
        names = os.listdir(os.path.join(root, "sys/bus/acpi/devices"))
    except OSError:
        names = []
    if any(name.startswith(_ACPI_IPMI) for name in names):
        return True
    try:
        with open(os.path.join(root, "sys/firmware/dmi/tables/DMI"), "rb") as file:
            return _SMBIOS_IPMI in smbios_types(file.read(TABLE_BYTES_MAX))
    except OSError:
        return False


def smbios_types(table: bytes) -> Iterator[int]:
    """Yield the type of each structure: a header with its length, then texts, then two NULs."""
    at = 0
    while at + 4 <= len(table) and table[at] != _SMBIOS_END:
        yield table[at]
        end = table.find(b"\0\0", at + max(table[at + 1], 4))
        if end < 0:
            return
        at = end + 2


def load_drivers() -> None:
    """Load the drivers; return when they have looked for the BMC. Raises OSError."""
    words = [MODPROBE, "-a", "-b", "-q", *MODULES]
    process = os.posix_spawn(MODPROBE, words, {"PATH": "/sbin:/bin"})
    os.waitpid(process, 0)


def lan_address(device: str, ends_at: float) -> str | None:
    """Return the IPv4 address of the BMC's first LAN channel that has one.

    ends_at is a time of time.monotonic. Raises OSError when the device is not there.
    """
    number = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    try:
        for channel in LAN_CHANNELS:
            limit_s = min(ONE_ANSWER_LIMIT_S, ends_at - time.monotonic())
            if address := address_in(_exchange(number, channel, limit_s)):
                return address
        return None
    finally:
        os.close(number)


def address_in(data: bytes) -> str | None:
    """Return the address in an answer: completion code, revision, four bytes; or None."""
    if len(data) < 6 or data[0] != 0 or not any(data[2:6]) or data[2:6] == b"\xff\xff\xff\xff":
        return None
    return ".".join(str(byte) for byte in data[2:6])


def _exchange(number: int, channel: int, limit_s: float) -> bytes:
    """Ask for the IP address of one channel; return the answer's data, or nothing."""
    # An array's place in memory is known, which the kernel must be told.
    address = array.array("B", _ADDRESS.pack(_SYSTEM_INTERFACE, _BMC_CHANNEL, 0))
    data = array.array("B", (channel, _IP_ADDRESS, 0, 0))
    fcntl.ioctl(number, _SEND, pack_request(address, data, channel))
    gives_up_at = time.monotonic() + limit_s
    while (left_s := gives_up_at - time.monotonic()) > 0:
        if not select.select([number], [], [], left_s)[0]:
            break
        kind, asked, answer = _receive(number)
        if kind == _IS_RESPONSE and asked == channel:
            return answer
    return b""


def pack_request(address: "array.array[int]", data: "array.array[int]", msgid: int) -> bytes:
    """Return a struct ipmi_req that points to both arrays, which must outlive its use."""
    return _REQUEST.pack(
        *(address.buffer_info()[0], len(address), msgid),
        *(_TRANSPORT, _GET_LAN_PARAMETERS, len(data), data.buffer_info()[0]),
    )


def _receive(number: int) -> tuple[int, int, bytes]:
    """Return one message: its kind, the msgid it answers, its data."""
    address = array.array("B", bytes(40))
    data = array.array("B", bytes(DATA_BYTES_MAX))
    message = bytearray(
        _ANSWER.pack(
            *(0, address.buffer_info()[0], len(address), 0, 0, 0),
            *(len(data), data.buffer_info()[0]),
        )
    )
    fcntl.ioctl(number, _RECEIVE, message)
    kind, _, _, msgid, _, _, length, _ = _ANSWER.unpack(message)
    return kind, msgid, data.tobytes()[:length]
