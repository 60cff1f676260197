"""Failpoints stand at every commit and every effect, and cannot be switched on by mistake."""

import ast
import inspect
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from provisioner.core.contracts import Bmc, Outgoing, Store
from provisioner.core.effects import PowerOff
from provisioner.core.model import BootDevice, OperationId
from provisioner.errors import ConfigError
from provisioner.failpoints import (
    ARMED,
    CONSENT,
    FIRED,
    TRACE,
    VARIABLE,
    Point,
    WatchedBmc,
    WatchedEffects,
    WatchedStore,
    find_failpoints,
)
from tests.parts.fake_bmc import FakeBmc
from tests.parts.stores import NOW, a_host

ROOT: Final = Path(__file__).resolve().parents[2]
ARGUMENTS: Final[dict[str, dict[str, Any]]] = {
    "power_off": {"soft": True},
    "set_next_boot": {
        "device": BootDevice.DISK,
        "persistent": False,
        "uefi": False,
        "hold_timer": False,
    },
}


def verbs() -> list[str]:
    """Return every exchange with a BMC that the port has."""
    return [name for name, _ in inspect.getmembers(Bmc, inspect.isfunction) if name[0] != "_"]


@pytest.mark.parametrize("verb", verbs())
def test_every_exchange_with_a_bmc_passes_its_own_two_points(verb: str) -> None:
    passed: list[str] = []
    bmc = FakeBmc(on_exchange=lambda _: passed.append("exchange"))
    getattr(WatchedBmc(bmc, passed.append), verb)(**ARGUMENTS.get(verb, {}))
    assert passed == [f"bmc.{verb}.before", "exchange", f"bmc.{verb}.after"]


def test_every_commit_passes_two_points_and_nothing_else_does(store: Store) -> None:
    passed: list[Point] = []
    watched = WatchedStore(store, passed.append)
    with watched.begin() as tx:
        tx.add_host(a_host())
        assert not passed
    assert passed == [Point.COMMIT_BEFORE, Point.COMMIT_AFTER]
    with pytest.raises(ZeroDivisionError), watched.begin() as tx:
        tx.audit(NOW, "a", "b", "c", {"never": 1 // 0})
    with watched.read() as tx:
        assert tx.hosts() == [a_host()]
    assert len(passed) == 2


def test_a_commit_while_an_effect_is_performed_is_the_feeding_back(store: Store) -> None:
    passed: list[Point] = []
    watched = WatchedStore(store, passed.append)

    class Effects:
        def start(self, perform: Any) -> None:
            perform(Outgoing("key", "bmc", OperationId("op_1"), 1, PowerOff(soft=True)))

        def stop(self) -> None:
            """Nothing runs."""

    def perform(_: Outgoing) -> None:
        with watched.begin() as tx:
            tx.add_host(a_host())

    WatchedEffects(Effects(), passed.append).start(perform)
    assert passed == [
        Point.EFFECT_BEFORE,
        Point.FEEDBACK_BEFORE,
        Point.FEEDBACK_AFTER,
        Point.EFFECT_AFTER,
    ]


# Who else commits, and why no failpoint stands there.
COMMITS_ALLOWED: Final = {
    "store/sql_store.py": "the store itself, which is watched from outside",
    "store/migrate.py": "the schema, in one transaction, before any part runs",
}


def test_nobody_commits_past_the_store() -> None:
    """A transaction that were begun elsewhere would have no failpoint."""
    found = set()
    for path in sorted((ROOT / "provisioner").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                whose = ast.unparse(node.func.value)
                name = node.func.attr
                begins = name == "begin" and not whose.endswith("store")
                if begins or (name == "commit" and whose != "self"):
                    found.add(str(path.relative_to(ROOT / "provisioner")))
    assert found == set(COMMITS_ALLOWED)


def test_every_point_is_passed_by_somebody() -> None:
    """The set is closed: a point that nothing passes any more has to go."""
    bmc = {f"bmc.{verb}.{when}" for verb in verbs() for when in ("before", "after")}
    ours = {
        f"{what}.{when}" for what in ("commit", "effect", "feedback", "mark") for when in POINT_ENDS
    }
    blobs = {f"blob.{what}.{when}" for what in ("write", "place", "delete") for when in POINT_ENDS}
    assert {str(point) for point in Point} == bmc | ours | blobs


POINT_ENDS: Final = ("before", "after")


def test_they_are_off_unless_a_folder_consents(tmp_path: Path) -> None:
    assert find_failpoints(None) is None
    assert find_failpoints("") is None
    for value in ("1", "true", "kill worker commit.before 1", "failpoints", str(tmp_path)):
        with pytest.raises(ConfigError, match=VARIABLE):
            find_failpoints(value)
    (tmp_path / CONSENT).touch()
    assert find_failpoints(str(tmp_path)) is not None


@pytest.mark.parametrize("words", [["serve"], ["serve", "--only", "tftp"]])
def test_a_service_whose_environment_names_no_such_folder_does_not_start(
    tmp_path: Path, words: list[str]
) -> None:
    def provisioner(*arguments: str, **more: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "provisioner", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, **more},
        )

    provisioner("init", str(tmp_path / "site"))
    config = str(tmp_path / "site" / "provisioner.toml")
    done = provisioner(*words, "--config", config, **{VARIABLE: str(tmp_path)})
    assert done.returncode == ConfigError.exit_code
    assert f"unset {VARIABLE}" in done.stderr


def test_an_armed_point_fires_once_and_at_its_own_hit(tmp_path: Path) -> None:
    """In a process of its own, which it kills: the third commit of the api, and no other."""
    (tmp_path / CONSENT).touch()
    (tmp_path / ARMED).write_text("kill api commit.after 3")
    code = (
        "import sys; from provisioner.failpoints import Point, find_failpoints\n"
        "points = find_failpoints(sys.argv[1])\n"
        "other, reach = points.of('worker'), points.of('api')\n"
        "for _ in range(9):\n"
        "    other(Point.COMMIT_AFTER); reach(Point.COMMIT_BEFORE); reach(Point.COMMIT_AFTER)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    trace = (tmp_path / TRACE).read_text().splitlines()
    assert trace.count("api commit.after") == 3
    assert (tmp_path / FIRED).read_text() == "kill api commit.after 3"
    assert done.stdout.count("FAILPOINTS ARE ON") == 2
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, "once fired, it is over"
