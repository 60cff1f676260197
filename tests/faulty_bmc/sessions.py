"""A BMC's session table: the login by RAKP-HMAC-SHA1, and how many may be logged in at once.

Source: IPMI v2.0 §13.17 to §13.24. A session that nobody closes stays until it was idle for
too long, as those of real BMCs do.
"""

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from .packets import (
    CODE_BYTES,
    OPEN_REQUEST,
    OPEN_RESPONSE,
    RAKP_1,
    RAKP_2,
    RAKP_3,
    RAKP_4,
    Keys,
    Malformed,
    keys_of,
    mac,
)

NO_ROOM, INVALID_SESSION, UNKNOWN_USER, WRONG_CODE, NO_SUITE = 0x01, 0x02, 0x0D, 0x0F, 0x11
GUID: Final = bytes.fromhex("a123456789abcdefa123456789abcdef")
# Authentication, integrity and confidentiality of cipher suite 3, as table 13-17 has them.
SUITE_0: Final = bytes.fromhex("000000080000000001000008000000000200000800000000")
SUITE_3: Final = bytes.fromhex("000000080100000001000008010000000200000801000000")


@dataclass
class Session:
    """One row of the table. `keys` are there once the password was proven."""

    console_id: int
    heard_at: float
    console_random: bytes = b""
    bmc_random: bytes = field(default_factory=lambda: os.urandom(16))
    role: int = 0
    user: bytes = b""
    suite: bytes = SUITE_3
    keys: Keys | None = None
    sent: int = 0


@dataclass
class Counts:
    """What came of the logins so far. `refused_logins` are proofs of a wrong password."""

    opened: int = 0
    active: int = 0
    closed: int = 0
    expired: int = 0
    without_room: int = 0
    login_attempts: int = 0
    refused_logins: int = 0
    open_at_most: int = 0


class SessionTable:
    """The sessions of one BMC."""

    def __init__(
        self,
        clock: Callable[[], float],
        user: str,
        password: Callable[[], str],
        *,
        slots: int,
        idle_seconds: float,
        taken: int = 0,
        refuses_proof: bool = False,
        takes_suite_0: bool = False,
        nobodys_password: str | None = None,
    ) -> None:
        self._suites = {SUITE_3, *([SUITE_0] if takes_suite_0 else [])}
        self._nobodys_password = nobodys_password
        self._clock = clock
        self._user = user.encode()
        self._password = password
        self._slots = slots
        self._idle_seconds = idle_seconds
        self._refuses_proof = refuses_proof
        self._next_id = 0x0A000001
        self.counts = Counts()
        self.rows: dict[int, Session] = {}
        for _ in range(taken):
            self._add(Session(0, clock()))

    def log_in(self, payload_type: int, payload: bytes) -> tuple[int, bytes]:
        """Return type and payload of the answer to a packet of the login. Raises Malformed."""
        steps = {
            OPEN_REQUEST: (OPEN_RESPONSE, self._open),
            RAKP_1: (RAKP_2, self._rakp_1),
            RAKP_3: (RAKP_4, self._rakp_3),
        }
        if payload_type not in steps:
            raise Malformed
        answered_by, step = steps[payload_type]
        self._expire()
        try:
            return answered_by, step(payload)
        except (struct.error, IndexError) as error:
            raise Malformed from error

    def row(self, session_id: int) -> Session:
        """Return a session that is logged in, and note that it was heard. Raises Malformed."""
        self._expire()
        session = self.rows.get(session_id)
        if session is None or session.keys is None:
            raise Malformed
        session.heard_at = self._clock()
        return session

    def close(self, session_id: int) -> bool:
        if self.rows.pop(session_id, None) is None:
            return False
        self.counts.closed += 1
        return True

    def open_now(self) -> int:
        """Return how many sessions are logged in and were not closed."""
        return sum(row.keys is not None for row in list(self.rows.values()))

    def _expire(self) -> None:
        before = self._clock() - self._idle_seconds
        for session_id in [key for key, row in self.rows.items() if row.heard_at <= before]:
            del self.rows[session_id]
            self.counts.expired += 1

    def _add(self, session: Session) -> int:
        session_id, self._next_id = self._next_id, self._next_id + 1
        self.rows[session_id] = session
        self.counts.opened += 1
        self.counts.open_at_most = max(self.counts.open_at_most, len(self.rows))
        return session_id

    def _open(self, payload: bytes) -> bytes:
        tag, console_id = payload[0], struct.unpack_from("<I", payload, 4)[0]
        refusal = 0
        suite = payload[8:32]
        if suite not in self._suites:
            refusal = NO_SUITE
        elif len(self.rows) >= self._slots:
            refusal = NO_ROOM
            self.counts.without_room += 1
        if refusal:
            return struct.pack("<BBBBI", tag, refusal, 0, 0, console_id)
        session_id = self._add(Session(console_id, self._clock(), suite=suite))
        return struct.pack("<BBBBII", tag, 0, 4, 0, console_id, session_id) + suite

    def _rakp_1(self, payload: bytes) -> bytes:
        tag, session_id = payload[0], struct.unpack_from("<I", payload, 4)[0]
        session = self.rows.get(session_id)
        if session is None:
            return struct.pack("<BBBBI", tag, INVALID_SESSION, 0, 0, 0)
        self.counts.login_attempts += 1
        session.console_random = payload[8:24]
        session.role, length = payload[24], payload[27]
        session.user = payload[28 : 28 + length]
        if self._password_of(session) is None:
            del self.rows[session_id]
            self.counts.refused_logins += 1
            return struct.pack("<BBBBI", tag, UNKNOWN_USER, 0, 0, session.console_id)
        code = mac(
            self._key(session),
            struct.pack("<II", session.console_id, session_id),
            session.console_random,
            session.bmc_random,
            GUID,
            self._named(session),
        )
        code = b"" if session.suite == SUITE_0 else code
        head = struct.pack("<BBBBI", tag, 0, 0, 0, session.console_id)
        return head + session.bmc_random + GUID + code

    def _rakp_3(self, payload: bytes) -> bytes:
        tag, session_id = payload[0], struct.unpack_from("<I", payload, 4)[0]
        session = self.rows.get(session_id)
        if session is None or not session.console_random:
            return struct.pack("<BBBBI", tag, INVALID_SESSION, 0, 0, 0)
        if payload[1] != 0:  # the console gives up
            self.close(session_id)
            return struct.pack("<BBBBI", tag, INVALID_SESSION, 0, 0, session.console_id)
        console_id, named = struct.pack("<I", session.console_id), self._named(session)
        proof = mac(self._key(session), session.bmc_random, console_id, named)
        if payload[8:28] != proof or self._refuses_proof:
            del self.rows[session_id]
            self.counts.refused_logins += 1
            return struct.pack("<BBBBI", tag, WRONG_CODE, 0, 0, session.console_id)
        session_key = mac(self._key(session), session.console_random, session.bmc_random, named)
        session.keys = keys_of(session_key)
        self.counts.active += 1
        code = mac(session_key, session.console_random, struct.pack("<I", session_id), GUID)
        return struct.pack("<BBBB", tag, 0, 0, 0) + console_id + code[:CODE_BYTES]

    def _named(self, session: Session) -> bytes:
        return bytes([session.role, len(session.user)]) + session.user

    def _password_of(self, session: Session) -> str | None:
        """Return the password of the user who logs in, None when there is no such user."""
        if session.user == self._user:
            return self._password()
        return None if session.user else self._nobodys_password

    def _key(self, session: Session) -> bytes:
        return (self._password_of(session) or "").encode()
