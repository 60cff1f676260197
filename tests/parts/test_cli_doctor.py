"""`provisioner doctor --bmcs` against an API whose BMCs take their time."""

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result
from flask import Flask

from provisioner.cli.doctor import BMCS_AT_ONCE
from provisioner.cli.main import main
from tests.parts.http_listener import listening

BMC = {"address": "127.0.1.1", "port": 623, "user": "admin"}
NAMES = [f"r1n{number}" for number in range(2 * BMCS_AT_ONCE)]
TOGETHER_LIMIT_S = 60.0


@contextmanager
def slow_bmcs() -> Iterator[str]:
    """Yield an API that says nothing of a BMC's power until as many as are allowed were asked."""
    together = threading.Barrier(BMCS_AT_ONCE, timeout=TOGETHER_LIMIT_S)
    app = Flask("slow")

    @app.get("/api/v1/hosts")
    def hosts() -> dict[str, Any]:
        return {"hosts": [{"name": name, "bmc": BMC} for name in NAMES], "next": ""}

    @app.post("/api/v1/hosts/<name>/power")
    def power(name: str) -> dict[str, Any]:  # noqa: ARG001  Flask names it
        together.wait()
        return {"power": "on"}

    @app.post("/api/v1/hosts/<name>/bmc-check")
    def check(name: str) -> dict[str, Any]:
        weak = {"message": "accepts cipher suite 0", "hint": "switch it off"}
        return {"findings": [weak] if name == NAMES[0] else []}

    with listening(app) as url:
        yield url


def doctor(folder: Path, url: str) -> Result:
    address = url.removeprefix("http://")
    made = CliRunner().invoke(main, ("init", str(folder), "--api-listen", address))
    assert made.exit_code == 0, made.output
    return CliRunner().invoke(main, ("doctor", "--bmcs", "--config", str(folder)))


def test_bmcs_are_asked_several_at_a_time_and_told_in_order(tmp_path: Path) -> None:
    """Hundreds that are silent, one after the other, would take an hour."""
    with slow_bmcs() as url:
        done = doctor(tmp_path / "site", url)
    told = re.findall(r"^(\w+) +bmc of (\w+): (.*)$", done.stdout, re.MULTILINE)
    first, *rest = [("ok", name, "power is on") for name in NAMES]
    assert told == [first, ("warn", NAMES[0], "accepts cipher suite 0"), *rest]


def test_without_a_service_the_other_findings_are_told_all_the_same(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody else gets the port, and nobody listens on it
        done = doctor(tmp_path / "site", f"http://127.0.0.1:{taken.getsockname()[1]}")
    assert done.exit_code == 78
    assert re.search(r"^ok +configuration: ", done.stdout, re.MULTILINE)
    assert re.search(r"^fail +bmcs: the service at .* does not answer$", done.stdout, re.MULTILINE)
