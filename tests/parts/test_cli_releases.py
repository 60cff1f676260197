"""Releases and channels from the command line, through the API."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from provisioner.cli.image.testing import Wanted, record
from provisioner.cli.stages import Stages
from provisioner.core.releases import ReleaseUntested
from tests.parts.command_line import Cli, commands_of
from tests.parts.service_site import ACTOR, TESTED_CHANNEL, Agent, Site


@pytest.fixture
def cli(site: Site) -> Iterator[Cli]:
    with commands_of(site) as cli:
        yield cli


def test_releases_are_listed_with_their_channels(cli: Cli) -> None:
    cli("image", "promote", "tiny@1", "canary")
    lines = cli("image", "list").stdout.splitlines()
    assert lines[0].split()[:3] == ["NAME", "STATE", "CHANNELS"]
    assert lines[1].split()[:3] == ["tiny@1", "published", "canary"]
    assert cli("image", "list", "-o", "name").stdout == "tiny@1\ntiny@2\n"
    assert cli("image", "list", "--image", "other", "-o", "name").stdout == ""


def test_a_channel_moves_from_one_to_the_next(cli: Cli, site: Site) -> None:
    assert cli.json("image", "promote", "tiny@1", "canary")["name"] == "tiny:canary"
    untested = cli("image", "promote", "tiny:canary", "stable", exit_code=5)
    assert "provisioner image test" in untested.stderr
    record_test(site, is_healthy=True)
    assert "tiny:stable" in cli("image", "promote", "tiny:canary", "stable").stdout
    listed = cli("image", "channels", "-o", "name").stdout.split()
    assert listed == ["tiny:canary", "tiny:stable"]
    site.add_host()
    cli("reimage", "r1n1", "--release", "tiny:stable")
    assert site.operations.list()[0].pins["channel"] == "stable"


def record_test(site: Site, *, is_healthy: bool) -> None:
    site.releases.record_test(
        "tiny@1",
        profile="web",
        firmware=["bios", "uefi"],
        is_healthy=is_healthy,
        detail={},
        actor=ACTOR,
    )


def test_channels_and_releases_are_met_with_what_was_meant(cli: Cli) -> None:
    cli("image", "promote", "tiny@1", "canary")
    assert "tiny@1" in cli("image", "show", "tny@1", exit_code=2).stderr
    assert "tiny:canary" in cli("image", "show", "tiny:cannary", exit_code=2).stderr


def test_a_revoked_release_is_shown_as_such(cli: Cli) -> None:
    cli("image", "revoke", "tiny@1", exit_code=2)
    done = cli("image", "revoke", "tiny@1", "--reason", "CVE-2026-1")
    assert "CVE-2026-1" in done.stdout
    row = cli("image", "list").stdout.splitlines()[1]
    assert row.split()[:2] == ["tiny@1", "revoked"]


def test_a_release_is_shown_with_its_tests_and_log(cli: Cli, site: Site) -> None:
    record_test(site, is_healthy=False)
    text = cli("image", "show", "tiny@1").stdout
    assert "not healthy on bios+uefi with profile web" in text
    assert site.releases.signers("tiny@1")[0] in text
    assert cli.json("image", "show", "tiny@1")["packages"]
    cli("image", "show", "tiny@1", "--log")


def test_a_trial_keeps_a_result_for_each_firmware(site: Site) -> None:
    """What fails on one firmware does not spoil the others, and is tried again by itself."""
    manifest = site.releases.manifest("tiny@1")
    wanted = Wanted(manifest, ("bios", "uefi"), "lab", None)
    kept = record(site.releases, wanted, [ended("bios"), ended("uefi", "failed")])
    assert [(one.firmware, one.is_healthy) for one in kept] == [
        (("bios",), True),
        (("uefi",), False),
    ]
    assert list(kept[1].detail["hosts"]) == ["uefi"]
    with pytest.raises(ReleaseUntested) as caught:
        site.releases.promote("tiny@1", TESTED_CHANNEL, actor=ACTOR)
    assert caught.value.found == {"untested": [], "failed": ["uefi"]}
    record(site.releases, replace(wanted, firmware=("uefi",)), [ended("uefi")])
    site.releases.promote("tiny@1", TESTED_CHANNEL, actor=ACTOR)


def ended(host: str, phase: str = "succeeded") -> dict[str, Any]:
    """Return an operation of a trial as the API shows it."""
    return {"host": host, "phase": phase, "phase_seconds": {}, "error": None, "evidence": {}}


def test_reimage_refuses_what_contradicts_itself(cli: Cli, site: Site) -> None:
    site.add_host()
    assert "--release" in cli("reimage", "r1n1", exit_code=2).stderr
    for option in ("--full", "--hard"):
        done = cli("reimage", "r1n1", "--verify-only", "--release", "tiny@1", option, exit_code=2)
        assert option in done.stderr
    assert site.operations.list() == []
    cli("reimage", "r1n1", "--release", "tiny@1", "--full")
    assert site.operations.list()[0].options["full"] is True


def test_a_comparison_says_how_much_differs(cli: Cli, site: Site) -> None:
    site.add_host()
    queued = cli.json("reimage", "r1n1", "--verify-only", "--release", "tiny@1")
    site.worker.start_queued()
    site.perform()
    agent = Agent(site).boots()
    assert agent.hello()["mode"] == "verify"
    body = {"compared_chunks": 1000, "differing_chunks": 7, "differing_bytes": 7 * 65536}
    site.agents.compared(
        agent.token,
        {"generation": agent.generation, **body, "seconds": {"comparing": 1.5}},
        agent.source,
    )
    site.perform()
    done = cli("operation", "watch", queued[0]["id"])
    assert "7 of 1000 chunks differ" in done.stdout
    assert "448.0 KiB" in done.stdout


def test_a_long_work_says_its_stages_and_quarters(capsys: pytest.CaptureFixture[str]) -> None:
    with Stages() as stages:
        stages.say("first")
        for done in range(0, 101, 5):
            stages.progress("publishing", done, 100)
        stages.progress("exporting", 0, 0)
    told = capsys.readouterr().err.splitlines()
    assert told[0].endswith("s] first")
    assert [line.strip() for line in told[1:]] == [f"publishing: {n} %" for n in (25, 50, 75, 100)]
