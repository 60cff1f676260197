"""Every lie of a BMC that we know of, what we expect to come of it, and why: one table.

docs/bmc.md lists the same lines, and a test holds the two together.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from .faults import Command, Faults, Traits
from .packets import RAKP_1

# Longer than the longest exchange of the tests, as 30 s are longer than the 20 s of a site.
REAL_SLOW_SECONDS: Final = 2.0
ORDINARY: Final = Traits()
SLOW_POST: Final = Traits(post_seconds=90)
QUICK: Final = Traits(post_seconds=0, shutdown_seconds=0)
ALWAYS: Final = 10**6


class Ends(StrEnum):
    """What a deployment comes to."""

    REBUILT = "rebuilt"
    UNTOUCHED = "failed, disk untouched"
    DIRTY = "failed, disk dirty"


@dataclass(frozen=True)
class Lie:
    """`name` goes on from "a BMC that"; `what_we_do` is for people. `rung` is the last one
    that was taken, from 0; `code` that of the error."""

    name: str
    what_we_do: str
    faults: Faults
    ends: Ends
    rung: int = 0
    code: str | None = None
    traits: Traits = ORDINARY
    is_on_after: bool = True
    is_shut_down_softly: bool = True


LIES: Final = (
    # --- boot flags --------------------------------------------------------------------------
    Lie(
        "agrees to a boot device and forgets it",
        "no ticket comes back, so each rung is tried; then the deployment fails",
        Faults(forgets_flags=True),
        Ends.UNTOUCHED,
        rung=2,
        code="netbooting_timed_out",
    ),
    Lie(
        "clears the boot flags after 60 seconds, before the host is through its POST",
        "the second rung holds the timer off",
        Faults(),
        Ends.REBUILT,
        rung=1,
        traits=SLOW_POST,
    ),
    Lie(
        "clears them after 60 seconds although the timer is held off",
        "the third rung sets them persistently",
        Faults(obeys_hold=False),
        Ends.REBUILT,
        rung=2,
        traits=SLOW_POST,
    ),
    Lie(
        "refuses to hold the timer off",
        "the flags are set without it, and the third rung sets them persistently",
        Faults(refused={Command.HOLD_TIMER: 0x80}),
        Ends.REBUILT,
        rung=2,
        traits=SLOW_POST,
    ),
    Lie(
        "treats once as persistent",
        "a host without a ticket is told to boot its disk, and the flags are set to disk",
        Faults(keeps_once=True),
        Ends.REBUILT,
        traits=QUICK,
    ),
    Lie(
        "ignores the boot flags until the second restart",
        "the next rung restarts the host",
        Faults(is_one_start_late=True),
        Ends.REBUILT,
        rung=1,
    ),
    Lie(
        "needs the EFI bit, of a host whose firmware nobody knows",
        "the second rung sets it; it is set from the first where the firmware is known",
        Faults(needs_efi_bit=True),
        Ends.REBUILT,
        rung=1,
        traits=Traits(is_uefi=True),
    ),
    # --- power -------------------------------------------------------------------------------
    Lie(
        "says off while its host is on",
        "the host is never seen to come on, so the deployment fails",
        Faults(reading="always off"),
        Ends.UNTOUCHED,
        code="bmc_disobeyed",
    ),
    Lie(
        "says off as soon as it agreed, while the host shuts down for another minute",
        "no ticket comes back, and the next rung cuts the power whatever is said of it",
        Faults(reading="as told"),
        Ends.REBUILT,
        rung=1,
        traits=Traits(shutdown_seconds=60),
    ),
    Lie(
        "says on once and then off, while the host ignores the button",
        "the same",
        Faults(reading="on, then off"),
        Ends.REBUILT,
        rung=1,
        traits=Traits(ignores_button=True),
    ),
    Lie(
        "says on while its host is off",
        "off cannot be proven, so the deployment fails; the host is told to be on all the same",
        Faults(reading="always on"),
        Ends.UNTOUCHED,
        code="bmc_disobeyed",
    ),
    Lie(
        "says off twice and then on, while the host is off",
        "the host is told to be on, whatever is said of it",
        Faults(reading="off, then on"),
        Ends.REBUILT,
        traits=QUICK,
    ),
    Lie(
        "says on and off by turns",
        "off is believed when it is said twice in a row, so the deployment fails",
        Faults(reading="every other"),
        Ends.UNTOUCHED,
        code="bmc_disobeyed",
    ),
    Lie(
        "says twice the one and twice the other",
        "what passes for off is found out by the ticket that does not come back",
        Faults(reading="two and two"),
        Ends.REBUILT,
        rung=1,
    ),
    Lie(
        "agrees to switch off and does not",
        "it reads on, so the deployment fails",
        Faults(not_done=frozenset({Command.OFF, Command.SOFT_OFF})),
        Ends.UNTOUCHED,
        code="bmc_disobeyed",
    ),
    Lie(
        "agrees to switch on and does not",
        "it reads off, so the deployment fails, and the host stays off; the error says so",
        Faults(not_done=frozenset({Command.ON})),
        Ends.UNTOUCHED,
        code="bmc_disobeyed",
        is_on_after=False,
    ),
    Lie(
        "does every power command twice",
        "nothing: each is a wish, and may come true twice",
        Faults(again_after=dict.fromkeys((Command.ON, Command.OFF, Command.SOFT_OFF), 0.5)),
        Ends.REBUILT,
    ),
    Lie(
        "cuts the power once more while the agent writes",
        "the agent falls silent, the deployment fails, and the disk counts as dirty",
        Faults(again_after={Command.OFF: 60.0}),
        Ends.DIRTY,
        code="writing_timed_out",
        is_on_after=False,
        is_shut_down_softly=False,
    ),
    # --- answers -----------------------------------------------------------------------------
    Lie(
        "is silent",
        "it is asked three times, and the deployment fails",
        Faults(answers=lambda _, __: False),
        Ends.UNTOUCHED,
        code="bmc_unreachable",
    ),
    Lie(
        "is slow (30 s)",
        "each exchange ends at its deadline, and the deployment fails",
        Faults(real_delay=REAL_SLOW_SECONDS),
        Ends.UNTOUCHED,
        code="bmc_unreachable",
    ),
    Lie(
        "falls silent for two minutes when its host was told to switch off",
        "looking goes on, and the deployment with it",
        Faults(answers=lambda _, age: not 2 < age < 120),
        Ends.REBUILT,
    ),
    Lie(
        "falls silent for five minutes then",
        "the deployment fails, and the host is switched on again once it answers",
        Faults(answers=lambda _, age: not 2 < age < 290),
        Ends.UNTOUCHED,
        code="bmc_unreachable",
    ),
    Lie(
        "answers two of three exchanges",
        "looking goes on; an exchange is tried three times",
        Faults(answers=lambda exchange, _: exchange % 3 != 0),
        Ends.REBUILT,
    ),
    Lie(
        "switches off and does not answer",
        "its silence is no evidence, either: the power is read",
        Faults(not_answered={Command.OFF: ALWAYS, Command.SOFT_OFF: ALWAYS}),
        Ends.REBUILT,
    ),
    Lie(
        "switches on and does not answer",
        "the same",
        Faults(not_answered={Command.ON: ALWAYS}),
        Ends.REBUILT,
    ),
    Lie(
        "answers nothing but logins",
        "the deployment fails, and its sessions are closed",
        Faults(not_answered=dict.fromkeys(Command, ALWAYS)),
        Ends.UNTOUCHED,
        code="bmc_unreachable",
    ),
    Lie(
        "cuts its answers short",
        "the exchange breaks off, and the deployment fails",
        Faults(mangling="truncated"),
        Ends.UNTOUCHED,
        code="bmc_unreachable",
    ),
    Lie(
        "signs answers that lack what belongs in them",
        "the same",
        Faults(short_answers=True),
        Ends.UNTOUCHED,
        code="bmc_unreachable",
    ),
    Lie(
        "answers with random bytes",
        "they are dropped, and the deployment fails",
        Faults(mangling="random bytes of RMCP+"),
        Ends.UNTOUCHED,
        code="bmc_unreachable",
    ),
    Lie(
        "repeats older answers",
        "the numbers in them give them away",
        Faults(mangling="after an older one"),
        Ends.REBUILT,
    ),
    # --- logins ------------------------------------------------------------------------------
    Lie(
        "has another password once its host was switched off",
        "it is used once, and the deployment fails; the host stays off, and the error says so",
        Faults(password_changes_after=Command.SOFT_OFF),
        Ends.UNTOUCHED,
        code="bmc_auth_failed",
        is_on_after=False,
    ),
    Lie(
        "has another password once its host was switched on",
        "it is used once, and the deployment fails; the host boots its disk",
        Faults(password_changes_after=Command.ON),
        Ends.UNTOUCHED,
        code="bmc_auth_failed",
    ),
    Lie(
        "has no session free, for a minute",
        "it is waited for",
        Faults(slots=4, taken_slots=4),
        Ends.REBUILT,
    ),
    Lie(
        "has no session free, ever",
        "it is waited for, for three minutes, and the deployment fails",
        Faults(slots=4, taken_slots=4, session_seconds=1e9),
        Ends.UNTOUCHED,
        code="bmc_busy",
    ),
    Lie(
        "keeps the sessions that were closed",
        "whenever its table is full, it is waited for until they have timed out",
        Faults(slots=6, ignores_logout=True),
        Ends.REBUILT,
    ),
    Lie(
        "breaks off every login half way",
        "an exchange takes two of its sessions at most; the deployment fails",
        Faults(not_answered_login=frozenset({RAKP_1})),
        Ends.UNTOUCHED,
        code="bmc_unreachable",
    ),
)


def table() -> str:
    """Return the lies as they stand in docs/bmc.md."""
    rows = [
        f"| {lie.name} | {lie.what_we_do} | {lie.ends}{'' if lie.is_on_after else ', host off'} |"
        for lie in LIES
    ]
    return "\n".join(["| a BMC that … | what we do | the deployment |", "|---|---|---|", *rows])
