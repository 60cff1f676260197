"""The boot listener's batches: what may be asked for, and what the answer holds."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from provisioner.core.batches import frames_in, pack
from provisioner.errors import NotFound
from provisioner.web.chunk_batches import INDEXES_MAX, MISS_KEPT_S, MISSES_MAX, ChunkBatches
from provisioner.web.file_source import WAITING_MAX, LocalFiles, StoredElsewhere
from provisioner.web.files import RETRY_AFTER_S
from provisioner.web.threads import BOOT_THREADS
from tests.parts.agent_service import CHUNK, MIB, Release, chunk_path, make_release
from tests.parts.release_store import lay_out, served, serving


def image(chunks: int) -> bytes:
    """An image of chunks that all differ; the third is all zero, the last is short."""
    parts = [index.to_bytes(4, "big") * (CHUNK // 4) for index in range(1, chunks + 1)]
    parts[2] = bytes(CHUNK)
    return b"".join(parts)[:-512]


@pytest.fixture(scope="module")
def release() -> Release:
    return make_release(image(130))


@pytest.fixture
def folder(tmp_path: Path, release: Release) -> Path:
    lay_out(tmp_path, release)
    return tmp_path


@pytest.fixture
def url(folder: Path) -> Iterator[str]:
    with served(folder) as url:
        yield url


def frames(release: Release, indexes: Sequence[int]) -> list[bytes]:
    return [release.chunks[chunk_path(str(release.manifest.chunks[i]))] for i in indexes]


@pytest.mark.parametrize(
    ("spec", "indexes"),
    [
        ("0", [0]),
        ("0-1", [0, 1]),
        ("0-1,3", [0, 1, 3]),
        ("3-66", list(range(3, 67))),
        ("0,129", [0, 129]),
    ],
)
def test_the_answer_holds_each_chunk_in_order(
    url: str, release: Release, spec: str, indexes: list[int]
) -> None:
    answer = httpx.get(f"{url}{release.folder}/chunks/{spec}", timeout=60)
    assert answer.status_code == 200
    assert answer.content == pack(frames(release, indexes))
    assert list(map(bytes, frames_in(memoryview(answer.content)))) == frames(release, indexes)
    assert int(answer.headers["Content-Length"]) == len(answer.content)
    assert "immutable" in answer.headers["Cache-Control"]


WRONG = ["-", "1-", "0-64", "3-67", "1,0", "0,0", "2", "1-3", "130", "129-130", "a", "1" * 2000]


@pytest.mark.parametrize("spec", WRONG)
def test_what_may_not_be_asked_for_is_a_problem(url: str, release: Release, spec: str) -> None:
    """Too many, unordered, twice, zero, beyond the end, nonsense."""
    answer = httpx.get(f"{url}{release.folder}/chunks/{spec}", timeout=60)
    assert answer.status_code == 400
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.json()["detail"]
    assert "Cache-Control" not in answer.headers


def test_a_batch_is_at_most_four_mib_or_one_chunk(tmp_path: Path) -> None:
    """With large chunks, fewer of them; one chunk always."""
    for chunk_bytes, allowed, refused in ((MIB, "3-6", "3-7"), (16 * MIB, "1", "0-1")):
        release = make_release(
            b"".join(bytes([i]) * MIB for i in range(1, 40)), chunk_bytes=chunk_bytes
        )
        lay_out(tmp_path, release)
        with served(tmp_path) as url:
            assert (
                httpx.get(f"{url}{release.folder}/chunks/{allowed}", timeout=60).status_code == 200
            )
            answer = httpx.get(f"{url}{release.folder}/chunks/{refused}", timeout=60)
        assert answer.status_code == 400
        assert answer.json()["expected"] == f"at most {max(4 * MIB // chunk_bytes, 1)} chunks"


def test_what_is_not_there_is_not_found(url: str, folder: Path, release: Release) -> None:
    assert httpx.get(f"{url}/releases/{'a' * 64}/chunks/0", timeout=60).status_code == 404
    assert httpx.get(f"{url}{release.folder}/chunks/", timeout=60).status_code == 404
    (folder / chunk_path(str(release.manifest.chunks[1]))[1:]).unlink()
    answer = httpx.get(f"{url}{release.folder}/chunks/0-1", timeout=60)
    assert answer.status_code == 404
    assert "chunk 1 of release" in answer.json()["detail"]
    assert httpx.get(f"{url}{release.folder}/chunks/0", timeout=60).status_code == 200


@pytest.mark.parametrize("how", [b"", b"{}", b"\xff"])
def test_a_damaged_manifest_is_not_read(
    url: str, folder: Path, release: Release, how: bytes
) -> None:
    """The chunks are still there by their digests."""
    (folder / release.folder[1:] / "manifest.json").write_bytes(how)
    answer = httpx.get(f"{url}{release.folder}/chunks/0", timeout=60)
    assert answer.status_code == 404
    assert "damaged" in answer.json()["detail"]
    path = chunk_path(str(release.manifest.chunks[0]))
    assert httpx.get(url + path, timeout=60).content == release.chunks[path]


def test_an_nginx_in_front_sends_files_and_passes_batches_on(
    folder: Path, release: Release
) -> None:
    with served(folder, accel=True) as url:
        assert httpx.get(f"{url}{release.folder}/chunks/0", timeout=60).content == pack(
            frames(release, [0])
        )
        path = chunk_path(str(release.manifest.chunks[0]))
        assert httpx.get(url + path, timeout=60).headers["X-Accel-Redirect"].endswith(path)


def test_the_manifest_is_served_packed_and_its_signatures_are_not_kept(
    url: str, folder: Path, release: Release
) -> None:
    """Signatures are added to a release later on."""
    files = release.files()
    for name, kept in (
        ("manifest.json.zst", True),
        ("manifest.json", True),
        ("manifest.sig", False),
    ):
        answer = httpx.get(f"{url}{release.folder}/{name}", timeout=60)
        assert answer.content == files[f"{release.folder}/{name}"]
        assert ("immutable" in answer.headers["Cache-Control"]) is kept
    (folder / release.folder[1:] / "manifest.sig").write_bytes(b"more")
    assert httpx.get(f"{url}{release.folder}/manifest.sig", timeout=60).content == b"more"
    for name in ("build.json", "files.json.zst", "manifest"):
        assert httpx.get(f"{url}{release.folder}/{name}", timeout=60).status_code == 404


class CountingFiles(LocalFiles):
    """Files on this machine, and how often a manifest was read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.manifests = 0

    def read(self, path: str) -> bytes | None:
        self.manifests += path.endswith("manifest.json")
        return super().read(path)


