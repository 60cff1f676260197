"""The command line of `script/bench`: names, options, and where the result goes."""

import argparse
import importlib
import json
import signal
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from provisioner.errors import ProvisionerError
from script.bench_parts.figures import Options, Result
from script.bench_parts.machine import about_machine

# Each module has `measure(options: Options) -> Result`.
BENCHES: Final = {
    "reimage": "a reimage of a QEMU host beside a floor made by hand; about 3 minutes a run",
    "release": "what moves between releases, their space, times and memory; about 20 minutes",
    "serving": "TFTP beside dnsmasq, chunks beside nginx, boot scripts; about 4 minutes",
    "survival": "deployments after kill -9, takeover, the simulation; about 6 minutes",
}


def main() -> int:
    arguments = _arguments()
    # SIGTERM must not leave a rack or a server behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    bench = importlib.import_module(f"script.bench_parts.{arguments.name}")
    machine = about_machine()
    began = datetime.now(UTC)
    with tempfile.TemporaryDirectory(prefix="provisioner-bench-") as name:
        folder = arguments.keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Servers that give up root read files below it.
        folder.chmod(0o711)
        try:
            result: Result = bench.measure(Options(folder.resolve(), arguments.runs, _say))
        except ProvisionerError as error:
            print(f"error: {error.message}: {error.as_dict()}", file=sys.stderr)
            return error.exit_code
    print(f"{arguments.name}, {began:%Y-%m-%d %H:%M} UTC: {machine.text}\n")
    print(result.table())
    if arguments.json:
        about = {"bench": arguments.name, "at": began.isoformat(), "machine": machine.as_dict()}
        print(json.dumps({**about, **result.figures}))
    return 0


def _arguments() -> argparse.Namespace:
    names = "\n".join(f"  {name:<10} {text}" for name, text in BENCHES.items())
    parser = argparse.ArgumentParser(
        prog="script/bench",
        description=f"Measure the project beside its reference in the same run.\n\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", choices=list(BENCHES), help="one of these")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--runs", type=_runs, default=3, help="rounds of each measure (3)")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="work in this new folder and leave its logs"
    )
    return parser.parse_args()


def _runs(text: str) -> int:
    runs = int(text)
    if not 1 <= runs <= 50:
        raise argparse.ArgumentTypeError("1 to 50")
    return runs


def _say(line: str) -> None:
    print(f"[{datetime.now(UTC):%H:%M:%S}] {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
