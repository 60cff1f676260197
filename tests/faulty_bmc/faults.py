"""What can be wrong with a BMC, as data: a `Faults` value says all of it.

Values compose: whatever differs from the truthful default is a fault. Nothing acts here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from random import Random
from typing import Final

from .packets import CODE_BYTES, RMCP

# IPMI v2.0 §28.13: the flags are void this long after the last chassis command.
FLAG_SECONDS: Final = 60.0
# §6.12.15: a session without a word ends after this long.
SESSION_SECONDS: Final = 60.0


class Command(StrEnum):
    """What a BMC is asked to do. Login and logout are not among them."""

    STATUS = "status"
    ON = "on"
    OFF = "off"
    SOFT_OFF = "soft off"
    RESET = "reset"
    HOLD_TIMER = "hold timer"
    SET_FLAGS = "set flags"


POWER: Final = frozenset({Command.ON, Command.OFF, Command.SOFT_OFF, Command.RESET})

# How a BMC reads its host's power: (is it on, was it told to be off last, which read since
# it was told anything) -> "on".
Reading = Callable[[bool, bool, int], bool]
# What becomes of a reply: (reply, earlier replies, chance) -> the datagrams that are sent.
Mangling = Callable[[bytes, list[bytes], Random], list[bytes]]


def tell_truth(is_on: bool, told_off: bool, count: int) -> bool:  # noqa: ARG001 # a Reading
    return is_on


READINGS: Final[Mapping[str, Reading]] = {
    "truth": tell_truth,
    "always off": lambda is_on, told_off, count: False,  # noqa: ARG005 # a Reading
    "always on": lambda is_on, told_off, count: True,  # noqa: ARG005 # a Reading
    # It believes what it was told, and never looks.
    "as told": lambda is_on, told_off, count: is_on and not told_off,  # noqa: ARG005 # a Reading
    # It says what it was told, once.
    "on, then off": lambda is_on, told_off, count: is_on and not told_off and count == 1,
    # True for long enough to be believed.
    "off, then on": lambda is_on, told_off, count: is_on or (told_off and count > 2),
    "every other": lambda is_on, told_off, count: bool(count % 2),  # noqa: ARG005 # a Reading
    # Two lies in a row, and two truths: enough to pass for evidence.
    "two and two": lambda is_on, told_off, count: is_on ^ (count // 2 % 2 == 0),  # noqa: ARG005 # a Reading
}


def _flip(reply: bytes, place: int, bits: int = 0xFF) -> bytes:
    place %= len(reply)
    return reply[:place] + bytes([reply[place] ^ bits]) + reply[place + 1 :]


MANGLINGS: Final[Mapping[str, Mangling]] = {
    "truncated": lambda reply, _, chance: [reply[: chance.randrange(len(reply))]],
    "cut to the header": lambda reply, _, __: [reply[:16]],
    "too short for a header": lambda reply, _, __: [reply[:5]],
    "empty": lambda _, __, ___: [b""],
    "longer than it says": lambda reply, _, chance: [reply + chance.randbytes(900)],
    # Bytes 14 and 15 are the length of an RMCP+ payload, 13 that of an older one.
    "wrong length": lambda reply, _, chance: [_flip(_flip(reply, 14), 13, chance.randrange(256))],
    "wrong code": lambda reply, _, chance: [_flip(reply, -1 - chance.randrange(CODE_BYTES))],
    "wrong session": lambda reply, _, chance: [_flip(reply, 6 + chance.randrange(4))],
    "random bytes": lambda reply, _, chance: [chance.randbytes(len(reply))],
    "random bytes of IPMI": lambda _, __, chance: [RMCP + chance.randbytes(chance.randrange(200))],
    "random bytes of RMCP+": lambda reply, _, chance: [
        reply[:16] + chance.randbytes(len(reply) - 16)
    ],
    "one bit wrong": lambda reply, _, chance: [
        _flip(reply, chance.randrange(len(reply)), 1 << chance.randrange(8))
    ],
    "replayed": lambda _, earlier, chance: [chance.choice(earlier)],
    "twice": lambda reply, _, __: [reply, reply],
    "after an older one": lambda reply, earlier, chance: [chance.choice(earlier), reply],
    "after random bytes": lambda reply, _, chance: [chance.randbytes(40), reply],
}

# After these an answer comes all the same.
HARMLESS: Final = frozenset({"twice", "after an older one", "after random bytes"})


def always(_exchange: int, _age: float) -> bool:
    return True


@dataclass(frozen=True)
class Faults:
    """One BMC's faults; the default has none. Seconds are the host's, unless they are `real`."""

    # Boot flags.
    forgets_flags: bool = False  # agrees, and stores nothing
    flag_seconds: float = FLAG_SECONDS
    obeys_hold: bool = True  # False: agrees, and clears the flags all the same
    refused: Mapping[Command, int] = field(default_factory=dict)  # with a completion code
    keeps_once: bool = False  # treats once as persistent
    is_one_start_late: bool = False  # what was set before the previous start counts
    needs_efi_bit: bool = False

    # Power.
    reading: str = "truth"
    not_done: frozenset[Command] = frozenset()  # agrees, and does nothing
    again_after: Mapping[Command, float] = field(default_factory=dict)  # done a second time
    lies_until: float | None = None  # seconds after its start; from then on it tells the truth

    # Answers.
    # By number of the exchange, and seconds since the BMC was started.
    answers: Callable[[int, float], bool] = always
    not_answered_login: frozenset[int] = frozenset()  # by payload type
    real_delay: float = 0.0  # before each packet
    real_command_delay: float = 0.0  # before the answer to a command that was done at once
    not_answered: Mapping[Command, int] = field(default_factory=dict)  # done; how often
    mangling: str | None = None
    short_answers: bool = False  # well signed, and without the data that belongs there

    # Sessions.
    slots: int = 16
    session_seconds: float = SESSION_SECONDS
    ignores_logout: bool = False
    refuses_proof: bool = False  # of the password, although it is the right one
    takes_suite_0: bool = False  # any password will do
    nobodys_password: str | None = None  # of a user with an empty name, if there is one
    taken_slots: int = 0  # by others, who forgot to log out, at its start
    password_changes_after: Command | None = None

    @property
    def always_answers(self) -> bool:
        """Whether each packet that comes in is answered at once, and well."""
        is_well_said = self.mangling in (None, *HARMLESS) and not self.short_answers
        is_at_once = not (self.real_delay or self.real_command_delay)
        leaves_out = self.not_answered or self.not_answered_login or self.answers is not always
        return is_well_said and is_at_once and not leaves_out


@dataclass(frozen=True)
class Traits:
    """What the host behind a BMC is like; none of it is a fault."""

    post_seconds: float = 20.0
    shutdown_seconds: float = 5.0
    ignores_button: bool = False
    is_uefi: bool = False
    is_on: bool = True
