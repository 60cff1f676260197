"""Measures a reimage, from the request to `active`, beside a floor made by hand.

The floor is the same QEMU host with the same kernel, disk and image: an init that pipes the
image through `curl | zstd -d | dd`, restarts, and comes to the end of cloud-init. Both take
turns in one run.
"""

from dataclasses import dataclass, field
from typing import Any, Final

from provisioner.imaging.ramdisk import about, ramdisks_in
from provisioner.lab.lab import Lab
from provisioner.lab.model import LabHost
from provisioner.lab.site import Site
from script.bench_parts import boot_scripts
from script.bench_parts.figures import Options, Result, Row, median, median_of
from script.bench_parts.floor_image import SCRIPT, SPARSE_SCRIPT, FloorFiles
from script.bench_parts.machine import MIB
from script.bench_parts.reimage_runs import STAGES, Run, prepare_host, run_floor, run_ours
from script.bench_parts.reimage_site import bench_profile, enrol, floor_files

VERSION: Final = "2026.11.1"
RELEASE: Final = f"debian-12@{VERSION}"
SMALL_MEMORY_MIB: Final = 768


@dataclass
class Rounds:
    """All runs. Those at one place of the three lists were made one after another."""

    ours: list[Run] = field(default_factory=list)
    floor: list[Run] = field(default_factory=list)
    sparse: list[Run] = field(default_factory=list)

    @property
    def all(self) -> list[Run]:
        return [*self.ours, *self.floor, *self.sparse]


def measure(options: Options) -> Result:
    """Return the figures of `runs` pairs of runs, and one run of a host with little memory."""
    wanted = [LabHost("bios"), LabHost("bios", memory_mib=SMALL_MEMORY_MIB)]
    with Lab.up(options.folder / "lab", wanted) as lab:
        site = Site.create(options.folder / "site", lab, say=options.say)
        profile = bench_profile(site)
        files = floor_files(options.folder, site, site.publish(VERSION), profile)
        enrol(site, profile)
        rounds = _take_turns(options, site, files)
        small = _small_host(options, site)
    scripts = boot_scripts.measure(options)
    return _result(site, files, rounds, small, scripts)


def _take_turns(options: Options, site: Site, files: FloorFiles) -> Rounds:
    lab, host = site.lab, site.lab.hosts[0]
    rounds = Rounds()
    for number in range(1, options.runs + 1):
        with site.running():
            prepare_host(lab, host)
            rounds.ours.append(run_ours(site, host, RELEASE))
        for runs, script in ((rounds.floor, SCRIPT), (rounds.sparse, SPARSE_SCRIPT)):
            prepare_host(lab, host)
            runs.append(run_floor(lab, host, files, script))
        totals = (f"{runs[-1].total_s:.1f}" for runs in (rounds.ours, rounds.floor, rounds.sparse))
        options.say(f"round {number}: ours, floor, sparse floor: {', '.join(totals)} s")
    lab.power(host.name, "off")
    return rounds


def _small_host(options: Options, site: Site) -> Run:
    host = site.lab.hosts[1]
    with site.running():
        prepare_host(site.lab, host)
        run = run_ours(site, host, RELEASE)
    options.say(f"host with {SMALL_MEMORY_MIB} MiB: {run.total_s:.1f} s")
    site.lab.power(host.name, "off")
    return run


def _rows(rounds: Rounds) -> list[Row]:
    """Return the totals, the stages that both have, and what is known from within them."""
    rows = [Row("request to active", "s", _totals(rounds.ours), _totals(rounds.floor))]
    rows.append(Row("… the floor sparse", "s", _totals(rounds.ours), _totals(rounds.sparse)))
    for stage in STAGES:
        ours, floor = (_each(runs, "stages", stage) for runs in (rounds.ours, rounds.floor))
        rows.append(Row(stage, "s", ours, floor))
    for name in dict.fromkeys(name for run in rounds.all for name in run.inner):
        ours, floor = (_each(runs, "inner", name) for runs in (rounds.ours, rounds.floor))
        rows.append(Row(f"… {name}", "s", ours, floor))
    return rows


def _totals(runs: list[Run]) -> list[float]:
    return [run.total_s for run in runs]


def _each(runs: list[Run], group: str, name: str) -> list[float]:
    return [getattr(run, group)[name] for run in runs if name in getattr(run, group)]


def _ratios(ours: list[Run], floor: list[Run]) -> list[float]:
    """Return the ratio of each pair: the two were measured one after the other."""
    return [mine.total_s / base.total_s for mine, base in zip(ours, floor, strict=True)]


def _times(rounds: Rounds) -> dict[str, Any]:
    ratios = _ratios(rounds.ours, rounds.floor)
    return {
        "ratio_to_floor": median(ratios),
        "ratio_to_floor_spread": [round(min(ratios), 3), round(max(ratios), 3)],
        "ratio_to_sparse_floor": median(_ratios(rounds.ours, rounds.sparse)),
        "seconds_by_phase": {
            name: median_of([run.stages for run in runs])
            for name, runs in (
                ("ours", rounds.ours),
                ("floor", rounds.floor),
                ("sparse_floor", rounds.sparse),
            )
        },
        "seconds_within": median_of([run.inner for run in rounds.all]),
        "ours_s": [round(value, 2) for value in _totals(rounds.ours)],
        "floor_s": [round(value, 2) for value in _totals(rounds.floor)],
        "sparse_floor_s": [round(value, 2) for value in _totals(rounds.sparse)],
    }


def _result(site: Site, files: FloorFiles, rounds: Rounds, small: Run, scripts: Result) -> Result:
    ramdisk_bytes = about(ramdisks_in(site.settings.data_dir / "ramdisks")[0])["size_bytes"]
    largest = max(rounds.ours, key=lambda run: run.service_peak_mib)
    rows = _rows(rounds)
    rows.append(Row("ramdisk, with its kernel", "MiB", [ramdisk_bytes / MIB]))
    rows.append(
        Row("service, peak of all processes", "MiB", [run.service_peak_mib for run in rounds.ours])
    )
    figures = {
        **_times(rounds),
        "ramdisk_mib": round(ramdisk_bytes / MIB, 1),
        "floor_initrd_mib": round(files.initrd_mib, 1),
        "floor_image_mib": round(files.image_mib, 1),
        f"host_{SMALL_MEMORY_MIB}_mib_s": round(small.total_s, 1),
        "service_peak_mib": round(largest.service_peak_mib, 1),
        "service_peak_by_process_mib": largest.service_by_name,
        "accel": site.lab.accel,
        **scripts.figures,
    }
    low, high = figures["ratio_to_floor_spread"]
    notes = [
        f"ratio of the pairs: median {figures['ratio_to_floor']}, {low}–{high}; to a floor that "
        f"skips zeros (dd conv=sparse, right only on a disk of zeros): "
        f"{figures['ratio_to_sparse_floor']}",
        f"a host with {SMALL_MEMORY_MIB} MiB of memory: {small.total_s:.1f} s to active",
        f"QEMU on {site.lab.accel}; the floor's image: {files.raw_mib:,.0f} MiB raw, "
        f"{files.image_mib:,.0f} MiB compressed",
        *scripts.notes,
    ]
    return Result("floor", [*rows, *scripts.rows], figures, notes)
