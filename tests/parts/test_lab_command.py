"""`provisioner lab` as a person types it, where no host needs to run for it."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from provisioner.cli.lab import lab
from provisioner.errors import NotFound


def test_every_command_explains_itself() -> None:
    for name in lab.commands:
        done = CliRunner().invoke(lab, [name, "--help"])
        assert done.exit_code == 0
        assert lab.commands[name].help


def test_down_without_a_lab_is_fine(tmp_path: Path) -> None:
    done = CliRunner().invoke(lab, ["down", "--dir", str(tmp_path / "none")])
    assert done.exit_code == 0
    assert "no lab is up" in done.output


@pytest.mark.parametrize("command", [["status"], ["power", "x", "on"], ["exec", "--", "true"]])
def test_other_commands_without_a_lab_say_so(tmp_path: Path, command: list[str]) -> None:
    at = command.index("--") if "--" in command else len(command)
    words = [*command[:at], "--dir", str(tmp_path), *command[at:]]
    done = CliRunner().invoke(lab, words)
    assert isinstance(done.exception, NotFound)
    assert done.exception.hint


def test_unknown_firmware_is_refused_before_anything_starts(tmp_path: Path) -> None:
    done = CliRunner().invoke(lab, ["up", "--firmware", "bios,openboot", "--dir", str(tmp_path)])
    assert done.exit_code == 2
    assert "openboot" in done.output
    assert list(tmp_path.iterdir()) == []


def test_faults_are_listed() -> None:
    done = CliRunner().invoke(lab, ["fault"])
    assert "bmc-forgets-boot" in done.output
