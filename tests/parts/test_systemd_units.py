"""The units: rated by systemd itself, sound, and alike but for what one needs more."""

import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import pytest

FOLDER: Final = Path(__file__).parent.parent.parent / "systemd"
PARTS: Final = ("api", "boot", "tftp", "dhcp", "worker")
EXPOSURE_MAX: Final = 1.5
TOOL_LIMIT_S: Final = 300

# What a part may have beyond the others, and why.
CAPABILITIES: Final[Mapping[str, set[str]]] = {
    "tftp": {"CAP_NET_BIND_SERVICE"},  # port 69
    # Port 67; router advertisements and pings; entries for hosts without an address yet.
    "dhcp": {"CAP_NET_BIND_SERVICE", "CAP_NET_RAW", "CAP_NET_ADMIN"},
}
DIFFERS: Final = frozenset(
    {
        "Description",
        "After",
        "ExecStart",
        "CapabilityBoundingSet",
        "AmbientCapabilities",
        "PrivateUsers",
        "RestrictAddressFamilies",
        "IPAddressDeny",
        "IPAddressAllow",
    }
)

pytestmark = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd is not installed"
)


def unit(part: str) -> Path:
    return FOLDER / f"provisioner-{part}.service"


def settings(part: str) -> list[tuple[str, str]]:
    lines = unit(part).read_text().splitlines()
    return [(key, value) for key, _, value in (line.partition("=") for line in lines) if value]


def run(*command: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=TOOL_LIMIT_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_there_is_a_unit_for_each_part_and_no_other() -> None:
    found = {path.name for path in FOLDER.glob("*.service")}
    assert found == {f"provisioner-{part}.service" for part in PARTS}


@pytest.mark.parametrize("part", PARTS)
def test_systemd_rates_a_unit_at_1_5_or_better(part: str) -> None:
    said = run("systemd-analyze", "security", "--offline=true", "--no-pager", str(unit(part)))
    rating = re.search(r"exposure level for \S+: ([\d.]+)", said)
    assert rating is not None, said
    assert float(rating[1]) <= EXPOSURE_MAX


def test_the_units_are_sound(tmp_path: Path) -> None:
    """systemd finds no unknown setting, no loop and nothing missing but the program."""
    for path in [*FOLDER.glob("*.service"), *FOLDER.glob("*.target")]:
        text = re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", path.read_text(), flags=re.M)
        (tmp_path / path.name).write_text(text)
    units = [str(path) for path in sorted(tmp_path.iterdir())]
    said = run("systemd-analyze", "verify", "--recursive-errors=no", *units)
    assert not [
        line for line in said.splitlines() if str(tmp_path) in line or "provisioner" in line
    ]


@pytest.mark.parametrize("part", PARTS)
def test_a_part_has_the_capabilities_it_needs_and_no_more(part: str) -> None:
    given = dict(settings(part))
    for key in ("CapabilityBoundingSet", "AmbientCapabilities"):
        assert set(given.get(key, "").split()) == CAPABILITIES.get(part, set())
    assert f"{part}.service" in unit(part).name
    assert given["ExecStart"].endswith(f"--only {part}")
    # Capabilities do not reach the network from a user namespace, so only those go without.
    assert given["PrivateUsers"] == ("no" if part in CAPABILITIES else "yes")


@pytest.mark.parametrize("part", PARTS)
def test_all_else_is_alike(part: str) -> None:
    def alike(name: str) -> list[tuple[str, str]]:
        return [pair for pair in settings(name) if pair[0] not in DIFFERS]

    assert alike(part) == alike("worker")


def test_the_target_starts_every_part() -> None:
    text = (FOLDER / "provisioner.target").read_text()
    assert set(re.findall(r"provisioner-(\w+)\.service", text)) == set(PARTS)


@pytest.mark.parametrize("part", PARTS)
def test_no_unit_carries_a_secret(part: str) -> None:
    assert not [key for key, _ in settings(part) if key.startswith(("Environment", "PassEnv"))]


def test_the_user_and_the_folders_can_be_made(tmp_path: Path) -> None:
    for name in ("sysusers", "tmpfiles"):
        target = tmp_path / f"etc/{name}.d"
        target.mkdir(parents=True)
        shutil.copy(FOLDER / f"{name}.d" / "provisioner.conf", target)
    run("systemd-sysusers", f"--root={tmp_path}", "provisioner.conf")
    users = (tmp_path / "etc/passwd").read_text()
    assert re.search(r"^provisioner:x:\d+:\d+:Provisioner:/var/lib/provisioner:", users, re.M)
    run("systemd-tmpfiles", f"--root={tmp_path}", "--create", "provisioner.conf")
    assert (tmp_path / "var/lib/provisioner").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "etc/provisioner").stat().st_mode & 0o777 == 0o750
