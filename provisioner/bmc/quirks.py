"""What BMCs do that the standard does not say: as data, with a date and the test that shows it.

A quirk that needs other behaviour is answered by a rung of the boot ladder or a setting of the
host, never by asking here which vendor it is.
"""

from dataclasses import dataclass
from datetime import date
from typing import Final


@dataclass(frozen=True)
class Quirk:
    """`seen_on` is when it was last measured; `test` is the function that shows it."""

    name: str
    vendor: str
    model: str
    seen_on: date
    note: str
    test: str


QUIRKS: Final = (
    Quirk(
        name="boot flags are never marked valid",
        vendor="OpenIPMI",
        model="ipmi_sim 2.0.33",
        seen_on=date(2026, 11, 23),
        note="Reading the flags back proves nothing; judge by how the host was started.",
        test="test_next_boot_reaches_the_bmc_and_is_read_back",
    ),
    Quirk(
        name="a power command is run twice when it takes long",
        vendor="OpenIPMI",
        model="ipmi_sim 2.0.33",
        seen_on=date(2026, 11, 23),
        note="It starts a program for each and forgets that it did; we repeat only after 4 s.",
        test="test_a_slow_power_command_is_sent_once",
    ),
)
