"""Whom we believe: thresholds, keys, expiry, and no way back below a minimum version."""

import hashlib
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from provisioner.core.manifest import Manifest
from provisioner.core.trust import (
    TrustPolicy,
    check_release,
    key_id,
    parse_signatures,
    signatures_to_bytes,
)
from provisioner.core.versions import is_older, version_key
from provisioner.errors import RequestError, TrustError

KEYS = tuple(hashlib.sha256(bytes([number])).hexdigest() for number in range(3))
IDS = [key_id(key) for key in KEYS]
NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)
POLICY = TrustPolicy(KEYS, 1, {"stable": 2}, {"web": "2026.11.2"})
RELEASE = Manifest(
    image="web",
    version="2026.11.2",
    architecture="amd64",
    size_bytes=65536,
    chunk_bytes=65536,
    chunks=(None,),
    firmware=("bios",),
    release_id="ab" * 16,
    root_digest="0" * 64,
    partitions=(),
    packages={},
    recipe_digest="0" * 64,
    builder="test",
    built_at="2026-11-01T00:00:00Z",
)


def test_a_policy_is_read_as_it_was_written() -> None:
    assert TrustPolicy.parse(POLICY.to_bytes()) == POLICY


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{",
        POLICY.to_bytes().replace(b'"threshold":1', b'"threshold":4'),
        POLICY.to_bytes().replace(b'"threshold":1', b'"threshold":true'),
        POLICY.to_bytes().replace(b'"format":1', b'"format":2'),
        POLICY.to_bytes().replace(b'"stable":2', b'"stable":0'),
        POLICY.to_bytes().replace(KEYS[0].encode(), b"xyz"),
        POLICY.to_bytes().replace(b'"channels"', b'"channel"'),
        b'{"a":' * 100_000,
        b" " * 100_000,
    ],
)
def test_anything_else_is_no_policy(data: bytes) -> None:
    with pytest.raises(TrustError):
        TrustPolicy.parse(data)


def test_a_policy_without_keys_or_beyond_them_is_refused() -> None:
    for keys, threshold in (((), 1), (KEYS[:1], 2), (KEYS[:1], 0), (KEYS * 7, 4)):
        with pytest.raises(RequestError):
            TrustPolicy(keys, threshold)


@pytest.mark.parametrize(
    ("channel", "signed", "is_enough"),
    [
        (None, 0, False),
        (None, 1, True),
        ("canary", 1, True),
        ("stable", 1, False),
        ("stable", 2, True),
    ],
)
def test_a_channel_asks_for_its_number_of_signatures(
    channel: str | None, signed: int, is_enough: bool
) -> None:
    valid = IDS[:signed] * 2  # the same key twice is one key
    if is_enough:
        check_release(RELEASE, valid, POLICY, channel=channel, now=NOW)
        return
    with pytest.raises(TrustError, match="too few signatures") as caught:
        check_release(RELEASE, valid, POLICY, channel=channel, now=NOW)
    assert caught.value.hint


def test_a_release_ends_at_its_expiry_to_the_second() -> None:
    release = replace(RELEASE, expires_at="2026-11-25T12:00:00Z")
    check_release(release, IDS, POLICY, channel=None, now=NOW.replace(hour=11))
    with pytest.raises(TrustError, match="expired"):
        check_release(release, IDS, POLICY, channel=None, now=NOW)


def test_there_is_no_way_back_below_the_minimum_version() -> None:
    check_release(replace(RELEASE, version="2026.11.10"), IDS, POLICY, channel=None, now=NOW)
    check_release(replace(RELEASE, image="db", version="1"), IDS, POLICY, channel=None, now=NOW)
    with pytest.raises(TrustError, match="older") as caught:
        check_release(replace(RELEASE, version="2026.11.1"), IDS, POLICY, channel=None, now=NOW)
    assert (caught.value.expected, caught.value.found) == ("2026.11.2 or newer", "2026.11.1")


def test_signatures_are_read_as_they_were_written() -> None:
    signatures = {name: bytes([number]) * 64 for number, name in enumerate(IDS)}
    assert parse_signatures(signatures_to_bytes(signatures)) == signatures


@given(st.data())
def test_no_changed_signature_file_is_read_as_another(data: st.DataObject) -> None:
    """Only the canonical form counts, so a file has one meaning and a meaning one file."""
    good = signatures_to_bytes({IDS[0]: b"\1" * 64})
    at = data.draw(st.integers(0, len(good) - 1))
    bad = good[:at] + bytes([good[at] ^ (1 << data.draw(st.integers(0, 7)))]) + good[at + 1 :]
    try:
        assert parse_signatures(bad) != {IDS[0]: b"\1" * 64}
    except TrustError:
        return


def test_versions_are_ordered_as_people_read_them() -> None:
    ordered = ["2~rc1", "2", "2.0", "2.1~beta", "2.1", "2.9", "2.10", "2026.1.1", "2026.11.1"]
    for older, newer in pairwise(ordered):
        assert is_older(older, newer), (older, newer)
        assert not is_older(newer, older), (older, newer)
    assert version_key("1.2") == version_key("1-2")


@pytest.mark.parametrize(
    ("other", "differing"),
    [
        (POLICY, []),
        (replace(POLICY, keys=KEYS[:2]), ["keys"]),
        (replace(POLICY, threshold=2), ["thresholds"]),
        (replace(POLICY, channels={}), ["thresholds"]),
        (replace(POLICY, minimum_versions={"web": "3"}), ["minimum versions of web"]),
        (
            replace(POLICY, keys=KEYS[1:], minimum_versions={"db": "3"}),
            ["keys", "minimum versions of db, web"],
        ),
    ],
)
def test_two_policies_say_what_they_do_not_agree_on(
    other: TrustPolicy, differing: list[str]
) -> None:
    assert POLICY.differences(other) == differing
    assert other.differences(POLICY) == differing
