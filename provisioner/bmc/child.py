"""The BMC worker: a small program of its own that speaks IPMI, one exchange at a time.

Started by path with `python -I`, so it imports only the standard library and pyghmi and knows
nothing of the service. Requests and answers are JSON lines on stdin and stdout. It keeps no
session, retries nothing of its own accord and offers a closed list of verbs.
"""

import contextlib
import ctypes
import json
import math
import os
import secrets
import select
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, Final

from pyghmi.exceptions import IpmiException
from pyghmi.ipmi.private import session as library

# IPMI v2.0 Appendix G: operator is enough for every verb here. Naming the level also stops
# pyghmi from logging in a second time with a lower one when a BMC refuses the first.
OPERATOR: Final = 3

CHASSIS: Final = 0x00
GET_CHASSIS_STATUS, CHASSIS_CONTROL, SET_BOOT_OPTIONS = 0x01, 0x02, 0x08
POWER_OFF, POWER_ON, HARD_RESET, SOFT_OFF = 0x00, 0x01, 0x03, 0x05
BOOT_FLAG_VALID_CLEARING, BOOT_FLAGS = 0x03, 0x05
# "Do not clear the valid bit when no chassis command came within 60 seconds."
HOLD_60_SECOND_TIMER: Final = 0x08
VALID, PERSISTENT, EFI = 0x80, 0x40, 0x20
DEVICES: Final = {"network": 0x04, "disk": 0x08}
NOT_IN_PRESENT_STATE: Final = 0xD5

# pyghmi sends an unanswered command again after 0.5 to 1 s, and a BMC that starts a program
# for it may then do it twice. Power control gets this long before it is repeated.
CONTROL_REPLY_SECONDS: Final = 4.0
# A reset is no wish that may be repeated: the second one hits what the first one started.
# Longer than any exchange, so that it is sent once.
RESET_REPLY_SECONDS: Final = 600.0
# RAKP message 4 with this status: the BMC did not take our proof of the password.
PROOF_REFUSED: Final = 0x0F
LOGGED_IN: Final = "ESTABLISHED"

# Longer than any exchange; the service names a moment that is sooner.
LONGEST_SECONDS: Final = 600.0

PR_SET_PDEATHSIG: Final = 1
REQUEST_BYTES_MAX: Final = 4096


class OutOfTime(BaseException):
    """The exchange has lasted too long. Not an Exception: pyghmi swallows some of those."""


