"""What people are shown of a failure and of what follows it, and what they can say to that."""

import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from provisioner.core.model import Phase
from provisioner.core.recovery import A_PERSONS, FAILURES
from tests.parts.command_line import Cli, commands_of
from tests.parts.processes import until
from tests.parts.recovery_site import (
    fail,
    follow,
    newest_of,
    request,
    running,
    succeed,
    what,
    with_a_profile_that_proves,
)
from tests.parts.service_site import Site


@pytest.fixture
def proving_site(site: Site) -> Site:
    return with_a_profile_that_proves(site)


@pytest.fixture
def cli(proving_site: Site) -> Iterator[Cli]:
    with commands_of(proving_site) as cli:
        yield cli


def lines(text: str) -> dict[str, str]:
    """Return `key: value` lines as a mapping."""
    pairs = (line.partition(":") for line in text.splitlines())
    return {key: value.strip() for key, _, value in pairs}


def test_an_operation_says_what_comes_next_and_how_to_stop_it(cli: Cli, site: Site) -> None:
    running(site)
    failed = fail(site, request(site, "tiny@2"))
    shown = lines(cli("operation", "show", failed.id).stdout)
    assert shown["next"].startswith("attempt 2 of 3 at ")
    assert shown["way out"] == f"provisioner operation cancel {failed.id}"
    document = cli.json("operation", "show", failed.id)
    assert document["follow_up"]["what"] == "retry"
    assert document["follow_up_at"] is not None
    assert "attempt 2 of 3 at " in cli("operation", "list", "-o", "wide").stdout
    host = lines(cli("host", "show", "r1n1").stdout)
    assert "attempt 2 of 3 follows at" in host["recovery"]

    after = follow(site, failed)
    shown = lines(cli("operation", "show", failed.id).stdout)
    assert shown["next"] == f"attempt 2 of 3, as {after.id}"
    assert shown["way out"] == "-"


def test_what_comes_next_is_called_off_by_cancel(cli: Cli, site: Site) -> None:
    running(site)
    failed = fail(site, request(site, "tiny@2"), Phase.PREPARING)
    said = cli("operation", "cancel", failed.id).stdout
    assert f"{failed.id} on r1n1 is failed" in said
    assert "next: not attempt 2 of 3: called off by token:admin" in said
    assert "way out" not in said
    cli("operation", "cancel", failed.id, exit_code=2)

    half = fail(site, request(site, "tiny@2"))
    said = cli("operation", "cancel", half.id).stdout
    assert "next: quarantined: " in said
    assert "way out: provisioner host release r1n1" in said
    assert "called off" in lines(cli("host", "show", "r1n1").stdout)["quarantine reason"]


def test_a_host_says_that_it_went_back_and_why(cli: Cli, site: Site) -> None:
    running(site)
    failed = fail(site, request(site, "tiny@2", attempts=1))
    succeed(site, follow(site, failed))
    host = lines(cli("host", "show", "r1n1").stdout)
    assert host["release name"] == "tiny@1"
    assert host["recovery"].startswith("went back to tiny@1 at ")
    assert f"tiny@2 failed in {failed.id}, attempt 1 of 1 (disk_failed)" in host["recovery"]
    (known,) = cli.json("host", "show", "r1n1")["failed_releases"]
    assert (known["release_name"], known["code"]) == ("tiny@2", "disk_failed")
    assert (known["operation"], known["message"]) == (failed.id, "the disk did not take it")
    assert cli.json("host", "list")[0]["failed_releases"] == []


def test_field_09_who_names_a_release_that_failed_here_is_warned_and_gets_it(
    cli: Cli, site: Site
) -> None:
    running(site)
    failed = fail(site, request(site, "tiny@2", attempts=1))
    done = cli("reimage", "r1n1", "--release", "tiny@2")
    assert "warning: tiny@2 has failed on r1n1 before, at 2026-11-23" in done.stderr
    assert f"(disk_failed, {failed.id}): the disk did not take it" in done.stderr
    assert newest_of(site).release == failed.release
    assert what(site.at(failed)) == ("rollback", "dropped")


def test_attempts_are_asked_for_within_the_limit(cli: Cli, site: Site) -> None:
    site.add_host()
    cli("reimage", "r1n1", "--release", "tiny@1", "--attempts", "7")
    assert newest_of(site).pins["attempts_max"] == 7
    cli("reimage", "r1n1", "--release", "tiny@1", "--attempts", "11", exit_code=2)
    cli("reimage", "r1n1", "--verify-only", "--attempts", "2", exit_code=2)


def test_watching_goes_on_with_what_follows_and_tells_that_the_host_went_back(
    cli: Cli, site: Site
) -> None:
    running(site)
    failed = fail(site, request(site, "tiny@2", attempts=2))

    def be_looked_at() -> None:
        """Return when the watch has shown how it stands now: it asks again after that."""
        before = len(cli.asked)
        until(lambda: len(cli.asked) >= before + 3)

    def go_on() -> None:
        be_looked_at()
        site.clock.at += timedelta(minutes=1)
        site.recovery.take_due()
        second = fail(site, newest_of(site))
        be_looked_at()
        site.recovery.take_due()
        assert newest_of(site).id != second.id
        succeed(site, newest_of(site))

    thread = threading.Thread(target=go_on)
    thread.start()
    done = cli("operation", "watch", failed.id, exit_code=4)
    thread.join()
    assert "r1n1 failed: the disk did not take it; next: attempt 2 of 2 at " in done.stderr
    assert "next: back to tiny@1" in done.stderr
    assert "r1n1 succeeded" in done.stderr
    assert "went back, since op_" in done.stdout
    assert "tiny@1" in done.stdout.splitlines()[-1]


def test_watching_ends_at_quarantine_with_the_way_out(cli: Cli, site: Site) -> None:
    site.add_host()
    failed = fail(site, request(site, "tiny@1", attempts=1))
    done = cli("operation", "watch", failed.id, exit_code=4)
    assert "next:     quarantined: tiny@1 failed in" in done.stderr
    assert "way out:  provisioner host release r1n1" in done.stderr
    refused = cli("reimage", "r1n1", "--release", "tiny@1", exit_code=2)
    assert "it is quarantined: tiny@1 failed in" in refused.stderr
    cli("host", "release", "r1n1")
    cli("reimage", "r1n1", "--release", "tiny@1")


def test_the_page_names_every_failure_that_has_a_rule_of_its_own() -> None:
    page = (Path(__file__).parents[2] / "docs" / "recovery.md").read_text()
    assert not [code for code in [*FAILURES, *A_PERSONS] if f"`{code}`" not in page]
