"""Fetching chunks: cut connections, wrong bytes, hostile frames, and other places to ask."""

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard

from provisioner.agent.client import FILE_TIMEOUT_S
from provisioner.agent.fetch import CORRUPT_TRIES_MAX, ChunkFetcher
from provisioner.agent.http import Origin
from provisioner.agent.problems import ChunkCorrupt, ChunkUnavailable
from provisioner.agent.progress import Progress
from provisioner.agent.regions import Span, regions_of
from provisioner.agent.sources import REST_S, Sources
from provisioner.core.batches import LENGTH, frame_bytes_max
from tests.parts.agent_rig import Rig, rig_with
from tests.parts.agent_service import (
    CHUNK,
    MIB,
    Release,
    Service,
    chunk_path,
    is_batch,
    make_image,
    make_release,
    running,
)
from tests.parts.cutting_proxy import cutting

IMAGE_MIB = 12
# Where the image has data; see make_image.
DATA_AT = 4 * MIB
HEADERS_BYTES_MAX = 400


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make_image(tmp_path_factory.mktemp("image") / "image", size_mib=IMAGE_MIB)


@pytest.fixture
def release(image: bytes) -> Release:
    return make_release(image)


@pytest.fixture
def service(release: Release) -> Iterator[Service]:
    with running(Service(files=release.files(), hello={})) as service:
        yield service


@pytest.fixture
def mirror(release: Release) -> Iterator[Service]:
    """Another place with the chunks, each by its digest, and nothing else."""
    with running(Service(files=dict(release.chunks), hello={})) as mirror:
        yield mirror


@pytest.fixture
def rig(tmp_path: Path, release: Release) -> Iterator[Rig]:
    with rig_with(tmp_path, release, disk_mib=32) as rig:
        yield rig


def sources(release: Release, *places: Service | str) -> Sources:
    urls = [place if isinstance(place, str) else place.boot_url for place in places]
    service, *mirrors = map(Origin.parse, urls)
    return Sources(release.manifest.digest, service, tuple(mirrors))


def fetched(
    release: Release,
    places: Sources,
    *,
    patience_s: float = 60,
    stop: threading.Event | None = None,
) -> Progress:
    """Fetch the chunks of the region at DATA_AT, and check each of its bytes."""
    progress = Progress()
    fetcher = ChunkFetcher(
        places, release.manifest, progress, stop or threading.Event(), patience_s=patience_s
    )
    begin = DATA_AT // CHUNK
    region = Span(begin, begin + 16, is_zero=False)
    wanted = [index for index in region.indexes if release.manifest.chunks[index]]
    try:
        fetcher.fetch(region, wanted)
    finally:
        fetcher.close()
    for index in wanted:
        at = (index - begin) * CHUNK
        assert fetcher.buffer[at : at + CHUNK] == release.raw[index * CHUNK :][:CHUNK]
    return progress


def break_chunk(service: Service, release: Release, how: bytes) -> str:
    """Replace the stored frame of the chunk at DATA_AT; return its path."""
    path = chunk_path(release.digest_at(DATA_AT))
    service.files[path] = how
    return path


# --- cuts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_a_deployment_goes_on_at_the_last_good_chunk(rig: Rig, seed: int) -> None:
    """Cut at random bytes of all that is sent: what came whole is not fetched again."""
    chance = random.Random(seed)
    files = rig.release.files()
    stored = [files[chunk_path(digest)] for _, digest in rig.release.manifest.stored_chunks()]
    meta = sum(len(data) for path, data in files.items() if path.endswith((".zst", ".sig")))
    once = meta + sum(LENGTH.size + len(frame) for frame in stored)
    # Behind the manifest: that is small, and begun again as a whole.
    cuts = [chance.randrange(meta + 1000, once) for _ in range(chance.randrange(1, 25))]
    where = Origin.parse(rig.service.boot_url)
    with cutting((where.address, where.port), cuts) as proxy:
        rig.service.boot_url = proxy.url
        rig.run()
    assert rig.disk.read_bytes()[CHUNK : len(rig.release.raw)] == rig.release.raw[CHUNK:]
    assert proxy.cut == len(cuts)
    # Of each cut, at most one chunk had come in part.
    again = proxy.cut * (LENGTH.size + max(map(len, stored)))
    assert once <= rig.progress.fetched_bytes <= once + again
    assert proxy.passed_bytes <= once + again + HEADERS_BYTES_MAX * proxy.requests


