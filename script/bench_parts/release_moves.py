"""Says what moves when a host goes from one release to the next, and what ten releases take."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from provisioner.core.manifest import Manifest
from provisioner.imaging.archive import folder_of
from provisioner.imaging.chunks import CHUNK_BYTES
from script.bench_parts.figures import Options, Row, plain_table
from script.bench_parts.release_builds import Store, whole_bytes
from script.bench_parts.release_chunks import KIB, SIZES, Cutting, Frames, Image, Move

MIB: Final = 1024 * KIB


@dataclass(frozen=True)
class Pair:
    """A move that is measured; key is its place in the JSON."""

    key: str
    text: str
    old: Manifest
    new: Manifest


@dataclass(frozen=True)
class Moved:
    """A pair: the bytes of the new image as one zstd stream, the move and the cutting by size."""

    pair: Pair
    whole: int
    moves: dict[int, Move]
    cuttings: dict[int, Cutting]

    @property
    def move(self) -> Move:
        """The move with the chunks that releases are made of."""
        return self.moves[CHUNK_BYTES]

    @property
    def ratio(self) -> float:
        return self.move.bytes / self.whole


def pairs_of(store: Store) -> list[Pair]:
    """Return the three moves: a small update, a month of updates, another image."""
    before, last = store.successive[-2:]
    packages = sum(len(one.packages) for one in store.updates)
    return [
        Pair("small_update", f"(a) {store.small.text}", before, last),
        Pair("security_month", f"(b) {packages} packages", store.successive[0], store.month),
        Pair("unrelated", f"(c) {store.other.image}", last, store.other),
    ]


def measure_moves(options: Options, store: Store) -> list[Moved]:
    """Return what each pair moves, with chunks of every size."""
    return [_moved(options, store, pair) for pair in pairs_of(store)]


def _moved(options: Options, store: Store, pair: Pair) -> Moved:
    options.say(f"{pair.text}: chunks of four sizes")
    moves, cuttings = {}, {}
    with (
        _image(options.folder, store, pair.old) as old,
        _image(options.folder, store, pair.new) as new,
    ):
        for size in SIZES:
            frames = Frames(new, size)
            moves[size] = frames.move_from(old)
            cuttings[size] = frames.cutting()
        return Moved(pair, whole_bytes(new.raw), moves, cuttings)


@contextmanager
def _image(folder: Path, store: Store, manifest: Manifest) -> Iterator[Image]:
    """Write the release as a raw image, for as long as the block lasts."""
    raw = folder / f"{manifest.image}-{manifest.version}.raw"
    store.archive.write_image(manifest, raw)
    try:
        signatures = store.archive.blobs.size(f"{folder_of(manifest.digest)}/manifest.sig")
        yield Image(raw, manifest, signatures or 0)
    finally:
        raw.unlink()


def move_rows(moved: Sequence[Moved]) -> list[Row]:
    """Return what went over the wire beside the whole image, in MiB."""
    return [
        Row(f"wire: {one.pair.text}", "MiB", [one.move.bytes / MIB], [one.whole / MIB])
        for one in moved
    ]


def move_figures(moved: Sequence[Moved]) -> dict[str, Any]:
    """Return the ratios of the moves, and what they are made of."""
    figures: dict[str, Any] = {f"wire_ratio_{one.pair.key}": round(one.ratio, 4) for one in moved}
    figures["moves"] = {
        one.pair.key: {
            "what": one.pair.text,
            "bytes": one.move.bytes,
            "index_bytes": one.move.index_bytes,
            "chunks": one.move.chunks,
            "requests": one.move.requests,
            "whole_zstd_bytes": one.whole,
        }
        for one in moved
    }
    figures["chunk_sizes"] = {f"{size // KIB}_kib": _by_size(moved, size) for size in SIZES}
    return figures


def _by_size(moved: Sequence[Moved], size: int) -> dict[str, Any]:
    last = moved[0].cuttings[size]
    figures: dict[str, Any] = {
        "index_bytes": last.index_bytes,
        "stored_ratio_to_whole": round(last.stored_bytes / moved[0].whole, 3),
        "hash_s": round(last.hash_s, 2),
        "unpack_s": round(last.unpack_s, 2),
    }
    for one in moved:
        move = one.moves[size]
        figures[f"wire_ratio_{one.pair.key}"] = round(move.bytes / one.whole, 4)
        figures[f"requests_{one.pair.key}"] = move.requests
    return figures


def size_table(moved: Sequence[Moved]) -> str:
    """Return the table by size of chunk."""
    small, month = moved[0], moved[1]
    head = ["chunk", "index", "stored whole", "(a) wire", "requests", "(b) wire", "requests"]
    lines = []
    for size in SIZES:
        cutting, first, second = small.cuttings[size], small.moves[size], month.moves[size]
        lines.append(
            [
                f"{size // KIB:,} KiB",
                f"{cutting.index_bytes / KIB:,.0f} KiB",
                f"{cutting.stored_bytes / small.whole:.1%}",
                f"{first.bytes / small.whole:.2%}",
                f"{first.requests:,}",
                f"{second.bytes / month.whole:.1%}",
                f"{second.requests:,}",
                f"{cutting.hash_s:.2f} s",
                f"{cutting.unpack_s:.2f} s",
            ]
        )
    return plain_table([*head, "hash", "unpack"], lines)
