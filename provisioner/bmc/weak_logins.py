"""Finds out whether a BMC lets people in without a password: by cipher suite 0, or without a name.

It asks as far as the BMC's own proof, RAKP message 2, and then ends the session, without ever
logging in. Source: IPMI v2.0 §13.17 to §13.22; on cipher suite 0, CVE-2013-4782.
"""

import hashlib
import hmac
import ipaddress
import os
import secrets
import socket
import struct
from typing import Final

from provisioner.core.model import BmcAddress, WeakLogin
from provisioner.errors import BmcUnreachable

TRIES: Final = 2
ANSWER_LIMIT_S: Final = 1.0
_BYTES_MAX: Final = 1024
_RMCP_PLUS: Final = bytes.fromhex("0600ff0706")
_OPEN, _OPENED, _RAKP_1, _RAKP_2, _RAKP_3 = 0x10, 0x11, 0x12, 0x13, 0x14
# Authentication, integrity and confidentiality of a suite, as table 13-17 has them.
_SUITE_0: Final = bytes.fromhex("000000080000000001000008000000000200000800000000")
_SUITE_3: Final = bytes.fromhex("000000080100000001000008010000000200000801000000")
# Looked up by name alone: at the level that we log in at, and at the lowest there is for
# people.
_AS_OPERATOR, _AS_USER = 0x13, 0x12
# "Invalid integrity check value": whoever gets this from us ends the session.
_ENDED: Final = 0x0F


def weak_logins(where: BmcAddress) -> tuple[WeakLogin, ...]:
    """Return the ways by which the BMC lets somebody in who knows no password.

    The caller holds the BMC's lock. Raises BmcUnreachable when it does not answer.
    """
    family = socket.AF_INET6 if ipaddress.ip_address(where.address).version == 6 else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as talk:
            talk.settimeout(ANSWER_LIMIT_S)
            talk.connect((where.address, where.port))
            found = {
                WeakLogin.CIPHER_ZERO: _opens(talk, _SUITE_0, _AS_OPERATOR, where.user.encode()),
                WeakLogin.ANONYMOUS: _opens(talk, _SUITE_3, _AS_USER, b""),
            }
    except OSError as error:
        raise BmcUnreachable(
            f"BMC {where.address} did not say who may log in",
            hint="check its power, cable and address, and that IPMI over LAN is switched on",
        ) from error
    return tuple(way for way, is_open in found.items() if is_open)


def _opens(talk: socket.socket, suite: bytes, role: int, user: bytes) -> bool:
    """Say whether the BMC opens a session with this suite to a user with an empty password.

    With suite 0 nobody proves anything, so that it takes any password.
    """
    ours = struct.pack("<I", 1 + secrets.randbelow(2**31))
    opened = _ask(talk, _OPEN, _OPENED, bytes(3), ours + suite)
    if len(opened) < 36 or opened[1] != 0 or opened[12:36] != suite:
        return False
    theirs, chance = opened[8:12], os.urandom(16)
    named = bytes([role, len(user)]) + user
    asked = theirs + chance + bytes([role, 0, 0, len(user)]) + user
    proof = _ask(talk, _RAKP_1, _RAKP_2, bytes(3), asked)
    if len(proof) < 40 or proof[1] != 0:
        return False
    talk.send(_packet(_RAKP_3, bytes([0, _ENDED, 0, 0]) + theirs))
    if suite == _SUITE_0:
        return True
    said = ours + theirs + chance + proof[8:24] + proof[24:40] + named
    # The BMC signs with the user's password: here, with none.
    return hmac.compare_digest(proof[40:60], hmac.new(b"", said, hashlib.sha1).digest())


def _ask(talk: socket.socket, kind: int, answered_by: int, head: bytes, body: bytes) -> bytes:
    """Return the payload that answers a packet of the login. Raises OSError for silence."""
    tag = secrets.token_bytes(1)
    for attempt in range(1, TRIES + 1):
        talk.send(_packet(kind, tag + head + body))
        try:
            while True:
                data = talk.recv(_BYTES_MAX)
                is_answer = data[:5] == _RMCP_PLUS and data[5:6] == bytes([answered_by])
                if is_answer and data[16:17] == tag:
                    return data[16:]
        except TimeoutError:
            if attempt == TRIES:
                raise
    raise TimeoutError


def _packet(kind: int, payload: bytes) -> bytes:
    return _RMCP_PLUS + struct.pack("<BIIH", kind, 0, 0, len(payload)) + payload
