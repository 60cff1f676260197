"""Runs wrk, one client program for every HTTP server that is compared."""

import json
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from provisioner.lab.lab import Lab

SPARE_LIMIT_S: Final = 30

# Each thread of wrk goes through the list from a place of its own.
_SCRIPT: Final = """
local paths = {{ {paths} }}
local at = 0
request = function()
    at = at % #paths + 1
    return wrk.format("GET", paths[at])
end
done = function(summary, latency, requests)
    local errors = summary.errors
    io.write(string.format(
        '\\n{{"requests":%d,"seconds":%f,"bytes":%d,"p50_ms":%f,"p99_ms":%f,"failures":%d}}\\n',
        summary.requests, summary.duration / 1e6, summary.bytes,
        latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
        errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
"""


@dataclass(frozen=True)
class Load:
    """What one run of wrk saw. failures counts answers other than 2xx and 3xx, too."""

    requests: int
    seconds: float
    bytes: int
    p50_ms: float
    p99_ms: float
    failures: int


def run_wrk(lab: Lab, url: str, paths: Sequence[str], *, connections: int, seconds: int) -> Load:
    """Ask for the paths in turn over `connections` connections, each again once answered."""
    with tempfile.TemporaryDirectory() as name:
        script = Path(name) / "paths.lua"
        script.write_text(_SCRIPT.format(paths=", ".join(json.dumps(path) for path in paths)))
        # One thread: the two processors are the servers' as well.
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s"]
        done = subprocess.run(
            [*lab.nsenter_argv(), *command, "-s", str(script), url],
            capture_output=True,
            text=True,
            check=True,
            timeout=seconds + SPARE_LIMIT_S,
        )
    values: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return Load(**values)