def test_a_rack_that_starts_at_once_reads_the_manifest_once(folder: Path, release: Release) -> None:
    files = CountingFiles(folder)
    batches = ChunkBatches(files)
    ready = threading.Barrier(16)

    def ask(_: int) -> bytes:
        ready.wait(60)
        return batches.answer(release.manifest.digest, "0-1")

    with ThreadPoolExecutor(16) as pool:
        answers = set(pool.map(ask, range(16)))
    assert answers == {pack(frames(release, [0, 1]))}
    assert files.manifests == 1


class SlowStore:
    """A store elsewhere that answers nothing of what `stuck` names until `go_on` is set."""

    def __init__(self, root: Path, stuck: str) -> None:
        self._files, self._stuck = LocalFiles(root), stuck
        self.go_on = threading.Event()
        self.waiting = threading.Semaphore(0)

    def read(self, path: str, limit: int) -> bytes:
        if self._stuck in path:
            self.waiting.release()
            assert self.go_on.wait(60)
        data = self._files.read(path)
        if data is None:
            raise NotFound(path)
        assert len(data) <= limit
        return data


def test_a_slow_store_leaves_threads_to_boot_scripts(folder: Path, release: Release) -> None:
    """Whoever comes once enough are waiting is told at once to come again."""
    ramdisk = folder / "ramdisks" / ("a" * 64) / "initrd"
    ramdisk.parent.mkdir(parents=True)
    ramdisk.write_bytes(b"initrd")
    store = SlowStore(folder, chunk_path(str(release.manifest.chunks[0]))[1:])
    files = StoredElsewhere(LocalFiles(folder), store.read)
    chunk, batch = chunk_path(str(release.manifest.chunks[0])), f"{release.folder}/chunks/0"
    with serving(files) as url, ThreadPoolExecutor(WAITING_MAX) as pool:
        paths = [chunk, batch] * (WAITING_MAX // 2)
        asked = [pool.submit(httpx.get, url + path, timeout=120) for path in paths]
        for _ in asked:
            assert store.waiting.acquire(timeout=60)
        for path in (chunk, batch, f"{release.folder}/manifest.sig"):
            answer = httpx.get(url + path, timeout=60)
            assert answer.status_code == 503
            assert int(answer.headers["Retry-After"]) == RETRY_AFTER_S
            assert "Cache-Control" not in answer.headers
        assert httpx.get(f"{url}/ramdisks/{'a' * 64}/initrd", timeout=60).content == b"initrd"
        store.go_on.set()
        assert {one.result().status_code for one in asked} == {200}
        assert httpx.get(url + batch, timeout=60).content == pack(frames(release, [0]))
        # What could not be had gave its place back, too.
        for _ in range(WAITING_MAX + 1):
            assert httpx.get(f"{url}/chunks/aa/{'a' * 64}", timeout=60).status_code == 404


def test_threads_are_left_to_boot_scripts() -> None:
    assert 0 < WAITING_MAX < BOOT_THREADS


def test_a_manifest_that_is_slow_to_come_holds_up_its_own_release_alone(
    folder: Path, release: Release
) -> None:
    slow = make_release(image(4), version="slow")
    lay_out(folder, slow)
    store = SlowStore(folder, f"{slow.folder[1:]}/manifest.json")
    batches = ChunkBatches(StoredElsewhere(LocalFiles(folder), store.read))
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(batches.answer, slow.manifest.digest, "0") for _ in range(4)]
        assert store.waiting.acquire(timeout=60)
        assert batches.answer(release.manifest.digest, "0") == pack(frames(release, [0]))
        store.go_on.set()
        assert {one.result(60) for one in asked} == {pack(frames(slow, [0]))}
    assert not store.waiting.acquire(blocking=False), "it was read once"


