"""What follows a failure: every kind of failure in every situation, and every chain to its end."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from itertools import product
from typing import Any

import pytest

from provisioner.core.lifecycle import BMC_LOGIN_REFUSED_AT
from provisioner.core.model import (
    FINAL,
    Firmware,
    Host,
    HostState,
    Kind,
    Operation,
    OperationId,
    Phase,
    ReleaseRow,
)
from provisioner.core.recovery import (
    A_PERSONS,
    ATTEMPTS_LIMIT,
    FAILURES,
    Cause,
    Chain,
    Facts,
    FollowUp,
    Next,
    Policy,
    chain_of,
    failure_of,
    follow_up,
    is_release_blamed,
)
from tests.unit.examples import HOST, NOW, RELEASE, operation_in

GOOD = "cd" * 32
POLICY = Policy()


def row(digest: str, version: str, **changes: object) -> ReleaseRow:
    known = ReleaseRow(digest, "web", version, 3, 2, 1, ("uefi",), "id", NOW)
    return replace(known, **changes)  # type: ignore[arg-type] # fields by name


NEWER, OLDER = row(RELEASE, "2"), row(GOOD, "1")

ACTIVE = replace(HOST, state=HostState.ACTIVE, release=GOOD, last_good=GOOD)
WRITTEN = replace(HOST, state=HostState.DIRTY, release=None, last_good=GOOD)
NEW = replace(HOST, state=HostState.DIRTY, release=None, last_good=None)
SAME = replace(WRITTEN, last_good=RELEASE)

# A situation: the host, and whether its disk was written.
SITUATIONS = {
    "untouched": (ACTIVE, False),
    "untouched, never deployed": (NEW, False),
    "written": (WRITTEN, True),
    "written, nothing to go back to": (NEW, True),
    "written, its last good release": (SAME, True),
}
# What follows in each, when no attempt is left or none is allowed.
RETRY, BACK, QUARANTINE = Next.RETRY, Next.ROLLBACK, Next.QUARANTINE
LAST = (None, None, BACK, QUARANTINE, QUARANTINE)
HANDS_OFF = (None, None, QUARANTINE, QUARANTINE, QUARANTINE)
NEVER = (None,) * 5
ALWAYS_AGAIN = (RETRY,) * 5

PASSING = [
    *("device", "bmc_unreachable", "bmc_rejected", "unavailable", "agent_broken", "bug", ""),
    *("service_unreachable", "service_refused", "permission_refused", "permission_expired"),
    *("chunk_unavailable", "disk_failed", "read_back_mismatch", "seed_gone", "boot_arguments"),
    *(f"{phase}_timed_out" for phase in Phase if phase not in FINAL),
]
UNTRUSTED = [
    *("trust", "manifest_signature", "manifest_digest", "manifest_malformed", "chunk_corrupt"),
    *("release_expired", "release_too_old", "release_untested", "release_revoked"),
    "wrong_system",
]
SAME_AGAIN = [
    *("host_unfit", "disk_too_small", "image_unfit", "seed_unfit"),
    *("no_disk_matches", "several_disks_match", "profile_unreadable"),
]
DOUBTFUL = [
    "ticket_contested",
    "identity_doubtful",
    "own_host",
    "host_refused",
    "wrong_disk",
    "bmc_auth_failed",
]
# By code: what follows with attempts left, and without.
EXPECTED = {
    **dict.fromkeys(PASSING, (ALWAYS_AGAIN, LAST)),
    **dict.fromkeys(UNTRUSTED, (LAST, LAST)),
    **dict.fromkeys(SAME_AGAIN, (LAST, LAST)),
    **dict.fromkeys(DOUBTFUL, (HANDS_OFF, HANDS_OFF)),
    "database_restored": (NEVER, NEVER),
}


def failed(code: str, chain: Chain = Chain(1, 3), **changes: Any) -> Operation:  # noqa: B008 # a frozen value
    """Return a deployment that failed with `code`, at this place of its chain."""
    pins = {**operation_in(Phase.QUEUED).pins, "release_name": "web@2", **chain.pins()}
    error = {"code": code, "message": "it did not work"} if code else None
    known = operation_in(Phase.FAILED, pins=pins, error=error, started_at=NOW)
    return replace(known, **changes)


def facts(host: Host, *, is_written: bool, **changes: object) -> Facts:
    good = {GOOD: OLDER, RELEASE: NEWER}.get(host.last_good or "")
    known = Facts(is_disk_written=is_written, release=NEWER, last_good=good)
    return replace(known, **changes)  # type: ignore[arg-type] # fields by name


def decide(
    operation: Operation,
    host: Host = WRITTEN,
    policy: Policy = POLICY,
    *,
    is_written: bool = True,
    **changes: Any,
) -> FollowUp | None:
    return follow_up(operation, host, policy, facts(host, is_written=is_written, **changes), NOW)


def what(decided: FollowUp | None) -> Next | None:
    return decided.what if decided is not None else None


# --- every failure in every situation ---------------------------------------------------------


@pytest.mark.parametrize("code", EXPECTED, ids=lambda code: code or "no code")
@pytest.mark.parametrize("attempt", [1, 2, 3])
def test_every_failure_has_its_follow_up_in_every_situation(code: str, attempt: int) -> None:
    with_more, without = EXPECTED[code]
    expected = dict(zip(SITUATIONS, with_more if attempt < 3 else without, strict=True))
    for name, (host, is_written) in SITUATIONS.items():
        decided = decide(failed(code, Chain(attempt, 3)), host, is_written=is_written)
        assert what(decided) == expected[name], name


def test_every_failure_with_a_rule_of_its_own_is_expected_here() -> None:
    assert set(FAILURES) <= set(EXPECTED)


@pytest.mark.parametrize("code", [code for code in EXPECTED if code not in A_PERSONS])
@pytest.mark.parametrize("attempts_max", [1, 3])
def test_the_way_back_is_taken_once_and_then_comes_quarantine(code: str, attempts_max: int) -> None:
    back = failed(code, Chain(1, attempts_max, Cause.ROLLBACK, OperationId("op_0")), release=GOOD)
    decided = decide(back)
    assert what(decided) is Next.QUARANTINE
    assert decided is not None
    assert decided.at is None
    assert f"going back to web@2 failed in {back.id}" in decided.why
    assert "that was the way back already" in decided.why
    assert "release" not in decided.to_json()


@pytest.mark.parametrize("kind", [Kind.INSPECTION, Kind.VERIFICATION])
@pytest.mark.parametrize("is_written", [True, False])
def test_nothing_follows_what_writes_nothing(kind: Kind, is_written: bool) -> None:
    assert decide(replace(failed("device"), kind=kind), is_written=is_written) is None


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase is not Phase.FAILED])
def test_only_an_end_without_success_is_followed(phase: Phase) -> None:
    decided = decide(replace(failed("device"), phase=phase))
    assert what(decided) is (Next.QUARANTINE if phase is Phase.CANCELLED else None)


@pytest.mark.parametrize("code", EXPECTED)
def test_nothing_follows_where_failures_are_left_to_persons(code: str) -> None:
    assert decide(failed(code), policy=replace(POLICY, is_automatic=False)) is None


@pytest.mark.parametrize(
    "flags",
    [
        {"in_maintenance": True},
        {"is_protected": True},
        {"quarantine_reason": "somebody said so"},
        {"is_confirmed": False},
        {"state": HostState.RETIRED},
    ],
    ids=str,
)
@pytest.mark.parametrize("code", ["device", "wrong_disk", "release_revoked"])
def test_a_host_that_a_person_has_flagged_is_left_alone(
    flags: dict[str, object], code: str
) -> None:
    host = replace(WRITTEN, **flags)  # type: ignore[arg-type] # fields by name
    assert decide(failed(code), host) is None
    assert not is_release_blamed(failed(code), host, None, was_begun=True)


@pytest.mark.parametrize("is_written", [True, False])
def test_a_cancelled_deployment_leaves_no_disk_half(is_written: bool) -> None:
    decided = decide(replace(failed(""), phase=Phase.CANCELLED), is_written=is_written)
    assert what(decided) is (Next.QUARANTINE if is_written else None)


@pytest.mark.parametrize("cause", Cause)
@pytest.mark.parametrize("has_superseded", [True, False])
def test_a_request_that_never_started_leaves_a_host_as_it_was(
    cause: Cause, has_superseded: bool
) -> None:
    """But what follows another one, or took the place of that, ends as that would have."""
    operation = failed("", Chain(1, 3, cause), phase=Phase.CANCELLED, started_at=None)
    decided = decide(operation, has_superseded=has_superseded)
    is_alone = cause is Cause.REQUEST and not has_superseded
    assert what(decided) is (None if is_alone else Next.QUARANTINE)


@pytest.mark.parametrize("code", PASSING)
def test_a_bmc_that_refused_the_login_once_is_not_asked_again(code: str) -> None:
    """Whatever the operation ended with in the end."""
    operation = failed(code, evidence={BMC_LOGIN_REFUSED_AT: NOW.isoformat()})
    assert not failure_of(operation).may_use_bmc
    assert what(decide(operation, ACTIVE, is_written=False)) is None
    assert what(decide(operation)) is Next.QUARANTINE


# --- which release ------------------------------------------------------------------------------

UNDEPLOYABLE = {
    "revoked": {"revoked_at": NOW, "revoked_reason": "it loses data"},
    "removed": {"removed_at": NOW},
    "expired": {"expires_at": NOW},
    "for another firmware": {"firmware": ("bios",)},
}


@pytest.mark.parametrize("changes", UNDEPLOYABLE.values(), ids=UNDEPLOYABLE)
def test_a_release_that_may_not_be_deployed_any_more_is_not_tried_again(
    changes: dict[str, object],
) -> None:
    worse = replace(NEWER, **changes)  # type: ignore[arg-type] # fields by name
    assert what(decide(failed("device"), release=worse)) is Next.ROLLBACK
    assert what(decide(failed("device"), ACTIVE, is_written=False, release=worse)) is None


@pytest.mark.parametrize("changes", UNDEPLOYABLE.values(), ids=UNDEPLOYABLE)
def test_nobody_goes_back_to_a_release_that_may_not_be_deployed(
    changes: dict[str, object],
) -> None:
    worse = replace(OLDER, **changes)  # type: ignore[arg-type] # fields by name
    decided = decide(failed("device", Chain(3, 3)), last_good=worse)
    assert what(decided) is Next.QUARANTINE
    assert decided is not None
    assert "no way back" in decided.why


@pytest.mark.parametrize(
    "changes",
    [
        {"failed_before": {GOOD}},
        {"floors": {"web": "1.5"}},
        {"refused": {GOOD: "nobody signed it"}},
        {"last_good": None},
    ],
    ids=str,
)
def test_a_last_good_release_that_is_no_good_any_more_is_not_gone_back_to(
    changes: dict[str, Any],
) -> None:
    assert what(decide(failed("device", Chain(3, 3)), **changes)) is Next.QUARANTINE


def test_field_09_a_release_known_to_fail_here_is_gone_back_to_by_nobody() -> None:
    """It is tried again only as part of what a person asked for by name."""
    assert what(decide(failed("device"), failed_before={RELEASE})) is Next.RETRY
    assert what(decide(failed("device", Chain(3, 3)), failed_before={GOOD})) is Next.QUARANTINE


@pytest.mark.parametrize(
    ("host", "reason"),
    [(NEW, "no release was proven on this host before"), (SAME, "the last good release itself")],
)
def test_a_host_with_nothing_to_go_back_to_says_so(host: Host, reason: str) -> None:
    decided = decide(failed("", Chain(3, 3)), host)
    assert decided is not None
    assert reason in decided.why
    assert "no reason was given" in decided.why


@pytest.mark.parametrize(
    "changes",
    [
        {"expires_at": NOW + timedelta(seconds=1)},
        {"firmware": ()},
        {"firmware": ("bios", "uefi")},
    ],
    ids=str,
)
def test_a_release_that_may_still_be_deployed_is(changes: dict[str, object]) -> None:
    good = replace(NEWER, **changes)  # type: ignore[arg-type] # fields by name
    assert what(decide(failed("device"), release=good, floors={"web": "2"})) is Next.RETRY
    unknown = replace(WRITTEN, firmware=None)
    assert what(decide(failed("device"), unknown, release=good)) is Next.RETRY


def test_going_back_can_be_switched_off() -> None:
    policy = replace(POLICY, may_roll_back=False)
    assert what(decide(failed("device", Chain(3, 3)), policy=policy)) is Next.QUARANTINE


def test_what_follows_names_release_attempt_and_reason() -> None:
    decided = decide(failed("disk_failed", Chain(2, 3)))
    assert decided is not None
    assert decided.to_json() == {
        "what": "retry",
        "why": "web@2 failed in op_1, attempt 2 of 3 (disk_failed)",
        "release": RELEASE,
        "release_name": "web@2",
        "attempt": 3,
        "attempts_max": 3,
    }
    back = decide(failed("disk_failed", Chain(3, 3)))
    assert back is not None
    assert (back.release, back.at) == (OLDER, NOW)


# --- the memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "attempt", "begun", "not_begun"),
    [
        ("device", 1, False, False),
        ("device", 3, True, False),
        ("netbooting_timed_out", 3, True, False),
        ("permission_refused", 3, True, False),
        ("trust", 1, True, False),
        ("release_expired", 1, True, False),
        ("no_disk_matches", 1, True, False),
        ("seed_unfit", 1, True, False),
        ("chunk_corrupt", 1, True, True),
        ("manifest_signature", 1, True, True),
        ("image_unfit", 1, True, True),
        ("disk_too_small", 1, True, True),
        ("host_unfit", 1, True, True),
        ("wrong_system", 1, True, False),
        ("wrong_disk", 1, True, False),
        ("queued_timed_out", 3, False, False),
        ("release_revoked", 1, False, False),
        ("profile_unreadable", 1, False, False),
        ("bmc_auth_failed", 1, False, False),
        ("ticket_contested", 1, False, False),
        ("host_refused", 3, False, False),
    ],
)
@pytest.mark.parametrize(("host", "is_written"), SITUATIONS.values(), ids=SITUATIONS)
def test_field_09_a_release_is_remembered_when_it_was_tried_for_as_often_as_it_may_be(
    code: str, attempt: int, begun: bool, not_begun: bool, host: Host, is_written: bool
) -> None:
    operation = failed(code, Chain(attempt, 3))
    decided = decide(operation, host, is_written=is_written)
    assert is_release_blamed(operation, host, decided, was_begun=True) == begun
    assert is_release_blamed(operation, host, decided, was_begun=False) == not_begun


@pytest.mark.parametrize("phase", [Phase.CANCELLED, Phase.SUCCEEDED])
def test_nothing_is_remembered_of_what_did_not_fail(phase: Phase) -> None:
    ended = replace(failed("device"), phase=phase)
    assert not is_release_blamed(ended, WRITTEN, None, was_begun=True)
    compared = replace(failed("device"), kind=Kind.VERIFICATION)
    assert not is_release_blamed(compared, WRITTEN, None, was_begun=True)


# --- how long -----------------------------------------------------------------------------------


def test_pauses_double_up_to_their_limit() -> None:
    policy = Policy(backoff=timedelta(seconds=60), backoff_max=timedelta(seconds=300))
    pauses = [policy.pause_after(attempt).total_seconds() for attempt in (1, 2, 3, 4, 99)]
    assert pauses == [60, 120, 240, 300, 300]
    decided = decide(failed("device", Chain(2, 9)), policy=policy)
    assert decided is not None
    assert decided.at == NOW + timedelta(seconds=120)


def test_pins_that_ask_for_more_than_the_limit_get_the_limit() -> None:
    assert chain_of(failed("device", Chain(1, 10_000)), POLICY).attempts_max == ATTEMPTS_LIMIT
    first = chain_of(operation_in(Phase.FAILED), POLICY)
    assert first == Chain(1, POLICY.attempts_max)


def test_a_decision_that_is_looked_at_again_goes_no_step_back() -> None:
    """It was decided to go back, since the archive refused another attempt; now it would not."""
    assert what(decide(failed("device"), is_retry_over=True)) is Next.ROLLBACK
    assert what(decide(failed("device"), is_retry_over=True, failed_before={GOOD})) is (
        Next.QUARANTINE
    )


# Each stands for its kind; the first test shows that the kinds are whole.
CODES = ["device", "chunk_corrupt", "disk_too_small", "wrong_disk", "release_revoked", "cancelled"]
SURPRISES: list[dict[str, Any]] = [
    {},
    {"release": replace(NEWER, revoked_at=NOW)},
    {"last_good": replace(OLDER, revoked_at=NOW)},
    {"is_retry_over": True},
]


def ways_on(chain: Chain, host: Host, is_written: bool) -> Iterator[tuple[bool, FollowUp | None]]:
    """Yield everything that can become of one operation: whether the disk was written by then,
    and what follows. It fails in any way, before or after it was permitted to write, while
    releases are revoked beside it."""
    for code, writes, surprise in product(CODES, (False, True), SURPRISES):
        if code == "cancelled" and writes:
            continue  # not from then on
        operation = failed(code, chain, release=GOOD if chain.cause is Cause.ROLLBACK else RELEASE)
        if code == "cancelled":
            operation = replace(operation, phase=Phase.CANCELLED)
        after = replace(host, state=HostState.DIRTY, release=None) if writes else host
        yield (
            is_written or writes,
            decide(operation, after, is_written=is_written or writes, **surprise),
        )


def longest(
    chain: Chain, host: Host, is_written: bool, known: dict[tuple[Chain, bool], tuple[int, int]]
) -> tuple[int, int]:
    """Return of how many operations, and of how many rollbacks, the longest chain from here
    consists. A chain without an end would end the test by recursion."""
    if (chain, is_written) not in known:
        found = [(1, 0)]
        for wrote, decided in ways_on(chain, host, is_written):
            if decided is None:
                assert not wrote, "a disk is left half, and nobody is told"
                continue
            if decided.what is Next.QUARANTINE:
                assert wrote, "a host that was not touched stays in the pool"
                continue
            is_back = decided.what is Next.ROLLBACK
            cause = Cause.ROLLBACK if is_back else Cause.RETRY
            after = Chain(decided.attempt, decided.attempts_max, cause)
            count, rollbacks = longest(after, host, wrote, known)
            found.append((count + 1, rollbacks + is_back))
        known[chain, is_written] = (
            max(count for count, _ in found),
            max(rollbacks for _, rollbacks in found),
        )
    return known[chain, is_written]


@pytest.mark.parametrize("attempts", range(1, ATTEMPTS_LIMIT + 1))
@pytest.mark.parametrize(("host", "is_written"), SITUATIONS.values(), ids=SITUATIONS)
def test_field_04_no_chain_is_longer_than_its_attempts_and_one_way_back(
    attempts: int, host: Host, is_written: bool
) -> None:
    """Every chain, walked to its end by the real decision; and no disk is left half."""
    count, rollbacks = longest(Chain(1, attempts), host, is_written, {})
    has_a_way_back = host.last_good == GOOD
    assert rollbacks == has_a_way_back
    assert count == attempts + has_a_way_back


def test_a_host_that_changed_its_firmware_is_still_given_what_boots_on_it() -> None:
    host = replace(WRITTEN, firmware=Firmware.BIOS)
    assert what(decide(failed("device"), host)) is Next.QUARANTINE
