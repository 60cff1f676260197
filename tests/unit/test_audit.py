"""The audit chain: whatever is edited, removed, slipped in or moved is found, and where."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from provisioner.core.audit import FIRST_HASH, AuditRow, chained, verify
from provisioner.errors import TrustError
from tests.unit.examples import NOW

LENGTH = 6


def chain(length: int = LENGTH) -> list[AuditRow]:
    rows: list[AuditRow] = []
    before = FIRST_HASH
    for number in range(1, length + 1):
        at, detail = NOW + timedelta(seconds=number), {"number": number, "name": "Zoë"}
        row = chained(number, at, "token:admin", "host.flags", f"r1n{number}", detail, before)
        rows.append(row)
        before = row.row_hash
    return rows


def broken_at(rows: Sequence[AuditRow]) -> int:
    with pytest.raises(TrustError) as caught:
        verify(rows)
    return int(caught.value.message.rsplit(" ", 1)[1])


def rehashed(row: AuditRow, **changes: Any) -> AuditRow:
    """Return the row as somebody would forge it who knows how its hash is made."""
    new = replace(row, **changes)
    return chained(
        new.number, new.at, new.actor, new.action, new.subject, new.detail, new.before_hash
    )


def test_a_chain_that_nobody_touched_holds() -> None:
    assert verify(chain()) == LENGTH
    assert verify([]) == 0


EDITS: list[dict[str, Any]] = [
    {"actor": "token:nobody"},
    {"action": "host.deleted"},
    {"subject": "r9n9"},
    {"detail": {"number": 3}},
    {"at": NOW},
    {"number": 4},
    {"before_hash": FIRST_HASH},
    {"row_hash": "f" * 64},
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: next(iter(edit)))
def test_an_edited_row_is_found(edit: dict[str, Any]) -> None:
    rows = chain()
    rows[2] = replace(rows[2], **edit)
    assert broken_at(rows) == 3


def test_a_forged_row_with_a_right_hash_breaks_the_next_one() -> None:
    rows = chain()
    rows[2] = rehashed(rows[2], actor="token:nobody")
    assert broken_at(rows) == 4


@pytest.mark.parametrize("index", range(LENGTH - 1))
def test_a_removed_row_is_found(index: int) -> None:
    rows = chain()
    del rows[index]
    assert broken_at(rows) == index + 1


@pytest.mark.parametrize("index", range(LENGTH))
def test_an_inserted_row_is_found(index: int) -> None:
    rows = chain()
    before = rows[index - 1].row_hash if index else FIRST_HASH
    slipped_in = chained(index + 1, NOW, "token:nobody", "host.deleted", "r1n1", {}, before)
    rows.insert(index, slipped_in)
    assert broken_at(rows) == index + 2


@pytest.mark.parametrize("index", range(LENGTH - 1))
def test_swapped_rows_are_found(index: int) -> None:
    rows = chain()
    rows[index], rows[index + 1] = rows[index + 1], rows[index]
    assert broken_at(rows) == index + 1


def test_rows_cut_off_at_the_end_are_told_by_their_number() -> None:
    """A chain cannot know what is to come: an exported copy, or the count, tells this."""
    assert verify(chain()[:-1]) == LENGTH - 1


@settings(max_examples=60, deadline=None)
@given(st.permutations(range(LENGTH)))
def test_any_other_order_is_found(order: list[int]) -> None:
    rows = [chain()[index] for index in order]
    if order == sorted(order):
        assert verify(rows) == LENGTH
    else:
        first_wrong = next(place for place, index in enumerate(order) if place != index)
        assert broken_at(rows) == first_wrong + 1


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text(), max_size=4),
    st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text(), max_size=4),
)
def test_two_rows_share_a_hash_only_when_they_say_the_same(one: Any, other: Any) -> None:
    hashes = [chained(1, NOW, "a", "b", "c", d, FIRST_HASH).row_hash for d in (one, other)]
    # Python holds that 1 == True; JSON, and so the chain, does not.
    same = repr(sorted(one.items())) == repr(sorted(other.items()))
    assert (hashes[0] == hashes[1]) is same


def test_the_fields_of_a_row_cannot_run_into_each_other() -> None:
    one = chained(1, NOW, "ab", "c", "d", {}, FIRST_HASH)
    other = chained(1, NOW, "a", "bc", "d", {}, FIRST_HASH)
    assert one.row_hash != other.row_hash
