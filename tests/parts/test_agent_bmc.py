"""The question for the BMC's address: who is asked, in which bytes, and what an answer means.

That a kernel takes these bytes is shown by the lab, with a BMC to answer.
"""

import array
import ctypes
import time
from pathlib import Path

import pytest

from provisioner.agent import bmc
from provisioner.agent.bmc import (
    ANSWER_LIMIT_S,
    BmcQuestion,
    address_in,
    has_bmc,
    lan_address,
    smbios_types,
)
from tests.parts.busy_machine import in_one_of


class Message(ctypes.Structure):
    """struct ipmi_msg of linux/ipmi.h; ctypes places its parts as a C compiler does."""

    _fields_ = (
        ("netfn", ctypes.c_ubyte),
        ("cmd", ctypes.c_ubyte),
        ("data_len", ctypes.c_ushort),
        ("data", ctypes.c_void_p),
    )


class Request(ctypes.Structure):
    """struct ipmi_req of linux/ipmi.h."""

    _fields_ = (
        ("addr", ctypes.c_void_p),
        ("addr_len", ctypes.c_uint),
        ("msgid", ctypes.c_long),
        ("msg", Message),
    )


class Answer(ctypes.Structure):
    """struct ipmi_recv of linux/ipmi.h."""

    _fields_ = (
        ("recv_type", ctypes.c_int),
        ("addr", ctypes.c_void_p),
        ("addr_len", ctypes.c_uint),
        ("msgid", ctypes.c_long),
        ("msg", Message),
    )


def structure(kind: int, length: int, *texts: bytes) -> bytes:
    """One SMBIOS structure."""
    return bytes([kind, length, 0, kind]).ljust(length, b"\1") + b"\0".join(texts) + b"\0\0"


# What a QEMU host has: BIOS, system, IPMI device, end. The second has no IPMI device.
WITH_BMC = (
    structure(0, 0x1A, b"EDK II", b"unknown")
    + structure(1, 0x1B, b"QEMU")
    + structure(38, 0x12)
    + structure(127, 4)
)
WITHOUT_BMC = structure(0, 0x1A, b"SeaBIOS") + structure(127, 4) + structure(38, 0x12)


def test_a_request_is_laid_out_as_the_kernel_expects() -> None:
    address, data = array.array("B", range(8)), array.array("B", (1, 3, 0, 0))
    packed = bmc.pack_request(address, data, 7)
    seen = Request.from_buffer_copy(packed)
    assert len(packed) == ctypes.sizeof(Request)
    assert (seen.addr, seen.addr_len, seen.msgid) == (address.buffer_info()[0], 8, 7)
    assert (seen.msg.netfn, seen.msg.cmd, seen.msg.data_len) == (0x0C, 2, 4)
    assert ctypes.string_at(seen.msg.data, seen.msg.data_len) == b"\1\3\0\0"


def test_the_calls_have_the_numbers_that_other_programs_use() -> None:
    """As strace shows them for ipmitool on x86-64."""
    assert bmc._SEND == 0x8028690D
    assert bmc._RECEIVE == 0xC030690B
    assert bmc._ANSWER.size == ctypes.sizeof(Answer)
    filled = Answer(recv_type=1, addr=2, addr_len=3, msgid=4)
    filled.msg = Message(netfn=5, cmd=6, data_len=7, data=8)
    assert bmc._ANSWER.unpack(bytes(filled)) == (1, 2, 3, 4, 5, 6, 7, 8)


@pytest.mark.parametrize(
    ("recorded", "address"),
    [
        ("00 11 0a 4d 00 15", "10.77.0.21"),
        ("00 11 7f 00 01 01", "127.0.1.1"),
        ("00 11 00 00 00 00", None),  # a channel that was never configured
        ("00 11 ff ff ff ff", None),
        ("80", None),  # parameter not supported
        ("cc", None),  # no such channel
        ("c3", None),  # the kernel's own: the BMC did not answer
        ("00 11 0a 4d", None),
        ("", None),
    ],
)
def test_an_answer_holds_an_address_or_none(recorded: str, address: str | None) -> None:
    assert address_in(bytes.fromhex(recorded)) == address


@pytest.mark.parametrize(
    ("table", "types"),
    [
        (WITH_BMC, [0, 1, 38]),
        (WITHOUT_BMC, [0]),
        (WITH_BMC[:20], [0]),
        (b"\x26\0\0\0", [38]),
        (b"\x26\0", []),
        (b"", []),
    ],
)
def test_an_smbios_table_is_read_to_its_end_and_no_further(table: bytes, types: list[int]) -> None:
    assert list(smbios_types(table)) == types


def test_smbios_or_acpi_says_that_there_is_a_bmc(tmp_path: Path) -> None:
    assert not has_bmc(str(tmp_path))
    table = tmp_path / "sys/firmware/dmi/tables/DMI"
    table.parent.mkdir(parents=True)
    table.write_bytes(WITHOUT_BMC)
    assert not has_bmc(str(tmp_path))
    table.write_bytes(WITH_BMC)
    assert has_bmc(str(tmp_path))
    table.unlink()
    (tmp_path / "sys/bus/acpi/devices/IPI0001:00").mkdir(parents=True)
    assert has_bmc(str(tmp_path))


def test_a_host_without_a_bmc_is_not_waited_for(tmp_path: Path) -> None:
    def attempt() -> None:
        question = BmcQuestion(str(tmp_path))
        began = time.monotonic()
        question.start()
        assert question.answer() is None
        assert time.monotonic() - began < ANSWER_LIMIT_S / 2

    in_one_of(attempt)


@pytest.mark.parametrize("device", ["no-such-device", "/dev/null"])
def test_a_device_that_is_none_is_an_error_that_the_question_swallows(device: str) -> None:
    with pytest.raises(OSError):  # noqa: PT011 - which one is the kernel's choice
        lan_address(device, time.monotonic() + 60)
