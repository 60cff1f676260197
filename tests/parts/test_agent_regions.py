"""Regions cover an image, and stretches cover what is to be written, whatever it is made of."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from provisioner.agent.fetch import buffer_bytes
from provisioner.agent.regions import (
    ZERO_REGION_BYTES_MAX,
    chunks_in_region,
    neighbours,
    regions_of,
    stretches_of,
)
from provisioner.agent.write import BUFFERS_BYTES_MAX, THREADS_MIN, thread_count
from provisioner.core.batches import BATCH_BYTES_MAX
from provisioner.core.manifest import CHUNK_BYTES_MAX, CHUNK_BYTES_MIN, Manifest
from tests.parts.agent_service import MIB, make_release

TEMPLATE = make_release(b"x" * 512).manifest
POWERS = [CHUNK_BYTES_MIN << power for power in range(9)]


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """An image of runs of data and zeros, in chunks of any size, the last perhaps short."""
    chunk_bytes = draw(st.sampled_from(POWERS))
    run = st.integers(1, 5) | st.integers(1, 3000)
    chunks: list[str | None] = []
    for length, is_zero in draw(st.lists(st.tuples(run, st.booleans()), min_size=1, max_size=9)):
        chunks += [None if is_zero else "a" * 64] * length
    size = len(chunks) * chunk_bytes - 512 * draw(st.integers(0, chunk_bytes // 512 - 1))
    values = {name: getattr(TEMPLATE, name) for name in TEMPLATE.__dataclass_fields__}
    values |= {"chunks": tuple(chunks), "chunk_bytes": chunk_bytes, "size_bytes": size}
    return Manifest(**values)


@given(manifests())
def test_every_chunk_but_the_first_is_in_one_region(manifest: Manifest) -> None:
    at = 1
    for region in regions_of(manifest):
        assert region.begin == at
        assert region.end > at
        length = (region.end - region.begin) * manifest.chunk_bytes
        if region.is_zero:
            assert set(manifest.chunks[region.begin : region.end]) == {None}
            assert length <= ZERO_REGION_BYTES_MAX
        else:
            assert length <= max(BATCH_BYTES_MAX, manifest.chunk_bytes)
        at = region.end
    assert at == max(len(manifest.chunks), 1)


@given(manifests(), st.data())
def test_stretches_are_what_is_to_be_written(manifest: Manifest, data: st.DataObject) -> None:
    """Each chunk once and in order; only zeros are zeroed; no two could have been one."""
    region = data.draw(st.sampled_from([*regions_of(manifest, begin=0)]))
    some = st.sets(st.sampled_from(range(region.begin, region.end)))
    wrong = sorted(data.draw(some | st.just(set(region.indexes))))
    stretches = stretches_of(wrong, manifest)
    assert [index for stretch in stretches for index in stretch.indexes] == wrong
    for stretch in stretches:
        if stretch.is_zero:
            assert set(manifest.chunks[stretch.begin : stretch.end]) == {None}
    for one, other in pairwise(stretches):
        assert one.end < other.begin or one.is_zero != other.is_zero


@given(st.sets(st.integers(0, 60)))
def test_neighbours_are_runs(numbers: set[int]) -> None:
    runs = list(neighbours(sorted(numbers)))
    assert [one for begin, end in runs for one in range(begin, end)] == sorted(numbers)
    assert all(end < begin for (_, end), (begin, _) in pairwise(runs))


def test_an_image_of_zeros_is_a_few_long_regions() -> None:
    empty = make_release(b"x" * MIB + bytes(200 * MIB)).manifest
    [first, *zeros] = regions_of(empty)
    assert (first.begin, first.end) == (1, MIB // empty.chunk_bytes)
    assert [len(run.indexes) * empty.chunk_bytes // MIB for run in zeros] == [64, 64, 64, 8]
    assert all(run.is_zero for run in zeros)


def test_memory_is_bounded_whatever_the_host_and_the_chunks() -> None:
    """Many processors do not make many buffers, nor do large chunks."""
    for chunk_bytes in POWERS:
        for processors in (1, 2, 4, 16, 256):
            threads = thread_count(chunk_bytes, processors)
            assert threads >= THREADS_MIN
            assert threads * buffer_bytes(chunk_bytes) <= BUFFERS_BYTES_MAX
    assert thread_count(64 * 1024, 2) == 4
    assert chunks_in_region(CHUNK_BYTES_MAX) == 1
