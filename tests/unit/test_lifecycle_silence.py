"""What is kept of what was said last: by an agent in its ramdisk, and by a BMC."""

from dataclasses import replace
from datetime import datetime, timedelta

import pytest

from provisioner.core.lifecycle import BMC_LOGIN_REFUSED_AT, IN_RAMDISK_FOR, E, advance
from provisioner.core.model import Kind, Operation, Phase
from tests.unit.examples import GENERATION, HOST, LIMITS, NOW, operation_in


@pytest.mark.parametrize("silence", [timedelta(minutes=3), timedelta(seconds=1)])
def test_an_agent_that_was_ended_for_its_silence_is_not_taken_to_be_in_the_ramdisk(
    silence: timedelta,
) -> None:
    """Whatever limit a site sets: it may have said its last word, and gone home."""
    limits = replace(LIMITS, agent_silence=silence)
    before = operation_in(Phase.NETBOOTING, Kind.VERIFICATION)
    assert not limits.is_in_ramdisk(before, NOW)

    def at(now: datetime, operation: Operation, event: E) -> Operation:
        moved = advance(operation, HOST, event, now=now, generation=GENERATION, limits=limits)
        return moved.operation

    seen = at(NOW, before, E.AGENT_SEEN)
    said = at(NOW + silence / 2, seen, E.REPORTED)
    assert limits.is_in_ramdisk(said, NOW + silence / 2)
    assert said.deadline_at is not None
    ended = at(said.deadline_at, said, E.TIMED_OUT)
    assert not limits.is_in_ramdisk(ended, said.deadline_at)
    gave_up = at(said.deadline_at, said, E.AGENT_FAILED)
    assert limits.is_in_ramdisk(gave_up, said.deadline_at)
    assert not limits.is_in_ramdisk(gave_up, said.deadline_at + IN_RAMDISK_FOR + silence)


@pytest.mark.parametrize("phase", [Phase.NETBOOTING, Phase.BOOTING, Phase.PROVING])
def test_a_refused_login_is_kept_whatever_becomes_of_the_operation(phase: Phase) -> None:
    def after(operation: Operation, event: E) -> Operation:
        step = advance(operation, HOST, event, now=NOW, generation=GENERATION, limits=LIMITS)
        return step.operation

    refused = after(operation_in(phase), E.BMC_LOGIN_REFUSED)
    assert refused.evidence[BMC_LOGIN_REFUSED_AT] == NOW.isoformat()
    if not refused.is_final:
        assert BMC_LOGIN_REFUSED_AT in after(refused, E.TIMED_OUT).evidence
