"""Measures how soon a host gets its boot script, with 100 hosts that each have a live ticket.

Three kinds of load: each host asks once within one second, as a rack does that was switched
on; all ask in the same instant; and 100 connections ask again as soon as they are answered
(a closed loop, which saturates the service: there the time is the queue's).
"""

import json
import statistics
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from provisioner.lab.lab import Lab
from provisioner.lab.model import LabHost
from provisioner.lab.site import Site
from script.bench_parts.boot_service import HOSTS, boot_listener, mac_of, make_site, queue_hosts
from script.bench_parts.figures import Options, Result, Row, median
from script.bench_parts.wrk import run_wrk

VERSION: Final = "2026.11.1"
ROUNDS_PER_RUN: Final = 5
LOOP_SECONDS: Final = 5
CLIENT: Final = Path(__file__).with_name("boot_clients.py")
CLIENT_LIMIT: Final = timedelta(seconds=120)
EXPECTED: Final = "provisioner.ticket="


def measure(options: Options) -> Result:
    """Return script_p99_ms and what belongs to it, on a service of its own."""
    folder = Path(tempfile.mkdtemp(prefix="boot-", dir=options.folder))
    with Lab.up(folder / "lab", [LabHost("bios")]) as lab:
        site = make_site(folder / "site", lab, options.say)
        queue_hosts(site, site.publish(VERSION).name)
        with boot_listener(site):
            return measure_site(site, options)


def measure_site(site: Site, options: Options) -> Result:
    """Measure a boot listener that runs."""
    paths = [
        f"/boot/ipxe?mac={mac_of(number).replace(':', '-')}&platform=pcbios"
        for number in range(HOSTS)
    ]
    url = site.settings.boot.url
    _ask(site.lab, url, paths, over_s=1.0, rounds=1)  # the first answer of a process is slower
    spread, burst, loops = [], [], []
    for number in range(options.runs):
        options.say(f"boot scripts, run {number + 1}")
        spread.append(_ask(site.lab, url, paths, over_s=1.0, rounds=ROUNDS_PER_RUN))
        burst.append(_ask(site.lab, url, paths, over_s=0.0, rounds=ROUNDS_PER_RUN))
        loops.append(run_wrk(site.lab, url, paths, connections=HOSTS, seconds=LOOP_SECONDS))
    rates = [loop.requests / loop.seconds for loop in loops]
    failures = sum(one["failures"] for one in spread + burst) + sum(loop.failures for loop in loops)
    rows = [
        Row("boot script, 100 hosts within 1 s, p50", "ms", [one["p50_ms"] for one in spread]),
        Row("boot script, 100 hosts within 1 s, p99", "ms", [one["p99_ms"] for one in spread]),
        Row("boot script, 100 in one instant, p99", "ms", [one["p99_ms"] for one in burst]),
        Row("boot script, 100 in a closed loop, p99", "ms", [loop.p99_ms for loop in loops]),
        Row("boot scripts, 100 in a closed loop", "1/s", rates),
    ]
    figures: dict[str, Any] = {
        "script_p99_ms": median([one["p99_ms"] for one in spread]),
        "script_p50_ms": median([one["p50_ms"] for one in spread]),
        "script_p99_one_instant_ms": median([one["p99_ms"] for one in burst]),
        "script_p99_saturated_ms": median([loop.p99_ms for loop in loops]),
        "script_requests_per_s": round(statistics.median(rates)),
        "script_failures": failures,
    }
    note = (
        "script_p99_ms: 100 hosts with a live ticket ask once each, at random moments of one "
        f"second, {ROUNDS_PER_RUN} rounds a run, a new connection each, from connect to the "
        f"last byte; {failures} failures in all loads"
    )
    return Result("", rows, figures, [note])


def _ask(lab: Lab, url: str, paths: list[str], *, over_s: float, rounds: int) -> dict[str, Any]:
    """Let every path be asked for once in each round, at random moments of `over_s` seconds."""
    wish = {"url": url, "paths": paths, "over_s": over_s, "rounds": rounds, "expected": EXPECTED}
    done = subprocess.run(
        [*lab.nsenter_argv(), sys.executable, "-I", str(CLIENT)],
        input=json.dumps(wish),
        capture_output=True,
        text=True,
        check=True,
        timeout=CLIENT_LIMIT.total_seconds(),
    )
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures
