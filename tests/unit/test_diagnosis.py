"""Each cause is told from its neighbours, and what is said of it can be read and followed."""

import string
from dataclasses import replace

import pytest

from provisioner.core.causes import CAUSES
from provisioner.core.diagnosis import EVIDENCE_MAX, TEXT_MAX, Case, Diagnosis, Facts, diagnose
from provisioner.core.model import Kind, Phase
from provisioner.core.recovery import A_PERSONS, FAILURES

from .boot_stories import (
    ACTIVE,
    ASKED,
    DONE,
    GRUB_FILE,
    QUARANTINED,
    STORIES,
    TOLD,
    UNWATCHED,
    WATCHED,
    after,
    ended_by,
    failed,
    fetch,
    heard,
    line,
    power_on,
    story,
    under_way,
    unheard,
)
from .examples import HOST, operation_in

NUMBERED = [f"{number:03}-{name}" for number, (name, _) in enumerate(STORIES)]


def of(facts: Facts) -> Diagnosis:
    return diagnose(facts, CAUSES)


@pytest.mark.parametrize(("cause", "facts"), STORIES, ids=NUMBERED)
def test_a_boot_stands_where_it_stands_for_the_right_cause(cause: str, facts: Facts) -> None:
    found = of(facts)
    assert found.cause == cause
    for text in (found.stands, found.why, *found.next):
        assert text.strip()
        assert "\n" not in text


def test_every_cause_has_a_story_and_a_name_of_its_own() -> None:
    names = [cause.name for cause in CAUSES]
    assert len(names) == len(set(names))
    assert {name for name, _ in STORIES} == set(names)


def test_what_a_cause_says_names_only_what_is_known() -> None:
    known = set(Case(story(None)).words)
    for cause in CAUSES:
        for text in (cause.why, *cause.next):
            assert {name for _, name, _, _ in string.Formatter().parse(text) if name} <= known


@pytest.mark.parametrize("code", sorted({*FAILURES, *A_PERSONS}))
def test_no_failure_with_a_rule_of_its_own_is_just_a_failure(code: str) -> None:
    facts = ended_by(code, Phase.QUEUED if code == "queued_timed_out" else Phase.PREPARING)
    assert of(facts).cause != "failed" or code == "trust"


def test_it_says_which_start_of_how_many_it_is() -> None:
    assert of(under_way(Phase.NETBOOTING, 5, rung=1)).stands == (
        "deployment of web@1 is netbooting, start 2 of 3"
    )


def test_it_says_in_which_phase_it_failed_and_what_it_follows_and_what_follows() -> None:
    facts = ended_by("disk_failed", Phase.WRITING)
    facts = replace(facts, before="another attempt, since op_0 failed (bug)", follows="attempt 3")
    assert of(facts).stands == (
        "deployment of web@1 failed in writing; another attempt, since op_0 failed (bug); attempt 3"
    )


def test_flags_stand_beside_it_whatever_the_cause_is() -> None:
    marked = replace(QUARANTINED, is_protected=True, in_maintenance=True, is_confirmed=False)
    found = of(story(failed("disk_failed", Phase.WRITING), host=marked))
    assert found.cause == "disk_write_failed"
    assert found.stands.endswith(
        "quarantined (web@1 failed in op_1), protected, in maintenance, not confirmed"
    )
    assert found.next[-1] == "provisioner host release r1n7: ends its quarantine"


def test_a_host_that_nothing_was_done_to_says_so() -> None:
    assert of(story(None)).stands == "nothing was ever done to it; it is dirty"
    inspected = operation_in(Phase.SUCCEEDED, Kind.INSPECTION)
    assert of(story(inspected, host=ACTIVE)).stands == "inspection succeeded"


def test_what_would_refuse_a_reimage_is_to_be_done_before_it() -> None:
    (only,) = of(story(None)).next
    assert only == "provisioner reimage r1n7 --release RELEASE"
    bare = replace(HOST, bmc=None, profile=None, in_maintenance=True, is_protected=True)
    *before, last = of(story(None, host=bare)).next
    assert last == only
    assert [" ".join(step.split()[1:4]) for step in before] == [
        "host unprotect r1n7",
        "host maintenance r1n7",
        "host change r1n7",
        "host change r1n7",
    ]


