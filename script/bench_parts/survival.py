"""Measures what becomes of deployments when the service dies in the middle: in its own next life,
by another replica, and in the simulation."""

import os
import re
import secrets
import subprocess
import sys
import tempfile
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Final

from provisioner.errors import Unavailable
from script.bench_parts.figures import Options, Result, Row, Say, median
from script.bench_parts.survival_resume import HOSTS, Resumed, measure_resume, p99
from script.bench_parts.survival_service import ALL, ROOT
from script.bench_parts.survival_takeover import Takeovers, measure_takeover
from tests.sim.batches import SEEDS_PER_BATCH

SEED_MAX: Final = 1_000_000
# Seeds that script/soak runs as well, the same in every run: this is to measure, not to find.
SIM_SEEDS_PER_RUN: Final = 40
SIM_LIMIT: Final = timedelta(minutes=10)
_RATE: Final = re.compile(r"^sim_reimages_per_s_core ([0-9.]+)$", re.MULTILINE)


def measure(options: Options) -> Result:
    """Return all figures; the three parts run one after another."""
    folder = Path(tempfile.mkdtemp(prefix="survival-", dir=options.folder))
    # Below it is a database whose server has given up root.
    folder.chmod(0o755)
    seed = secrets.randbelow(SEED_MAX)
    options.say(f"survival, seed {seed}")
    result = Result("reference")
    add_resume(result, measure_resume(folder, options.runs, seed, options.say))
    add_takeover(result, measure_takeover(folder, options.runs, seed, options.say))
    rates = [_sim_rate(1 + run * SEEDS_PER_BATCH, options.say) for run in range(options.runs)]
    result.rows.append(Row("simulated reimages, each core", "1/s", rates))
    result.figures |= {"sim_reimages_per_s_core": median(rates), "seed": seed}
    return result


def add_resume(result: Result, found: Resumed) -> None:
    for victim in dict.fromkeys(kill.victim for kill in found.kills):
        what = f"{victim} killed, until each goes on"
        bare = found.bare_s if victim == ALL else ()
        result.rows.append(
            Row(f"{what} (reference: bare restart)" if bare else what, "s", found.of(victim), bare)
        )
    open_ = sum(kill.open_ for kill in found.kills)
    proven = sum(kill.proven for kill in found.kills)
    again = sum(kill.again for kill in found.kills)
    result.figures |= {
        "resumed_share": round(proven / open_, 4) if open_ else None,
        "resumed_again": again,
        "deployments_killed": open_,
        "kills": dict(Counter(kill.victim for kill in found.kills)),
        "resume_p99_s": round(p99(found.all()), 2),
        "resume_p99_all_killed_s": round(p99(found.of(ALL)), 2),
        "bare_restart_s": median(found.bare_s),
    }
    result.notes.append(
        f"{len(found.kills)} kills among {HOSTS} deployments each; {open_} had not ended, "
        f"{proven} of these succeeded, {again} of them by another attempt (a seed leaves once); "
        f"99 % of {len(found.all())} that stood still went on within {p99(found.all()):.2f} s"
    )
    result.notes += [why for kill in found.kills for why in kill.failures]


def add_takeover(result: Result, found: Takeovers) -> None:
    noticed = "reference: PostgreSQL drops the session"
    result.rows += [
        Row(
            f"replica killed, until the other has each effect ({noticed})",
            "s",
            found.taken_s,
            found.noticed_s,
        ),
        Row(
            "… until it speaks to the host's BMC (reference: the lease)",
            "s",
            found.performed_s,
            [found.lease_s],
        ),
    ]
    result.figures |= {
        "takeover_p99_s": round(p99(found.performed_s), 2),
        "takeover_share": round(found.proven / found.open_, 4) if found.open_ else None,
        "takeovers": len(found.taken_s),
        "session_dropped_s": median(found.noticed_s),
    }
    result.notes.append(
        f"{len(found.taken_s)} effects were in the hands of a replica that was killed; "
        f"{found.proven} of {found.open_} deployments that had not ended succeeded; "
        f"99 % were performed by the other within {p99(found.performed_s):.2f} s"
    )
    result.notes += found.failures


def _sim_rate(seed: int, say: Say) -> float:
    """Return simulated reimages per second and core, over all cores. Raises Unavailable when an
    invariant was broken: then there is something better to do than to measure."""
    say(f"simulation, {SIM_SEEDS_PER_RUN} runs from seed {seed}")
    command = [sys.executable, "-m", "tests.sim", "--seed", str(seed)]
    done = subprocess.run(
        [*command, "--runs", str(SIM_SEEDS_PER_RUN)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": ROOT},
        capture_output=True,
        text=True,
        check=False,
        timeout=SIM_LIMIT.total_seconds(),
    )
    said = _RATE.search(done.stdout)
    if said is None:
        raise Unavailable("the simulation failed", found=done.stdout[-2000:] + done.stderr[-2000:])
    return float(said[1])
