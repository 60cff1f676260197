"""The TFTP server with real clients: byte-exact, read-only, and not to be put out."""

import os
import random
import re
import signal
import struct
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from provisioner.errors import ConfigError
from provisioner.netboot.tftp import Outcome, TftpLimits, TftpServer

from .tftp_clients import (
    CLIENT_LIMIT_S,
    Client,
    LossyWire,
    curl,
    request_packet,
    serving,
    tftp_hpa,
)

CONTENT = random.Random(7).randbytes(300_000)
FILES: dict[str, bytes | Path] = {
    "file": CONTENT,
    "empty": b"",
    "one-block": CONTENT[:512],
    "short": b"short",
}
FUZZ_PACKETS = 10_000
FLOOD = 200
CLIENTS_AT_ONCE = 40
BLOCK_SIZES = (512, 1000, 1428, 1468)


@pytest.mark.parametrize("block_bytes", [*BLOCK_SIZES, 65464])
def test_curl_gets_every_byte(tmp_path: Path, block_bytes: int) -> None:
    with serving(FILES) as served:
        assert curl(served.address, "file", tmp_path / "got", block_bytes).wait(CLIENT_LIMIT_S) == 0
        assert (tmp_path / "got").read_bytes() == CONTENT
        event = served.wait_for_events(1)[0]
    assert (event.client, event.file) == ("127.0.0.1", "file")
    assert (event.outcome, event.sent_bytes) == (Outcome.SERVED, len(CONTENT))


@pytest.mark.parametrize("name", FILES)
def test_tftp_hpa_gets_every_byte(tmp_path: Path, name: str) -> None:
    with serving(FILES) as served:
        tftp_hpa(served.address, "get", name, "got", cwd=tmp_path)
        assert (tmp_path / "got").read_bytes() == FILES[name]


@pytest.mark.parametrize("name", ["nothing", "../file", "/file", "./file", "file ", "FILE", "%2e"])
def test_only_exact_names_exist(tmp_path: Path, name: str) -> None:
    with serving(FILES) as served:
        assert "File not found" in tftp_hpa(served.address, "get", name, "got", cwd=tmp_path)
        assert served.wait_for_events(1)[0].outcome is Outcome.NOT_FOUND


def test_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"other")
    with serving(FILES) as served:
        assert "Access violation" in tftp_hpa(served.address, "put", "file", cwd=tmp_path)
        tftp_hpa(served.address, "get", "file", "got", cwd=tmp_path)
        assert (tmp_path / "got").read_bytes() == CONTENT


def test_a_mode_that_would_change_bytes_is_refused(tmp_path: Path) -> None:
    with serving(FILES) as served:
        said = tftp_hpa(served.address, "get", "file", "got", mode="netascii", cwd=tmp_path)
        assert "Illegal TFTP operation" in said


def test_options_are_granted_within_their_limits() -> None:
    asked = [b"BLKSIZE", b"9000", b"tsize", b"0", b"windowsize", b"64", b"unheard-of", b"1"]
    with serving(FILES) as served, Client(served.address) as client:
        client.ask(request_packet(b"file", *asked))
        granted = client.receive()[2:].split(b"\0")[:-1]
    options = dict(zip(granted[::2], granted[1::2], strict=True))
    assert options == {b"blksize": b"1468", b"tsize": b"300000", b"windowsize": b"16"}


def test_a_block_size_below_the_standard_one_falls_back_to_it() -> None:
    with serving(FILES) as served, Client(served.address) as client:
        client.ask(request_packet(b"file", b"blksize", b"100"))
        assert len(client.receive()) == 4 + 512


def test_a_window_of_blocks_travels_together_and_goes_back_to_the_first_lost() -> None:
    with serving(FILES) as served, Client(served.address) as client:
        client.ask(request_packet(b"file", b"windowsize", b"4"))
        client.receive()
        client.acknowledge(0)
        assert client.blocks_up_to(4) == [1, 2, 3, 4]
        client.acknowledge(2)  # 3 was lost
        # The first window comes again if we were slow; the next one begins behind it.
        assert client.blocks_up_to(6)[-4:] == [3, 4, 5, 6]


def test_block_numbers_go_on_after_65535(tmp_path: Path) -> None:
    content = random.Random(8).randbytes(512 * 65_540)
    with serving({"large": content}) as served:
        tftp_hpa(served.address, "get", "large", "got", cwd=tmp_path)
        assert (tmp_path / "got").read_bytes() == content