def test_only_what_is_missing_is_asked_for_again(release: Release, service: Service) -> None:
    """Cut within the fifth chunk: the next request begins with it."""
    begin = DATA_AT // CHUNK
    frames = [release.chunks[chunk_path(release.digest_at(DATA_AT + i * CHUNK))] for i in range(5)]
    before = sum(LENGTH.size + len(frame) for frame in frames[:4])
    where = Origin.parse(service.boot_url)
    with cutting((where.address, where.port), [before + HEADERS_BYTES_MAX]) as proxy:
        fetched(release, sources(release, proxy.url))
    first, second = [path.rpartition("/")[2] for path in service.fetched]
    assert first.startswith(f"{begin}-")
    assert second.startswith(f"{begin + 4}-")


# --- wrong bytes ----------------------------------------------------------------------------


def test_one_flipped_bit_is_never_written(rig: Rig) -> None:
    """A chunk that stays wrong ends the deployment with both digests; the table is gone."""
    old = rig.disk.read_bytes()
    raw = bytearray(rig.release.raw)
    raw[DATA_AT] ^= 1
    other = make_release(bytes(raw))
    path = break_chunk(rig.service, rig.release, other.chunks[chunk_path(other.digest_at(DATA_AT))])
    with pytest.raises(ChunkCorrupt) as caught:
        rig.run()
    assert caught.value.expected == rig.release.digest_at(DATA_AT)
    assert caught.value.found == other.digest_at(DATA_AT)
    assert rig.service.boot_url in caught.value.message, "the error names who was asked"
    asked = rig.service.asked_for().count(DATA_AT // CHUNK)
    assert (asked, rig.service.fetched.count(path)) == (CORRUPT_TRIES_MAX, 1)
    found = rig.disk.read_bytes()
    assert found[DATA_AT : DATA_AT + CHUNK] == old[:CHUNK]
    assert found[:CHUNK] == bytes(CHUNK), "a half-written disk must not boot"
    assert found[-MIB:] == bytes(MIB), "nor from its backup table"
    assert not rig.service.told("seed")


def test_a_chunk_that_came_wrong_once_is_fetched_again(release: Release, service: Service) -> None:
    """A network that damages one answer does not fail a deployment."""
    path = break_chunk(service, release, b"")
    right = release.chunks[path]

    def damage_once(_: str) -> None:
        service.files[path] = right[:-1] if len(service.fetched) == 1 else right

    service.on_file = damage_once
    fetched(release, sources(release, service))
    assert service.asked_for().count(DATA_AT // CHUNK) == 2
    assert service.asked_for().count(DATA_AT // CHUNK + 1) == 1, "its neighbours were right"


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"not a frame",
        zstandard.compress(bytes(CHUNK - 1)),
        zstandard.compress(bytes(CHUNK + 1)),
        zstandard.compress(bytes(64 * MIB)),
        zstandard.ZstdCompressor(write_content_size=False).compress(bytes(64 * MIB)),
        b"\xff" * (CHUNK // 2),
    ],
    ids=["empty", "no frame", "short", "long", "bomb", "bomb without a size", "noise"],
)
def test_a_frame_never_reaches_beyond_its_chunk(
    release: Release, service: Service, mirror: Service, frame: bytes
) -> None:
    """The chunk comes from elsewhere, and its neighbours are as they were fetched."""
    path = break_chunk(service, release, frame)
    fetched(release, sources(release, service, mirror))
    assert mirror.fetched == [path], "and only that chunk was asked for there"


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**32 - 1])
def test_a_length_that_is_wrong_spoils_no_other_chunk(
    release: Release, service: Service, length: int
) -> None:
    """Behind it nothing can be found: the rest is asked for again, and the chunk by itself."""
    path = chunk_path(release.digest_at(DATA_AT))
    frame = release.chunks[path]
    right, wrong = (LENGTH.pack(size) + frame for size in (len(frame), length))
    service.alter = lambda asked, data: data.replace(right, wrong) if is_batch(asked) else data
    fetched(release, sources(release, service))
    assert service.fetched.count(path) == 1


def test_more_than_a_chunk_can_be_is_not_waited_for(release: Release, service: Service) -> None:
    """A file that grew in the store fails at once, and does not use up all patience."""
    break_chunk(service, release, bytes(8 * MIB))
    with pytest.raises(ChunkCorrupt, match="sent too much"):
        fetched(release, sources(release, service), patience_s=600)


# --- other places ---------------------------------------------------------------------------


