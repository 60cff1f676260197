"""Measures releases: what moves between them, what they take in the store, how fast they are
published and written, and in how much memory."""

from itertools import pairwise
from typing import Final

from script.bench_parts.figures import Options, Result, Row, median, plain_table
from script.bench_parts.reimage_runs import Run
from script.bench_parts.release_builds import Store, build_store
from script.bench_parts.release_lab import LabRounds, measure_lab
from script.bench_parts.release_memory import LargeImage, measure_large_image
from script.bench_parts.release_moves import (
    MIB,
    Moved,
    measure_moves,
    move_figures,
    move_rows,
    size_table,
)

WRITING: Final = ("agent write", "agent read_back")
DD: Final = ("floor dd", "floor sync")
CHECKED_DD: Final = (*DD, "floor check")


def measure(options: Options) -> Result:
    """Return all figures; the parts run one after another."""
    store = build_store(options.folder / "releases", options.say)
    moved = measure_moves(options, store)
    large = measure_large_image(options)
    rounds = measure_lab(options, store)
    result = Result("reference", move_rows(moved), move_figures(moved))
    result.tables.append(size_table(moved))
    _add_space(result, store)
    _add_lab(result, rounds, moved[0])
    _add_large_image(result, large)
    return result


def _add_space(result: Result, store: Store) -> None:
    """Add what ten releases take in the store, and what each added."""
    first, ten = store.bytes(store.successive[:1]), store.bytes(store.successive)
    result.rows.append(
        Row("store: ten releases (reference: one)", "MiB", [ten / MIB], [first / MIB])
    )
    result.figures["store_ratio_ten_releases"] = round(ten / first, 3)
    totals = [store.bytes(store.successive[:number]) for number in range(len(store.steps) + 1)]
    added = [round((after - before) / MIB, 1) for before, after in pairwise(totals)]
    lines = [
        [f"{number}: {step.text}", f"{size:.1f} MiB"]
        for number, (step, size) in enumerate(zip(store.steps, added, strict=True), 1)
    ]
    result.tables.append(plain_table(["release, and what is new in it", "added"], lines))
    result.figures["store_added_mib"] = added
    result.figures["store_mib"] = [round(totals[1] / MIB, 1), round(ten / MIB, 1)]
    result.figures["updates"] = [one.text for one in store.updates]


def _add_lab(result: Result, rounds: LabRounds, small: Moved) -> None:
    """Add the times of the lab, and whether a real deployment fetched what was counted."""
    writing, dd = _seconds(rounds.whole, WRITING), _seconds(rounds.floor, DD)
    checked = _seconds(rounds.checked, CHECKED_DD)
    delta, floor = ([run.total_s for run in runs] for runs in (rounds.delta, rounds.floor))
    fetched = [float(run.evidence["fetched_bytes"]) for run in rounds.delta]
    result.rows += [
        Row("write and read back (reference: dd, sync)", "s", writing, dd),
        Row("write and read back (reference: dd, sync, read back)", "s", writing, checked),
        Row("(a) request to active (reference: the floor)", "s", delta, floor),
        Row(
            "whole, request to active (reference: the floor)",
            "s",
            [run.total_s for run in rounds.whole],
            floor,
        ),
        Row(
            "(a) fetched by a used host (reference: as counted)",
            "MiB",
            [one / MIB for one in fetched],
            [small.move.bytes / MIB],
        ),
    ]
    result.rows += [
        Row(f"(a) … {name}", "s", [run.inner[name] for run in rounds.delta])
        for name in rounds.delta[0].inner
        if name.startswith("agent ")
    ]
    result.figures |= {
        "write_ratio_to_dd": _faster(writing, dd),
        "write_ratio_to_checked_dd": _faster(writing, checked),
        "delta_ratio_to_floor": median(
            [mine / base for mine, base in zip(delta, floor, strict=True)]
        ),
        "delta_s": _rounded(delta),
        "floor_s": _rounded(floor),
        "write_s": _rounded(writing),
        "dd_s": _rounded(dd),
        "checked_dd_s": _rounded(checked),
        "delta_fetched_bytes": [int(one) for one in fetched],
        "delta_fetched_ratio": round(max(fetched) / small.whole, 4),
        "accel": rounds.accel,
    }
    result.notes += [
        "write: the agent's own times in the lab, of a whole image to a disk of zeros; dd: "
        "curl | zstd -d | dd, then sync, of the same image to the same disk, and with its bytes "
        "read back from the disk and their sha256 compared",
        f"QEMU on {rounds.accel}; the whole image is {rounds.image_mib:,.0f} MiB compressed",
    ]


def _add_large_image(result: Result, large: LargeImage) -> None:
    result.rows += [
        Row("publish an image of 1.5 GB", "s", large.publish_s),
        Row("… publisher's peak of memory", "MiB", [large.publisher_peak_mib]),
        Row("agent's peak of memory, the same image", "MiB", [large.agent_peak_mib]),
    ]
    result.figures |= {
        "publish_s_1500_mb": median(large.publish_s),
        "publisher_peak_mib": large.publisher_peak_mib,
        "agent_peak_mib": large.agent_peak_mib,
    }
    result.notes.append(
        f"the image of 1.5 GB holds {large.data_mib:,.0f} MiB of this machine's programs and "
        "libraries; publishing compresses all of it, and syncs every chunk; peaks are VmHWM"
    )


def _seconds(runs: list[Run], names: tuple[str, ...]) -> list[float]:
    return [sum(run.inner[name] for name in names) for run in runs]


def _faster(ours: list[float], reference: list[float]) -> float:
    """Return how many times as fast ours is, by the pairs of one round."""
    return median([base / mine for mine, base in zip(ours, reference, strict=True)])


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 2) for value in values]