@pytest.mark.parametrize(
    "packet",
    [
        request_packet(b"file", b"blksize", b"abc"),
        request_packet(b"file", b"blksize", b"-1"),
        request_packet(b"file", b"blksize", "١٢٣٤".encode()),
        request_packet(b"file", b"tsize", b"9" * 100),
        request_packet(b"file", b"windowsize", b"0"),
        request_packet(b"file", b"blksize"),
        request_packet(b"f\xffle"),
        request_packet(b"file", mode=b"oct\xffet"),
        request_packet(b"a" * 600),
        b"\0\1file",
        b"\0\1\0\0",
        b"\0\1",
        b"\0",
        b"",
        b"\0\5\0\0\0",
        b"\xff" * 100,
    ],
)
def test_one_bad_packet_costs_nobody_else(tmp_path: Path, packet: bytes) -> None:
    """A running transfer and the next request see nothing of it."""
    with serving(FILES) as served, Client(served.address) as running, Client(served.address) as bad:
        running.ask(request_packet(b"file"))
        first = running.block(1)
        bad.ask(packet)
        running.acknowledge(1)
        assert first + running.block(2) == CONTENT[:1024]
        assert curl(served.address, "file", tmp_path / "got", 1428).wait(CLIENT_LIMIT_S) == 0
        assert (tmp_path / "got").read_bytes() == CONTENT


def test_a_request_filled_up_with_zeros_is_understood() -> None:
    with serving(FILES) as served, Client(served.address) as client:
        client.ask(request_packet(b"short", b"tsize", b"0") + bytes(40))
        assert client.receive() == b"\0\6tsize\x005\0"