class Refused(Exception):
    """The BMC answered with a completion code other than success."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


def ask(bmc: Any, command: int, data: tuple[int, ...] = (), seconds: float | None = None) -> bytes:
    """Send one chassis command and return the data of its answer.

    Raises Refused with pyghmi's text: pyghmi *returns* a BMC's refusal as a dictionary.
    """
    answer = bmc.raw_command(netfn=CHASSIS, command=command, data=data, timeout=seconds)
    if "error" in answer:
        raise Refused(str(answer["error"]), int(answer.get("code", 0xFFFF)))
    return bytes(answer["data"])


def power(bmc: Any) -> str:
    return "on" if ask(bmc, GET_CHASSIS_STATUS)[0] & 1 else "off"


def _make_power(bmc: Any, control: int, wanted: str) -> None:
    """Send a power command; a BMC that refuses because it is so already has obeyed."""
    try:
        ask(bmc, CHASSIS_CONTROL, (control,), CONTROL_REPLY_SECONDS)
    except Refused as refused:
        if refused.code != NOT_IN_PRESENT_STATE or power(bmc) != wanted:
            raise


def power_on(bmc: Any) -> None:
    _make_power(bmc, POWER_ON, "on")


def power_off(bmc: Any, *, soft: bool) -> None:
    _make_power(bmc, SOFT_OFF if soft else POWER_OFF, "off")


def reset(bmc: Any) -> None:
    ask(bmc, CHASSIS_CONTROL, (HARD_RESET,), RESET_REPLY_SECONDS)


def set_next_boot(bmc: Any, *, device: str, persistent: bool, uefi: bool, hold_timer: bool) -> None:
    """Write the boot flags, as IPMI v2.0 §28.12 and §28.13 (parameters 3 and 5) have them.

    pyghmi's own `set_bootdev` always holds the timer; some BMCs refuse that parameter, so it
    is a rung of its own here. Such a BMC is told the flags without: the rungs after it are
    for it, too.
    """
    if hold_timer:
        with contextlib.suppress(Refused):
            ask(bmc, SET_BOOT_OPTIONS, (BOOT_FLAG_VALID_CLEARING, HOLD_60_SECOND_TIMER))
    flags = VALID | (PERSISTENT if persistent else 0) | (EFI if uefi else 0)
    ask(bmc, SET_BOOT_OPTIONS, (BOOT_FLAGS, flags, DEVICES[device], 0, 0, 0))


VERBS: Final[dict[str, Callable[..., str | None]]] = {
    "power": power,
    "power_on": power_on,
    "power_off": power_off,
    "reset": reset,
    "set_next_boot": set_next_boot,
}


class Deadline:
    """When the exchange has lasted too long. One per process; far away until it is set."""

    def __init__(self) -> None:
        self._at = math.inf

    def set(self, seconds: float) -> None:
        self._at = time.monotonic() + seconds

    def check(self) -> float:
        """Return the seconds left. Raises OutOfTime when there are none."""
        left = self._at - time.monotonic()
        if left <= 0:
            raise OutOfTime
        return left


def work_without_thread(deadline: Deadline) -> None:
    """Let pyghmi wait for packets in the calling thread instead of in one of its own.

    Its thread misses a packet that arrives just before a waiter is noted down, and then
    sleeps until the packet would be sent again: of 300 power reads on loopback 42 took 0.5 to
    1 s longer so, and none this way. A process here has one session, so nothing is shared.
    Waits no longer than until the deadline. Does nothing when a later pyghmi has other inner
    names; it is then slower, and killed where it would have ended by itself.
    """
    if not all(
        hasattr(library, name)
        for name in ("_io_wait", "_io_graball", "iosockets", "iothread", "iothreadready")
    ):
        return

    def wait(timeout: float, _address: object = None, _waiters: object = None) -> None:
        select.select(library.iosockets, (), (), max(0.0, min(timeout, deadline.check())))
        library._io_graball(library.iosockets, {})

    library._io_wait = wait
    library.iothread = library.iothreadready = True


def log_in_sparingly() -> None:
    """Keep pyghmi from taking session after session of a BMC, and from guessing passwords.

    For a command without an answer it logs in anew, sends it again there, and leaves the
    first session open. With a BMC that answers half a login it begins anew without end: 27
    sessions in 20 s. A refused proof of the password it takes for a lost packet, and tries
    again. Here: one login, a second one if the first got stuck, and none after a command.
    Does nothing when a later pyghmi has other inner names.
    """
    names = ("_relog", "_got_rakp4", "_mark_broken")
    if not all(hasattr(library.Session, name) for name in names):
        return
    log_in_again, got_rakp_4 = library.Session._relog, library.Session._got_rakp4

    def at_most_once(bmc: Any) -> None:
        if bmc.sessioncontext == LOGGED_IN or getattr(bmc, "has_begun_anew", False):
            bmc.incommand = False  # or it waits for the answer before it logs out
            bmc._mark_broken("timeout")
        else:
            bmc.has_begun_anew = True
            log_in_again(bmc)
            number_session(bmc)

    def believing_a_refusal(bmc: Any, data: bytes) -> object:
        if data[1] == PROOF_REFUSED:
            bmc.logontries = 0
        return got_rakp_4(bmc, data)

    library.Session._relog = at_most_once
    library.Session._got_rakp4 = believing_a_refusal


def number_session(bmc: Any) -> None:
    """Give our end of the session a number of its own.

    pyghmi counts from the same one in each process, so an answer from an earlier login would
    fit, and read as a wrong password.
    """
    bmc.localsid = 1 + secrets.randbelow(2**31)


def log_out(bmc: Any) -> None:
    """Tell the BMC that the session is over, whatever it still owes us an answer to.

    Sessions left open are what BMCs run out of. No answer is waited for.
    """
    if bmc.sessioncontext != LOGGED_IN:
        return
    bmc.lastpayload, bmc.incommand, bmc.logged = None, False, 1
    with contextlib.suppress(IpmiException):
        bmc.logout()


def exchange(request: dict[str, Any], deadline: Deadline) -> dict[str, str | None]:
    """Log in, do one verb, log out, all in `seconds`; return {"outcome": …, "value" or "text": …}.

    Outcome `done` has the value, `refused` the BMC's words, `failed` pyghmi's words on why
    there was no session, `crashed` the name of an exception that nobody foresaw.
    """
    bmc = None
    try:
        try:
            verb = VERBS[request["verb"]]
            deadline.set(request["seconds"])
            # With a callback it returns at once, so that what it began can be ended here.
            bmc = library.Session(
                bmc=request["address"],
                port=request["port"],
                userid=request["user"],
                password=request["password"],
                privlevel=OPERATOR,
                onlogon=lambda _: None,
            )
            number_session(bmc)
            while bmc.logging:
                deadline.check()
                library.Session.wait_for_rsp()
            if bmc.broken:
                raise IpmiException(bmc.errormsg)
            return {"outcome": "done", "value": verb(bmc, **request["arguments"])}
        finally:
            deadline.set(math.inf)
            if bmc is not None:
                log_out(bmc)
    except OutOfTime:
        return {"outcome": "failed", "text": "timeout"}
    except Refused as error:
        return {"outcome": "refused", "text": str(error)}
    except IpmiException as error:
        return {"outcome": "failed", "text": str(error)}
    except Exception as error:  # noqa: BLE001 - the top of this process
        # Only the name: the text of a stranger may repeat what it was given.
        return {"outcome": "crashed", "text": type(error).__name__}


def exchange_in_child(line: bytes, deadline: Deadline) -> bytes:
    """Do one exchange in a forked child and return its answer as a line.

    pyghmi's state does not survive a second session to the same BMC, and a fork is as fresh
    as a new process at a tenth of the price. Ends this program when the service is gone.
    """
    read_end, write_end = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        _be_the_child(line, deadline, write_end, parent)
    os.close(write_end)
    answer = _read_while_service_lives(read_end, child)
    os.close(read_end)
    os.waitpid(child, 0)
    if not answer.endswith(b"\n"):
        answer = b'{"outcome": "crashed", "text": "no answer"}\n'
    return answer


def _be_the_child(line: bytes, deadline: Deadline, write_end: int, parent: int) -> None:
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        request = json.loads(line)
        # Who names no moments is not the service, and asks for an exchange without any.
        now = _boot_time()
        is_late = now > request.get("begin_by", now)
        lives = os.getppid() == parent  # else it died before the first line took effect
        if lives and not is_late and _ends_at(request.get("until", now + LONGEST_SECONDS)):
            os.write(write_end, json.dumps(exchange(request, deadline)).encode() + b"\n")
    finally:
        os._exit(0)


def _ends_at(until: float) -> bool:
    """Have the kernel end this process at `until` of `_boot_time`; False when that is past.

    The service ends an exchange that takes too long, but not while it is stopped itself. A
    command that waited in a frozen process would reach a host whose deployment went on.
    """
    left = until - _boot_time()
    if left > 0:
        signal.setitimer(signal.ITIMER_REAL, left)
    return left > 0


def _boot_time() -> float:
    """Return the time on the service's clock, provisioner/boot_time.py; not to be imported here."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _read_while_service_lives(read_end: int, child: int) -> bytes:
    watch = select.poll()
    watch.register(read_end, select.POLLIN)
    watch.register(0, 0)  # asks for nothing, and so reports only that the other end closed
    answer = b""
    while True:
        ready = dict(watch.poll())
        if 0 in ready:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            sys.exit(0)
        piece = os.read(read_end, REQUEST_BYTES_MAX)
        if not piece:
            return answer
        answer += piece


def main() -> None:
    """Answer requests until stdin closes, which it does however the service ends."""
    # systemd signals a whole unit at once; the service finishes its exchange first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # pyghmi prints now and then; stdout must carry answers and nothing else.
    answers = os.dup(1)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    deadline = Deadline()
    work_without_thread(deadline)
    log_in_sparingly()
    os.write(answers, b'{"outcome": "ready"}\n')
    waiting = b""
    while True:
        while b"\n" not in waiting:
            piece = os.read(0, REQUEST_BYTES_MAX)
            if not piece or len(waiting) > REQUEST_BYTES_MAX:
                return
            waiting += piece
        line, _, waiting = waiting.partition(b"\n")
        os.write(answers, exchange_in_child(line, deadline))


if __name__ == "__main__":
    main()