def test_a_release_that_is_not_there_is_not_looked_for_again_at_once(
    tmp_path: Path, release: Release
) -> None:
    files, now = CountingFiles(tmp_path), [0.0]
    batches = ChunkBatches(files, clock=lambda: now[0])
    digest = release.manifest.digest
    for _ in range(3):
        with pytest.raises(NotFound, match="there is no release"):
            batches.answer(digest, "0")
    assert files.manifests == 1
    for number in range(MISSES_MAX):
        with pytest.raises(NotFound):
            batches.answer(f"{number:064x}", "0")
    with pytest.raises(NotFound):
        batches.answer(digest, "0")
    assert files.manifests == MISSES_MAX + 2, "no more of them are kept than that"
    lay_out(tmp_path, release)
    with pytest.raises(NotFound):
        batches.answer(digest, "0")
    now[0] = MISS_KEPT_S
    assert batches.answer(digest, "0") == pack(frames(release, [0]))


def test_only_the_last_few_releases_are_remembered(tmp_path: Path) -> None:
    files = CountingFiles(tmp_path)
    batches = ChunkBatches(files)
    some = [make_release(image(4), version=str(number)) for number in range(INDEXES_MAX + 1)]
    lay_out(tmp_path, *some)
    for release in some:
        batches.answer(release.manifest.digest, "0")
    batches.answer(some[-1].manifest.digest, "0")
    batches.answer(some[1].manifest.digest, "0")
    assert files.manifests == INDEXES_MAX + 1
    batches.answer(some[0].manifest.digest, "0")
    assert files.manifests == INDEXES_MAX + 2
    with pytest.raises(NotFound):
        batches.answer("a" * 64, "0")
