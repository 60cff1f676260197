"""Profiles: what they may say, what they say when it is wrong, and that `${}` only fills."""

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from provisioner.core.model import Json, Profile
from provisioner.core.profile import (
    CHECKS_MAX,
    DEPTH_MAX,
    DOCUMENT_BYTES_MAX,
    SOAK_DEFAULT_S,
    SOAK_MAX_S,
    Check,
    canonical,
    filled,
    health_of,
    revision,
)
from provisioner.errors import RequestError
from tests.unit.examples import NOW

RULE: Json = {"serial": "LAB-r1n7-0"}


def saved(document: Any, name: str = "web") -> Profile:
    return revision(name, document, NOW)


def refusal(document: Any, name: str = "web") -> RequestError:
    with pytest.raises(RequestError) as caught:
        saved(document, name)
    return caught.value


# --- what it may say ----------------------------------------------------------------------


def test_a_profile_with_a_disk_rule_alone_is_enough() -> None:
    profile = saved({"disk": RULE})
    assert profile.document == {"disk": RULE}
    assert health_of(profile.document).checks == (Check("ssh", 22),)
    assert health_of(profile.document).soak_s == SOAK_DEFAULT_S


def test_a_full_profile_is_kept_as_it_is() -> None:
    document = {
        "variables": {"port": 8080},
        "cloud_config": {"hostname": "${host.name}", "runcmd": [["touch", "/x"]]},
        "network": {"version": 2, "ethernets": {}},
        "disk": {"bus": "nvme", "size_min_bytes": 1},
        "health": {"soak_s": 0, "checks": [{"type": "http", "port": 8080, "path": "/up"}]},
    }
    assert saved(document).document == document


@pytest.mark.parametrize("document", [{}, {"disk": {}}, {"disk": None}, {"cloud_config": {}}])
def test_a_disk_rule_is_required_because_no_disk_is_written_by_default(document: Json) -> None:
    assert "disk" in refusal(document).message


@pytest.mark.parametrize("rule", [{"seriall": "x"}, {"serial": None}, {"bus": "ide"}, ["vda"]])
def test_a_disk_rule_is_checked_when_it_is_saved(rule: Any) -> None:
    refusal({"disk": rule})


