"""What may become of a release: every rule, with rows made up for it."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from provisioner.core.model import Channel, ReleaseRow, ReleaseTest
from provisioner.core.releases import (
    ReleaseRevoked,
    ReleaseUntested,
    check_own_minimum,
    check_standing,
    check_tested,
    minimum_versions,
    revoked_error,
    unused,
)
from provisioner.errors import Conflict, RequestError
from tests.unit.examples import NOW

DAY = timedelta(days=1)
GOOD = ReleaseRow(
    digest="a1" * 32,
    image="web",
    version="1",
    size_bytes=1,
    used_bytes=1,
    stored_bytes=1,
    firmware=("bios", "uefi"),
    release_id="0" * 32,
    published_at=NOW,
)


def row(number: int, image: str = "web", **changes: Any) -> ReleaseRow:
    """Return release `number` of an image, published on that day of the year."""
    return replace(
        GOOD,
        digest=f"{image[0]}{number:03}",
        image=image,
        version=str(number),
        published_at=NOW + number * DAY,
        **changes,
    )


def passed(*firmware: str, is_healthy: bool = True) -> ReleaseTest:
    return ReleaseTest(GOOD.digest, NOW, "web", firmware, is_healthy, {}, "anna")


# --- standing -----------------------------------------------------------------------------


def test_a_release_in_good_standing_may_be_deployed() -> None:
    check_standing(GOOD)


def test_a_revoked_release_is_refused_with_the_reason() -> None:
    revoked = replace(GOOD, revoked_at=NOW, revoked_reason="loses data", removed_at=NOW)
    with pytest.raises(ReleaseRevoked, match="web@1 was revoked") as caught:
        check_standing(revoked)
    assert "loses data" in str(caught.value.found)
    assert caught.value.hint
    error = revoked_error(revoked)
    assert error["code"] == ReleaseRevoked.code
    assert "loses data" in error["found"]


def test_a_removed_release_is_a_conflict_that_says_how_it_comes_back() -> None:
    with pytest.raises(Conflict, match="was removed") as caught:
        check_standing(replace(GOOD, removed_at=NOW))
    assert "publish the very same content" in (caught.value.hint or "")


def test_a_channel_is_written_with_its_image() -> None:
    assert str(Channel("web", "stable", "a", "web@1", NOW, "anna")) == "web:stable"


# --- tests that a channel asks for --------------------------------------------------------


@pytest.mark.parametrize(
    "tests",
    [
        [passed("bios", "uefi")],
        [passed("uefi"), passed("bios")],
        [passed("bios", "uefi"), passed("bios", "uefi", is_healthy=False)],
        [passed("bios", "uefi", "secure-boot"), passed("uefi", is_healthy=False)],
    ],
)
def test_the_newest_test_on_each_firmware_counts(tests: list[ReleaseTest]) -> None:
    check_tested(GOOD, tests, "stable")


@pytest.mark.parametrize(
    ("tests", "untested", "failed"),
    [
        ([], ["bios", "uefi"], []),
        ([passed("bios")], ["uefi"], []),
        ([passed("bios"), passed("uefi", is_healthy=False)], [], ["uefi"]),
        ([passed("uefi", is_healthy=False), passed("bios", "uefi")], [], ["uefi"]),
        ([passed("secure-boot")], ["bios", "uefi"], []),
    ],
)
def test_an_untested_or_failed_firmware_is_named(
    tests: list[ReleaseTest], untested: list[str], failed: list[str]
) -> None:
    with pytest.raises(ReleaseUntested, match=r"web@1 has none on") as caught:
        check_tested(GOOD, tests, "stable")
    assert caught.value.found == {"untested": untested, "failed": failed}
    assert caught.value.hint == "provisioner image test web@1"


# --- minimum versions ---------------------------------------------------------------------


def test_the_highest_minimum_of_each_image_holds() -> None:
    rows = [
        row(1, minimum_version="2026.11.9"),
        row(2, minimum_version="2026.11.10"),
        row(3),
        row(4, minimum_version="2026.11.2"),
        row(1, "db", minimum_version="7"),
    ]
    assert minimum_versions(rows) == {"web": "2026.11.10", "db": "7"}


def test_a_revoked_release_asks_for_nothing_and_a_removed_one_still_does() -> None:
    revoked = row(2, minimum_version="9", revoked_at=NOW)
    removed = row(3, minimum_version="5", removed_at=NOW)
    assert minimum_versions([row(1, minimum_version="3"), revoked, removed]) == {"web": "5"}


@pytest.mark.parametrize("minimum", [None, "2026.11.9", "2026.11.10", "2025"])
def test_a_minimum_up_to_the_own_version_is_one(minimum: str | None) -> None:
    check_own_minimum("web", "2026.11.10", minimum)


@pytest.mark.parametrize("minimum", ["2026.11.11", "2026.11.10.1", "2027"])
def test_a_minimum_above_the_own_version_names_both(minimum: str) -> None:
    with pytest.raises(RequestError, match=r"web@2026\.11\.10 .* " + minimum):
        check_own_minimum("web", "2026.11.10", minimum)


# --- what may be given up -----------------------------------------------------------------


def names(rows: list[ReleaseRow]) -> list[str]:
    return sorted(one.name for one in rows)


def given_up(rows: list[ReleaseRow], used: set[str], keep_newest: int = 2) -> list[str]:
    later = NOW + 100 * DAY
    return names(unused(rows, used, keep_newest=keep_newest, published_before=later))


def test_the_newest_of_each_image_stay() -> None:
    rows = [*(row(number) for number in range(1, 6)), row(1, "db"), row(2, "db")]
    assert given_up(rows, set()) == ["web@1", "web@2", "web@3"]


def test_what_is_used_stays_and_takes_no_place_among_the_newest() -> None:
    rows = [row(number) for number in range(1, 6)]
    assert given_up(rows, {rows[0].digest, rows[4].digest}) == ["web@2", "web@3"]


def test_a_revoked_release_is_none_of_the_newest() -> None:
    rows = [row(1), row(2), row(3, revoked_at=NOW)]
    assert given_up(rows, set()) == ["web@3"]
    assert given_up(rows, {rows[2].digest}) == []


def test_a_removed_release_is_not_removed_again() -> None:
    assert given_up([row(1, removed_at=NOW), row(2), row(3), row(4)], set()) == ["web@2"]


def test_what_was_published_just_now_stays() -> None:
    rows = [row(number) for number in range(1, 6)]
    before = rows[1].published_at
    assert names(unused(rows, (), keep_newest=1, published_before=before)) == ["web@1", "web@2"]


@given(
    st.lists(st.tuples(st.integers(1, 30), st.booleans(), st.booleans()), max_size=30),
    st.integers(1, 5),
)
def test_nothing_used_is_ever_given_up(
    made: list[tuple[int, bool, bool]], keep_newest: int
) -> None:
    rows = [
        row(number, revoked_at=NOW if is_revoked else None)
        for number, is_revoked, _ in {one[0]: one for one in made}.values()
    ]
    used = {f"w{number:03}" for number, _, is_used in made if is_used}
    gone = unused(rows, used, keep_newest=keep_newest, published_before=NOW + 100 * DAY)
    assert not used & {one.digest for one in gone}
    good = [one for one in rows if one.revoked_at is None]
    left = [one for one in good if one not in gone]
    assert len(left) >= min(keep_newest, len(good))