def test_what_the_service_lacks_comes_from_a_mirror(
    release: Release, service: Service, mirror: Service
) -> None:
    """A lost file fails the batch; then each chunk is asked for by itself."""
    path = chunk_path(release.digest_at(DATA_AT))
    del service.files[path]
    fetched(release, sources(release, service, mirror))
    assert mirror.fetched == [path]


def test_a_mirror_stands_in_for_a_service_that_does_not_answer(
    release: Release, mirror: Service
) -> None:
    """Nobody listens at the service's address."""
    fetched(release, sources(release, "http://127.0.0.1:9", mirror))
    assert set(mirror.fetched) <= set(release.chunks)


def test_a_mirror_that_is_wrong_too_is_named(
    release: Release, service: Service, mirror: Service
) -> None:
    path = break_chunk(service, release, b"x")
    mirror.files[path] = b"y"
    with pytest.raises(ChunkCorrupt) as caught:
        fetched(release, sources(release, service, mirror))
    assert service.boot_url in caught.value.message
    assert mirror.boot_url in caught.value.message


def test_a_chunk_that_nobody_has_is_said_to_be_missing(
    release: Release, service: Service, mirror: Service
) -> None:
    path = chunk_path(release.digest_at(DATA_AT))
    del service.files[path], mirror.files[path]
    with pytest.raises(ChunkUnavailable, match="answered 404"):
        fetched(release, sources(release, service, mirror), patience_s=5)


def test_patience_has_an_end(release: Release) -> None:
    with pytest.raises(ChunkUnavailable, match="could not fetch") as caught:
        fetched(release, sources(release, "http://127.0.0.1:9"), patience_s=0.5)
    assert "127.0.0.1:9" in str(caught.value.expected)


def slow(service: Service) -> None:
    """Have a place answer each question, and take a quarter of a second for it."""
    service.on_file = lambda _: time.sleep(0.25)


def test_patience_ends_between_two_chunks(
    release: Release, service: Service, mirror: Service
) -> None:
    """Each chunk comes in the end, but all of them one by one would take many times as long.
    How often it asks says so: on a busy machine it asks less often."""
    service.files.clear()
    slow(mirror)
    with pytest.raises(ChunkUnavailable, match="could not fetch"):
        fetched(release, sources(release, service, mirror), patience_s=0.6)
    assert len(mirror.fetched) <= 4


def test_nothing_more_is_asked_for_once_the_agent_has_to_stop(
    release: Release, service: Service, mirror: Service
) -> None:
    service.files.clear()
    stop = threading.Event()

    def stop_at_the_second(_: str) -> None:
        if len(mirror.fetched) == 2:
            stop.set()

    mirror.on_file = stop_at_the_second
    with pytest.raises(ChunkUnavailable):
        fetched(release, sources(release, service, mirror), stop=stop)
    assert len(mirror.fetched) == 2


def test_a_batch_is_not_asked_for_when_time_is_over(release: Release, service: Service) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(ChunkUnavailable):
        fetched(release, sources(release, service), stop=stop)
    assert not service.fetched


def test_a_place_rests_longer_than_it_takes_to_find_that_another_is_silent() -> None:
    """Or the first is due again, and costs its timeout, before the last was asked."""
    assert REST_S > FILE_TIMEOUT_S


def test_a_service_that_comes_back_is_asked_again(release: Release, service: Service) -> None:
    """It answers 503 at first, as while it restarts."""
    answers = iter([ConnectionError, ConnectionError])

    def busy(_: str) -> None:
        if (error := next(answers, None)) is not None:
            raise error

    service.on_file = busy
    fetched(release, sources(release, service))


def test_requests_are_few(release: Release, service: Service) -> None:
    """One for each region that holds data, however many chunks it has."""
    fetcher = ChunkFetcher(
        sources(release, service), release.manifest, Progress(), threading.Event()
    )
    regions = [region for region in regions_of(release.manifest) if not region.is_zero]
    for region in regions:
        fetcher.fetch(region, [i for i in region.indexes if release.manifest.chunks[i]])
    fetcher.close()
    assert len(service.fetched) == len(regions) <= IMAGE_MIB // 4 + 1


def test_no_frame_is_longer_than_its_buffer() -> None:
    """What does not compress grows by less than we allow for."""
    noise = random.Random(1).randbytes(16 * MIB)
    for size in (64 * 1024, 256 * 1024, MIB, 16 * MIB):
        assert len(zstandard.compress(noise[:size])) <= frame_bytes_max(size)
