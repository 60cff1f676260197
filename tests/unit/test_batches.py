"""Requests for several chunks, and the answers to them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from provisioner.core.batches import (
    BATCH_CHUNKS_MAX,
    SPEC_CHARACTERS_MAX,
    frames_in,
    indexes_in,
    pack,
    spec_of,
)
from provisioner.errors import RequestError

chunks = st.sets(st.integers(0, 200) | st.integers(0, 10**9 - 1), min_size=1, max_size=64)


@given(chunks)
def test_what_is_asked_for_is_what_is_understood(indexes: set[int]) -> None:
    spec = spec_of(sorted(indexes))
    assert indexes_in(spec) == sorted(indexes)
    assert len(spec) <= SPEC_CHARACTERS_MAX


def test_neighbours_are_one_range() -> None:
    assert spec_of([100, 101, 102, 103, 110]) == "100-103,110"
    assert spec_of(list(range(100, 164))) == "100-163"
    assert spec_of([0]) == "0"


@pytest.mark.parametrize(
    "spec",
    [
        "",
        ",",
        "1,",
        "-1",
        "1-",
        "01",
        "1-01",
        "5-4",
        "5-5",
        "1,1",
        "2,1",
        "1-3,3",
        "1 ,2",
        "+1",
        "\u0661",
        "0x1",
        "1.0",
        "1e3",
        "9999999999",
        "0-64",
        "0-999999999",
        ",".join(str(number) for number in range(0, 130, 2)),
        "1" * (SPEC_CHARACTERS_MAX + 1),
    ],
)
def test_anything_else_is_refused(spec: str) -> None:
    with pytest.raises(RequestError):
        indexes_in(spec)


@given(st.text(alphabet="0123456789,-", max_size=40))
def test_no_text_is_more_than_a_batch(spec: str) -> None:
    try:
        indexes = indexes_in(spec)
    except RequestError:
        return
    assert 0 < len(indexes) <= BATCH_CHUNKS_MAX
    assert indexes == sorted(set(indexes))


@given(st.lists(st.binary(max_size=50), max_size=10), st.data())
def test_a_cut_answer_gives_the_frames_that_came_whole(
    frames: list[bytes], data: st.DataObject
) -> None:
    answer = pack(frames)
    assert list(map(bytes, frames_in(memoryview(answer)))) == frames
    cut = data.draw(st.integers(0, len(answer)))
    whole = list(map(bytes, frames_in(memoryview(answer[:cut]))))
    assert whole == frames[: len(whole)]
    assert len(pack(frames[: len(whole) + 1])) > cut or len(whole) == len(frames)


@given(st.binary(max_size=100))
def test_no_answer_gives_more_than_it_holds(answer: bytes) -> None:
    assert sum(4 + len(frame) for frame in frames_in(memoryview(answer))) <= len(answer)