def test_what_is_still_to_come_and_what_writes_nothing_yet_can_be_called_off() -> None:
    waiting = replace(failed("disk_failed", Phase.WRITING), follow_up_at=after(100))
    assert of(story(waiting)).next[-1] == "provisioner operation cancel op_1: calls it off"
    assert of(under_way(Phase.PREPARING, 5)).next[-1:] == (
        "provisioner operation cancel op_1: calls it off",
    )
    assert not of(under_way(Phase.WRITING, 5, **heard(1))).next
    assert not of(story(DONE, host=ACTIVE)).next


def test_it_shows_the_lines_that_show_it_and_no_other() -> None:
    seen = of(unheard(*TOLD, line("agent", 66), line("service", 67))).evidence
    assert [one.source for one in seen] == ["dhcp", "dhcp", "dhcp", "dhcp", "tftp", "http"]
    assert list(seen) == sorted(seen, key=lambda one: one.at)


def test_the_newest_lines_are_shown_and_one_that_is_repeated_once() -> None:
    asked = [replace(ASKED, at=after(60 + number), text="asks") for number in range(50)]
    (only,) = of(unheard(*asked)).evidence[1:]
    assert only.at == after(109)
    different = [replace(one, text=f"asks {number}") for number, one in enumerate(asked)]
    shown = of(unheard(*different)).evidence
    assert len(shown) == EVIDENCE_MAX
    assert shown[-1].text == "asks 49"


def test_what_came_from_elsewhere_is_cut() -> None:
    found = of(ended_by("no_disk_matches", found="x" * 10_000))
    assert "x" * 100 in found.why
    assert len(found.why) < TEXT_MAX + 200
    (shown, *_) = of(unheard(line("http", 50, "y" * 10_000))).evidence[-1:]
    assert len(shown.text) == TEXT_MAX


def test_figures_are_told_where_there_are_any() -> None:
    report = {"progress": {"done_bytes": 50, "total_bytes": 200}}
    assert "at 25 % of 200 bytes" in of(under_way(Phase.WRITING, 5, **report)).why
    nothing = {"progress": {"done_bytes": 0, "total_bytes": 0}}
    assert "no figures" in of(under_way(Phase.WRITING, 5, **nothing)).why


def test_it_says_how_far_a_download_came_and_how_often_it_broke_off() -> None:
    cuts = [fetch("ramdisk", "cut", 70 + number, 1024) for number in range(3)]
    assert (
        "broke off once, at last after 1024 of 4096 bytes" in of(unheard(*WATCHED, *cuts[:1])).why
    )
    assert "its ramdisk was not fetched whole: the download broke off 3 times" in (
        of(unheard(*WATCHED, *cuts)).why
    )
    by_tftp = line("tftp", 70, file=GRUB_FILE + "initrd", outcome="aborted", sent_bytes=77)
    assert "after 77 bytes" in of(unheard(*TOLD, by_tftp)).why


def test_where_downloads_are_not_seen_none_is_said_to_have_failed() -> None:
    found = of(unheard(*UNWATCHED))
    assert found.cause == "ramdisk_not_heard"
    assert "its downloads are not seen here" in found.why.lower()
    assert "never asked" not in found.why


def test_what_was_before_the_start_and_after_the_end_is_not_of_this_boot() -> None:
    facts = unheard()
    early, late = replace(ASKED, at=after(-5)), replace(ASKED, at=after(4000))
    assert of(replace(facts, events=(early, power_on(), late))).cause == "nothing_heard"


def test_a_host_without_a_bmc_has_one_nowhere() -> None:
    facts = ended_by("bmc_unreachable", Phase.NETBOOTING)
    assert "at 127.0.1.1 port 623" in of(facts).why
    assert "at none" in of(replace(facts, host=replace(HOST, bmc=None))).why


def test_a_disk_is_called_what_is_printed_on_it() -> None:
    written = {"serial": "S-1", "wwn": None, "size_bytes": 4096}
    running = {"name": "sdb", "serial": None, "wwn": "naa.5000c500a1b2c3d4"}
    facts = ended_by("wrong_disk", Phase.BOOTING, expected=written, found=running)
    assert "written was S-1, it runs from sdb (naa.5000c500a1b2c3d4)" in of(facts).why
    unmarked = {"name": "sdb", "serial": None, "wwn": None}
    facts = ended_by("wrong_disk", Phase.BOOTING, expected=written, found=unmarked)
    assert "'name': 'sdb'" in of(facts).why
