"""RMCP+ packets as a BMC sees them: cipher suite 3 alone. Bytes in, values out; no state.

Cipher suite 3 is RAKP-HMAC-SHA1, HMAC-SHA1-96 and AES-CBC-128. Source: IPMI v2.0 §13.
"""

import hashlib
import hmac
import os
import struct
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

RMCP: Final = bytes.fromhex("0600ff07")
IPMI_15_NO_AUTH, RMCP_PLUS = 0x00, 0x06
IPMI, OPEN_REQUEST, OPEN_RESPONSE, RAKP_1, RAKP_2, RAKP_3, RAKP_4 = 0, *range(0x10, 0x16)
ENCRYPTED, AUTHENTICATED = 0x80, 0x40
CODE_BYTES: Final = 12  # HMAC-SHA1-96
BLOCK: Final = 16
BMC_ADDRESS: Final = 0x20


class Malformed(Exception):
    """Not a packet that we understand; a BMC drops it."""


@dataclass(frozen=True)
class Packet:
    """One datagram, unwrapped. `payload_type` is None outside of RMCP+ (IPMI 1.5 format)."""

    raw: bytes
    payload_type: int | None
    session_id: int
    payload: bytes
    is_sealed: bool


@dataclass(frozen=True)
class Keys:
    """What both sides derive from the password and their two random numbers."""

    integrity: bytes
    confidentiality: bytes


@dataclass(frozen=True)
class Message:
    """One IPMI request."""

    netfn: int
    command: int
    data: bytes
    requester: int
    sequence: int  # with the LUN, as received


def mac(key: bytes, *parts: bytes) -> bytes:
    return hmac.new(key, b"".join(parts), hashlib.sha1).digest()


def keys_of(session_key: bytes) -> Keys:
    return Keys(mac(session_key, b"\x01" * 20), mac(session_key, b"\x02" * 20)[:BLOCK])


def parse(raw: bytes) -> Packet:
    """Return what a datagram holds. Raises Malformed."""
    if len(raw) < 14 or raw[:4] != RMCP:
        raise Malformed
    if raw[4] == IPMI_15_NO_AUTH:
        return Packet(raw, None, 0, raw[14 : 14 + raw[13]], is_sealed=False)
    if raw[4] != RMCP_PLUS or len(raw) < 16:
        raise Malformed
    session_id, _, length = struct.unpack_from("<IIH", raw, 6)
    payload = raw[16 : 16 + length]
    if len(payload) != length:
        raise Malformed
    return Packet(raw, raw[5] & 0x3F, session_id, payload, bool(raw[5] & AUTHENTICATED))


def unseal(packet: Packet, keys: Keys) -> bytes:
    """Return the payload of a packet of a session. Raises Malformed when its code is wrong."""
    body, code = packet.raw[4:-CODE_BYTES], packet.raw[-CODE_BYTES:]
    if not hmac.compare_digest(mac(keys.integrity, body)[:CODE_BYTES], code):
        raise Malformed
    vector, sealed = packet.payload[:BLOCK], packet.payload[BLOCK:]
    if len(vector) != BLOCK or not sealed or len(sealed) % BLOCK:
        raise Malformed
    decryptor = Cipher(algorithms.AES(keys.confidentiality), modes.CBC(vector)).decryptor()
    plain = decryptor.update(sealed) + decryptor.finalize()
    return plain[: len(plain) - plain[-1] - 1]


def outside(payload: bytes) -> bytes:
    """Return a packet in the IPMI 1.5 format, outside any session."""
    return RMCP + bytes([IPMI_15_NO_AUTH]) + bytes(8) + bytes([len(payload)]) + payload


def unsealed(payload_type: int, payload: bytes) -> bytes:
    """Return an RMCP+ packet of the login."""
    return RMCP + struct.pack("<BBIIH", RMCP_PLUS, payload_type, 0, 0, len(payload)) + payload


def sealed(payload: bytes, session_id: int, sequence: int, keys: Keys) -> bytes:
    """Return a packet of a session, encrypted and with its code."""
    missing = -(len(payload) + 1) % BLOCK
    plain = payload + bytes(range(1, missing + 1)) + bytes([missing])
    vector = os.urandom(BLOCK)
    encryptor = Cipher(algorithms.AES(keys.confidentiality), modes.CBC(vector)).encryptor()
    inner = vector + encryptor.update(plain) + encryptor.finalize()
    kind = IPMI | ENCRYPTED | AUTHENTICATED
    body = struct.pack("<BBIIH", RMCP_PLUS, kind, session_id, sequence, len(inner)) + inner
    fill = -(len(body) + 2) % 4
    body += b"\xff" * fill + bytes([fill, 0x07])
    return RMCP + body + mac(keys.integrity, body)[:CODE_BYTES]


def checksum(data: bytes) -> int:
    return -sum(data) & 0xFF


def parse_message(payload: bytes) -> Message:
    """Return the request in a payload. Raises Malformed."""
    if len(payload) < 7 or checksum(payload[:3]) or checksum(payload[3:]):
        raise Malformed
    return Message(payload[1] >> 2, payload[5], payload[6:-1], payload[3], payload[4])


def answer(message: Message, code: int, data: bytes = b"") -> bytes:
    """Return the payload that answers `message` with a completion code and data."""
    head = bytes([message.requester, (message.netfn + 1) << 2])
    rest = bytes([BMC_ADDRESS, message.sequence, message.command, code]) + data
    return head + bytes([checksum(head)]) + rest + bytes([checksum(rest)])