def test_it_survives_ten_thousand_packets_of_nonsense(tmp_path: Path) -> None:
    """To the listening port and to the port of a transfer, mutated from what is valid."""
    chance = random.Random(11)
    valid = [
        request_packet(b"file", b"blksize", b"1428", b"tsize", b"0"),
        request_packet(b"short", opcode=2),
        struct.pack("!HH", 4, 1),
        struct.pack("!HH", 3, 1) + b"data",
        struct.pack("!HH", 5, 1) + b"no\0",
        b"\0\6blksize\x001428\0",
    ]
    limits = TftpLimits(sessions_per_source=128, answer_s=0.2, idle_s=0.2)
    with serving(FILES, limits) as served:
        for number in range(FUZZ_PACKETS // 100):
            with Client(served.address) as client:
                client.ask(valid[0])
                client.receive()
                for turn in range(100):
                    to = served.address if turn % 2 else client.peer
                    # Refused is what it should be when the transfer is closed.
                    with suppress(ConnectionRefusedError):
                        client.socket.sendto(_mutated(chance, chance.choice(valid)), to)
            if number % 20 == 0:
                assert (
                    curl(served.address, "file", tmp_path / "got", 1468).wait(CLIENT_LIMIT_S) == 0
                )
                assert (tmp_path / "got").read_bytes() == CONTENT
        assert curl(served.address, "file", tmp_path / "got", 512).wait(CLIENT_LIMIT_S) == 0
        assert (tmp_path / "got").read_bytes() == CONTENT


def _mutated(chance: random.Random, packet: bytes) -> bytes:
    data = bytearray(packet)
    for _ in range(chance.randint(0, 4)):
        match chance.randint(0, 3):
            case 0 if data:
                data[chance.randrange(len(data))] = chance.randrange(256)
            case 1:
                at = chance.randint(0, len(data))
                data[at:at] = chance.randbytes(chance.randint(1, 40))
            case 2:
                del data[chance.randint(0, len(data)) :]
            case _:
                return chance.randbytes(chance.randint(0, 600))
    return bytes(data)


@pytest.mark.parametrize("block_bytes", [512, 1468])
def test_forty_at_once_with_a_tenth_of_the_packets_lost(tmp_path: Path, block_bytes: int) -> None:
    content = CONTENT[: 40 * block_bytes + 17]
    with (
        serving({"file": content}) as served,
        LossyWire(served.address, loss=0.1) as wire,
    ):
        clients = [
            curl(wire.address, "file", tmp_path / str(number), block_bytes)
            for number in range(CLIENTS_AT_ONCE)
        ]
        assert [client.wait(CLIENT_LIMIT_S) for client in clients] == [0] * CLIENTS_AT_ONCE
        assert wire.dropped > CLIENTS_AT_ONCE
        outcomes = {event.outcome for event in served.wait_for_events(CLIENTS_AT_ONCE)}
    assert {(tmp_path / str(number)).read_bytes() for number in range(40)} == {content}
    # A lost last acknowledgement cannot be told from a client that went away satisfied.
    assert outcomes <= {Outcome.SERVED, Outcome.UNCONFIRMED, Outcome.ABORTED}


def test_tftp_hpa_gets_every_byte_with_a_tenth_of_the_packets_lost(tmp_path: Path) -> None:
    content = CONTENT[:30_000]
    with serving({"file": content}) as served, LossyWire(served.address, loss=0.1) as wire:
        tftp_hpa(wire.address, "get", "file", "got", cwd=tmp_path)
    assert (tmp_path / "got").read_bytes() == content


def test_a_silent_client_is_resent_to() -> None:
    limits = TftpLimits(answer_s=60, idle_s=60)
    with serving(FILES, limits) as served, Client(served.address) as client:
        client.ask(request_packet(b"file"))
        assert client.receive() == client.receive()
        assert served.events == []


def test_a_silent_client_is_given_up() -> None:
    limits = TftpLimits(answer_s=0.8, idle_s=0.8)
    with serving(FILES, limits) as served, Client(served.address) as client:
        client.ask(request_packet(b"file"))
        assert client.block(1) == CONTENT[:512]
        assert served.wait_for_events(1)[0].outcome is Outcome.TIMED_OUT


def test_a_repeated_acknowledgement_does_not_double_the_packets() -> None:
    """Answering each would double every packet from then on (RFC 1123 §4.2.3.1). The clock
    sends a block again, too, but less and less often: once a second in the end."""
    repeated = 60
    with serving(FILES) as served, Client(served.address) as client:
        client.ask(request_packet(b"file"))
        client.block(1)
        client.acknowledge(1)
        client.block(2)
        for _ in range(repeated):
            client.acknowledge(1)
        # It is read after them all, so that what they led to has been sent by then.
        client.socket.sendto(b"\0\5\0\0done\0", client.peer)
        assert served.wait_for_events(1)[0].outcome is Outcome.ABORTED
        assert len(client.waiting()) < repeated / 2


def test_a_request_sent_twice_begins_one_transfer() -> None:
    with serving(FILES) as served, Client(served.address) as client:
        client.ask(request_packet(b"file"))
        client.ask(request_packet(b"file"))
        client.receive()
        assert client.hears_nobody_but_its_peer(0.2)


def test_a_client_that_begins_again_from_its_port_is_served_anew() -> None:
    with serving(FILES) as served, Client(served.address) as client:
        client.ask(request_packet(b"file"))
        client.block(1)
        client.acknowledge(1)
        client.block(2)
        client.ask(request_packet(b"short"))
        assert client.block(1, not_from=client.peer) == b"short"


def test_one_source_cannot_take_all_transfers() -> None:
    with serving(FILES, TftpLimits(sessions_per_source=2)) as served:
        clients = [Client(served.address) for _ in range(3)]
        for client in clients:
            client.ask(request_packet(b"file"))
        assert served.wait_for_events(1)[0].outcome is Outcome.TOO_MANY
        assert clients[2].hears_nothing(0.1)
        with Client(served.address, source="127.0.0.2") as other:
            other.ask(request_packet(b"file"))
            assert other.receive()[4:] == CONTENT[:512]
        for client in clients:
            client.socket.close()


def test_there_is_a_limit_to_all_transfers() -> None:
    with (
        serving(FILES, TftpLimits(sessions=1)) as served,
        Client(served.address) as first,
        Client(served.address, source="127.0.0.2") as second,
    ):
        first.ask(request_packet(b"file"))
        first.receive()
        second.ask(request_packet(b"file"))
        assert served.wait_for_events(1)[0].outcome is Outcome.TOO_MANY
        assert second.hears_nothing(0.1)
        first.socket.sendto(b"\0\5\0\0done\0", first.peer)
        served.wait_for_events(2)
        second.ask(request_packet(b"file"))
        assert second.receive()[4:] == CONTENT[:512]


def test_a_flood_of_refusals_is_not_a_flood_of_events() -> None:
    limits = TftpLimits(refusals_reported_per_s=3)
    with serving(FILES, limits) as served, Client(served.address) as client:
        began_at = int(time.monotonic())
        for _ in range(FLOOD):
            client.ask(request_packet(b"nothing"))
            client.receive()
        seconds = int(time.monotonic()) - began_at + 1
    assert 0 < len(served.events) <= 3 * seconds


def test_a_name_is_reported_in_one_printable_line() -> None:
    with serving(FILES) as served, Client(served.address) as client:
        client.ask(request_packet(b"a\nb\x1b[31m"))
        client.receive()
        name = served.wait_for_events(1)[0].file
    assert name.isprintable()


def test_it_stops_on_sigterm() -> None:
    program = (
        "from provisioner.netboot.tftp import serve_tftp\n"
        "serve_tftp(('127.0.0.1', 0), {'file': b'x'}, on_event=print)\n"
    )
    command = [sys.executable, "-u", "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            listening = process.stdout.readline()
            port = re.search(r"127\.0\.0\.1\D+(\d+)", listening)
            assert port, listening
            with Client(("127.0.0.1", int(port[1]))) as client:
                client.ask(request_packet(b"file"))
                assert client.receive() == b"\0\3\0\1x"
            os.kill(process.pid, signal.SIGTERM)
            assert process.wait(CLIENT_LIMIT_S) == 0
        finally:
            process.kill()


def test_what_cannot_be_served_is_refused_at_the_start(tmp_path: Path) -> None:
    def start(files: dict[str, bytes | Path], port: int = 0) -> None:
        TftpServer(("127.0.0.1", port), files, on_event=print)

    with pytest.raises(ConfigError, match="cannot read"):
        start({"file": tmp_path / "missing"})
    with pytest.raises(ConfigError, match="impossible name"):
        start({"a\nb": b""})
    with serving({}) as served, pytest.raises(ConfigError, match="cannot listen"):
        start({}, served.address[1])
