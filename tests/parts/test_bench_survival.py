"""What `script/bench survival` counts: when a deployment goes on, and what 99 of 100 are within."""

from datetime import UTC, datetime, timedelta

import pytest

from script.bench_parts.figures import Result
from script.bench_parts.survival import add_resume, add_takeover
from script.bench_parts.survival_resume import (
    LAST_WORDS_S,
    Kill,
    Resumed,
    as_monotonic,
    how_it_failed,
    p99,
    resumed_after,
)
from script.bench_parts.survival_service import ALL
from script.bench_parts.survival_takeover import Takeovers
from tests.parts.busy_machine import in_one_of


@pytest.mark.parametrize(
    ("moments", "found"),
    [
        ([9.0, 14.5, 13.0, 20.0], 1.0),  # the first after the restart, in whatever order
        ([9.0, 11.0, 14.0], None),  # it went on while the process was away
        ([9.0], None),  # it never did
        ([10.0 + LAST_WORDS_S / 2, 13.5], 1.5),  # what the dead had still sent does not count
    ],
)
def test_a_deployment_goes_on_with_the_first_thing_after_the_restart(
    moments: list[float], found: float | None
) -> None:
    assert resumed_after(moments, killed_at=10.0, restarted_at=12.0) == found


def test_the_slowest_one_of_a_hundred_is_left_out_and_none_of_fewer() -> None:
    assert p99([float(number) for number in range(100)]) == 98.0
    assert p99([3.0, 1.0, 2.0]) == 3.0
    assert p99([float(number) for number in range(1000)]) == 989.0


def test_a_moment_of_the_service_is_compared_by_the_steady_clock() -> None:
    now = datetime.now(UTC)

    def attempt() -> None:
        later = as_monotonic((now + timedelta(seconds=7)).isoformat())
        assert later - as_monotonic(now.isoformat()) == pytest.approx(7.0, abs=0.05)

    in_one_of(attempt)  # two clocks are looked at, one after the other


def test_what_did_not_end_well_and_what_was_tried_again_is_told() -> None:
    found = Resumed(seed=1, bare_s=[1.0], round_s=[4.0])
    found.kills = [
        Kill(ALL, 0, 20, 19, 1, resumed_s=[2.0, 3.0], failures=["r1n1: failed, refused"]),
        Kill("prov-agent", open_=5, proven=5, resumed_s=[0.5]),
    ]
    result = Result("reference")
    add_resume(result, found)
    assert result.figures["resumed_share"] == 0.96
    assert result.figures["resumed_again"] == 1
    assert result.figures["resume_p99_s"] == 3.0
    assert result.figures["kills"] == {ALL: 1, "prov-agent": 1}
    assert [list(row.reference) for row in result.rows] == [[1.0], []]
    assert result.notes[-1] == "r1n1: failed, refused"


def test_each_attempt_of_a_chain_that_failed_says_how() -> None:
    first = {
        "host": "r1n1",
        "phase": "failed",
        "error": {"code": "no_ticket", "message": "it did not come", "found": None},
        "follow_up": {"what": "attempt", "why": "1 of 2 attempts"},
    }
    second = first | {"error": {"code": "device", "message": "no answer"}, "follow_up": None}
    assert how_it_failed([second, first]) == (
        "r1n1: failed, no_ticket, it did not come, attempt, 1 of 2 attempts; "
        "then failed, device, no answer"
    )
    assert not how_it_failed([second | {"phase": "succeeded"}, first])


def test_a_takeover_ends_when_the_other_speaks_to_the_bmc() -> None:
    taken = Takeovers(1, taken_s=[1.0], performed_s=[1.5], noticed_s=[0.1], open_=2, proven=2)
    result = Result("reference")
    add_takeover(result, taken)
    assert result.figures["takeover_p99_s"] == 1.5
    assert result.figures["takeover_share"] == 1.0
    assert result.rows[1].cells()[-1] == "0.06", "beside the lease"