@pytest.mark.parametrize(
    ("document", "key", "hint"),
    [
        ({"disk": RULE, "variable": {}}, "variable", "did you mean variables?"),
        ({"disk": RULE, "cloud-config": {}}, "cloud-config", "did you mean cloud_config?"),
        ({"disk": RULE, "zzz": {}}, "zzz", None),
        ({"disk": RULE, "health": {"soak": 5}}, "soak", "did you mean soak_s?"),
        (
            {"disk": RULE, "health": {"checks": [{"type": "http", "pth": "/"}]}},
            "pth",
            "did you mean path?",
        ),
        (
            {"disk": RULE, "health": {"checks": [{"type": "systemd", "port": 1}]}},
            "port",
            None,
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_unknown_key_is_refused_with_a_hint(document: Json, key: str, hint: str | None) -> None:
    error = refusal(document)
    assert error.found == key
    assert error.hint == hint
    assert error.expected


@pytest.mark.parametrize(
    "document",
    [
        [],
        "disk: x",
        None,
        {1: {}},
        {"disk": RULE, "variables": []},
        {"disk": RULE, "variables": {1: 2}},
        {"disk": RULE, "cloud_config": "text"},
        {"disk": RULE, "network": None},
        {"disk": RULE, "health": []},
        {"disk": RULE, "health": {"checks": {}}},
        {"disk": RULE, "health": {"checks": ["ssh"]}},
        {"disk": RULE, "health": {"checks": [{}]}},
        {"disk": RULE, "health": {"checks": [{"type": "ping"}]}},
        {"disk": RULE, "health": {"checks": [{"type": "tcp"}]}},
        {"disk": RULE, "health": {"checks": [{"type": "ssh"}] * (CHECKS_MAX + 1)}},
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_has_the_wrong_shape_is_refused(document: Any) -> None:
    refusal(document)


@pytest.mark.parametrize("soak", [-1, SOAK_MAX_S + 1, "10", True, None, float("nan")])
def test_a_soak_time_is_a_number_of_seconds_within_its_limit(soak: Any) -> None:
    assert "soak_s" in refusal({"disk": RULE, "health": {"soak_s": soak}}).message


@pytest.mark.parametrize("port", [0, 65536, -1, True, "22", 22.0, None])
@pytest.mark.parametrize("kind", ["tcp", "ssh", "http"])
def test_a_port_is_a_port(kind: str, port: Any) -> None:
    error = refusal({"disk": RULE, "health": {"checks": [{"type": kind, "port": port}]}})
    assert error.expected == "1 to 65535"


@pytest.mark.parametrize(
    "wrong",
    [
        {"path": "up"},
        {"path": 5},
        {"path": "/a b"},
        {"path": "/a\r\nHost: b"},
        {"status": "200"},
        {"status": 99},
        {"status": True},
    ],
    ids=str,
)
def test_an_http_check_is_one_that_can_be_asked(wrong: Json) -> None:
    error = refusal({"disk": RULE, "health": {"checks": [{"type": "http", **wrong}]}})
    assert next(iter(wrong)) in error.message


@pytest.mark.parametrize("name", ["", "Web", "-web", "web-", "w_b", "a" * 64, "we b", "web\n"])
def test_a_profile_name_is_a_simple_word(name: str) -> None:
    refusal({"disk": RULE}, name)


# --- limits -------------------------------------------------------------------------------


def test_a_profile_as_large_as_allowed_is_saved_and_one_byte_more_is_not() -> None:
    empty = len(canonical({"disk": RULE, "variables": {"x": ""}}))
    room = DOCUMENT_BYTES_MAX - empty
    assert saved({"disk": RULE, "variables": {"x": "a" * room}})
    assert "too large" in refusal({"disk": RULE, "variables": {"x": "a" * (room + 1)}}).message


def nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


def test_a_profile_is_nested_only_so_deep() -> None:
    assert filled(nested(DEPTH_MAX), str) == nested(DEPTH_MAX)
    with pytest.raises(RequestError, match="too deeply"):
        filled(nested(DEPTH_MAX + 1), str)


@pytest.mark.parametrize("depth", [100_000])
def test_a_profile_nested_out_of_all_reason_is_refused_and_not_a_crash(depth: int) -> None:
    refusal({"disk": RULE, "cloud_config": {"x": nested(depth)}})


@pytest.mark.parametrize("value", [NOW, {1, 2}, b"x", float("nan"), float("inf"), "\ud800"])
def test_a_value_that_json_cannot_hold_is_refused(value: Any) -> None:
    assert "text, numbers" in refusal({"disk": RULE, "variables": {"x": value}}).message


# --- revisions ----------------------------------------------------------------------------


def test_a_digest_names_the_content_and_not_the_order_or_the_time() -> None:
    one = revision("web", {"disk": RULE, "variables": {"a": 1, "b": 2}}, NOW)
    other = revision("web", {"variables": {"b": 2, "a": 1}, "disk": RULE}, NOW + timedelta(days=1))
    assert one.digest == other.digest
    assert saved({"disk": RULE, "variables": {"a": 2, "b": 2}}).digest != one.digest
    assert saved(one.document, "mail").digest != one.digest


# --- filling ------------------------------------------------------------------------------


def values(**known: str) -> Callable[[str], str]:
    return lambda name: known[name]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("${a}", "1"),
        ("x${a}y${b}z", "x1y2z"),
        ("${ a }", "1"),
        ("$${a}", "${a}"),
        ("$${a}${a}", "${a}1"),
        ("$a {a} ${", "$a {a} ${"),
        ("", ""),
    ],
)
def test_a_place_is_filled_and_a_doubled_dollar_is_kept(text: str, expected: str) -> None:
    assert filled(text, values(a="1", b="2")) == expected


def test_what_is_filled_in_is_not_filled_again() -> None:
    assert filled("${a}", values(a="${b}", b="never")) == "${b}"


def test_keys_numbers_and_truth_are_left_alone() -> None:
    document = {"${a}": 1, "x": True, "y": None, "z": 1.5}
    assert filled(document, values(a="1")) == document


PIECES = ["a", "${v}", "$${", "${", "}", ": ", "\n- ", "\r\n", "{", "[", "'", '"', "#", "&*!|>%@"]
EVIL = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)
LEAF = st.none() | st.booleans() | st.integers() | EVIL | st.just("${v}") | st.just("a ${v} b")
TREE = st.recursive(
    LEAF, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(EVIL, inner, max_size=4)
)


def shape(value: Any) -> Any:
    """Return the value with every text replaced by one and the same text."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape(item) for item in value]
    return "text" if isinstance(value, str) else value


@settings(max_examples=200, deadline=None)
@given(TREE, st.text(max_size=60))
def test_no_value_can_change_the_structure_around_it(tree: Any, value: str) -> None:
    """However a value looks (YAML, JSON, `${}`), it stays the inside of one text."""
    assert shape(filled(tree, lambda _: value)) == shape(tree)


@settings(max_examples=100, deadline=None)
@given(EVIL | st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cc"])))
def test_a_value_comes_out_of_the_written_yaml_as_it_went_in(value: str) -> None:
    written = yaml.safe_dump(filled({"runcmd": ["echo ${v}"]}, lambda _: value))
    assert yaml.safe_load(written) == {"runcmd": [f"echo {value}"]}


@settings(max_examples=100, deadline=None)
@given(TREE)
def test_a_document_is_canonical_json_of_itself(tree: Any) -> None:
    assert json.loads(canonical({"x": tree})) == {"x": tree}
