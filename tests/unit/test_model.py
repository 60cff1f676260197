"""The nouns keep their secrets, and answer the questions that others ask of them."""

import logging
import pickle
import traceback
from dataclasses import replace
from datetime import timedelta

import pytest

from provisioner.core.model import (
    FINAL,
    BmcAddress,
    HostState,
    OperationId,
    Phase,
    ReleaseRow,
    Secret,
    Ticket,
)
from tests.unit.examples import HOST, NOW, OPERATION, RELEASE, operation_in

CANARY = "canary-7f3a-do-not-show"


def test_a_secret_shows_itself_only_when_asked() -> None:
    secret = Secret(CANARY)
    assert secret.reveal() == CANARY
    shown = [repr(secret), str(secret), f"{secret}", f"{secret!r:>40}", "%s" % secret]  # noqa: UP031 # the old way leaks, too
    assert not [text for text in shown if CANARY in text]


def test_field_21_a_secret_does_not_reach_a_log_or_a_traceback() -> None:
    record = logging.LogRecord("x", 20, "x", 1, "address %s", (HOST.bmc,), None)
    assert "example" not in record.getMessage()
    error = ValueError(BmcAddress("127.0.1.1", 623, "admin", Secret(CANARY)))
    assert CANARY not in "".join(traceback.format_exception(error))


def test_a_secret_inside_any_noun_stays_hidden() -> None:
    host = replace(HOST, bmc=BmcAddress("127.0.1.1", 623, "admin", Secret(CANARY)))
    assert CANARY not in repr(host)


def test_secrets_compare_by_value_and_hash_alike() -> None:
    assert Secret("a") == Secret("a")
    assert Secret("a") != Secret("b")
    assert Secret("a") != "a"
    assert len({Secret("a"), Secret("a"), Secret("b")}) == 2


def test_a_secret_has_no_other_place_to_keep_its_value() -> None:
    assert not hasattr(Secret("a"), "__dict__")
    with pytest.raises(AttributeError):
        Secret("a").value = "b"  # type: ignore[attr-defined] # that is the point
    assert pickle.loads(pickle.dumps(HOST)) == HOST  # values cross a process boundary whole


@pytest.mark.parametrize(
    ("changes", "deployed", "disturbed"),
    [
        ({}, None, None),
        ({"state": HostState.RETIRED}, "it is retired", "it is retired"),
        ({"in_maintenance": True}, "it is in maintenance", "it is in maintenance"),
        ({"is_confirmed": False}, "it was discovered and nobody has confirmed it", None),
        ({"is_protected": True}, "it is protected", None),
        ({"quarantine_reason": "fan"}, "it is quarantined: fan", None),
    ],
    ids=lambda value: str(value)[:30],
)
def test_flags_say_why_a_host_is_left_alone(
    changes: dict[str, object], deployed: str | None, disturbed: str | None
) -> None:
    host = replace(HOST, **changes)  # type: ignore[arg-type] # a case names its own fields
    assert host.why_not_rebuilt == deployed
    assert host.why_not_disturbed == disturbed


@pytest.mark.parametrize("phase", Phase)
def test_an_operation_has_ended_in_three_phases_only(phase: Phase) -> None:
    assert operation_in(phase).is_final == (phase in FINAL)


def test_a_ticket_lives_until_it_is_used_or_expires() -> None:
    ticket = Ticket("aa", OperationId("op_1"), HOST.id, 7, NOW + timedelta(seconds=10))
    assert ticket.is_live(NOW)
    assert ticket.is_live(NOW + timedelta(seconds=9))
    assert not ticket.is_live(NOW + timedelta(seconds=10))
    assert not replace(ticket, consumed_at=NOW).is_live(NOW)


def test_a_release_is_named_by_image_and_version() -> None:
    row = ReleaseRow(RELEASE, "web", "2026.11.2", 1, 1, 1, ("bios",), "id", NOW)
    assert row.name == "web@2026.11.2"


def test_nouns_cannot_be_changed_in_place() -> None:
    for noun in (HOST, OPERATION):
        with pytest.raises(AttributeError):
            noun.generation = 8  # type: ignore[misc] # frozen, which is the point
