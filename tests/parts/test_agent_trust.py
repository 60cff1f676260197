"""Whom the agent believes: keys, thresholds, expiry and minimum versions, by the real openssl."""

import hashlib
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import zstandard
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from provisioner.agent.problems import (
    ManifestDigest,
    ManifestMalformed,
    ManifestSignature,
    ReleaseExpired,
    ReleaseTooOld,
    ServiceRefused,
)
from provisioner.agent.release import unpack_manifest
from provisioner.agent.session import parse_session
from provisioner.agent.trust import Asked, trusted_manifest
from provisioner.core.manifest import MANIFEST_BYTES_MAX, Manifest
from provisioner.core.trust import TrustPolicy
from provisioner.errors import ProvisionerError
from tests.parts.agent_service import deployment, make_release, public_hex, signed

NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)
OLD, NEW, OTHER, STRANGER = (Ed25519PrivateKey.generate() for _ in range(4))
RELEASE = make_release(b"x" * 512, version="5", expires_at="2026-12-01T00:00:00Z")


def policy(*keys: Ed25519PrivateKey, **more: Any) -> TrustPolicy:
    return TrustPolicy(tuple(map(public_hex, keys)), **more)


def judged(signers: tuple[Ed25519PrivateKey, ...], pinned: TrustPolicy, **asked: Any) -> Manifest:
    """Have the agent judge RELEASE, signed by these."""
    data = RELEASE.manifest.to_bytes()
    values = {"channel": None, "minimum_version": None, "now": NOW, **asked}
    wanted = Asked(release=RELEASE.manifest.digest, **values)
    return trusted_manifest(data, signed(data, *signers), wanted, pinned)


@pytest.mark.parametrize(
    ("signers", "pinned", "channel"),
    [
        ((OLD,), policy(OLD), None),
        ((NEW,), policy(OLD, NEW), None),
        ((OLD, NEW), policy(NEW), None),
        ((OLD, NEW, STRANGER), policy(OLD, NEW, threshold=2), None),
        ((OLD,), policy(OLD, NEW, channels={"stable": 2}), "testing"),
        ((OLD, NEW), policy(OLD, NEW, channels={"stable": 2}), "stable"),
    ],
    ids=[
        "one key",
        "a new key beside the old",
        "the old key is gone",
        "two of three",
        "another channel",
        "the channel's threshold",
    ],
)
def test_enough_pinned_keys_are_enough(
    signers: tuple[Ed25519PrivateKey, ...], pinned: TrustPolicy, channel: str | None
) -> None:
    assert judged(signers, pinned, channel=channel) == RELEASE.manifest


@pytest.mark.parametrize(
    ("signers", "pinned", "channel"),
    [
        ((), policy(OLD), None),
        ((STRANGER,), policy(OLD), None),
        ((OLD,), policy(NEW), None),
        ((OLD, STRANGER), policy(OLD, NEW, threshold=2), None),
        ((OLD,), policy(OLD, NEW, channels={"stable": 2}), "stable"),
    ],
    ids=["nobody", "a stranger", "a key that was dropped", "one of two", "too few for a channel"],
)
def test_too_few_are_refused(
    signers: tuple[Ed25519PrivateKey, ...], pinned: TrustPolicy, channel: str | None
) -> None:
    with pytest.raises(ManifestSignature) as caught:
        judged(signers, pinned, channel=channel)
    assert "pinned keys" in str(caught.value.expected)


def test_one_key_does_not_count_twice() -> None:
    """Its signature under another key's name is no signature by that key."""
    data = RELEASE.manifest.to_bytes()
    value = json.loads(signed(data, OLD, NEW))
    value["signatures"][0]["signature"] = value["signatures"][1]["signature"]
    text = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    asked = Asked(RELEASE.manifest.digest, None, None, NOW)
    with pytest.raises(ManifestSignature):
        trusted_manifest(data, text, asked, policy(OLD, NEW, threshold=2))


@pytest.mark.parametrize("signatures", [b"", b"{}", b"[]", b"\xff" * 64, b"{" * 20000])
def test_what_is_no_signature_file_is_refused(signatures: bytes) -> None:
    asked = Asked(RELEASE.manifest.digest, None, None, NOW)
    with pytest.raises(ManifestSignature):
        trusted_manifest(RELEASE.manifest.to_bytes(), signatures, asked, policy(OLD))


def test_nobody_signed_is_said_before_anything_is_parsed() -> None:
    """Signature, digest, shape: in this order."""
    asked = Asked("0" * 64, None, None, NOW)
    rubbish = b"{" * 100_000
    with pytest.raises(ManifestSignature):
        trusted_manifest(rubbish, signed(rubbish, STRANGER), asked, policy(OLD))
    with pytest.raises(ManifestDigest):
        trusted_manifest(rubbish, signed(rubbish, OLD), asked, policy(OLD))
    named = replace(asked, release=hashlib.sha256(rubbish).hexdigest())
    with pytest.raises(ManifestMalformed):
        trusted_manifest(rubbish, signed(rubbish, OLD), named, policy(OLD))


def test_a_release_past_its_expiry_is_refused() -> None:
    with pytest.raises(ReleaseExpired) as caught:
        judged((OLD,), policy(OLD), now=datetime(2026, 12, 1, tzinfo=UTC))
    assert "2026-12-01" in str(caught.value.expected)
    judged((OLD,), policy(OLD), now=datetime(2026, 11, 30, 23, 59, 59, tzinfo=UTC))


@pytest.mark.parametrize(
    ("pinned", "told", "error"),
    [
        ({}, None, None),
        ({"test": "5"}, "5", None),
        ({"other": "9"}, "4", None),
        ({"test": "6"}, None, ReleaseTooOld),
        ({"test": "6"}, "4", ReleaseTooOld),
        ({}, "5.1", ReleaseTooOld),
        ({"test": "4"}, "10", ReleaseTooOld),
    ],
)
def test_the_stricter_minimum_counts(
    pinned: dict[str, str], told: str | None, error: type[ProvisionerError] | None
) -> None:
    """Whoever controls the service cannot lower what the ramdisk pins."""
    trusted = policy(OLD, minimum_versions=pinned)
    if error is None:
        judged((OLD,), trusted, minimum_version=told)
        return
    with pytest.raises(error):
        judged((OLD,), trusted, minimum_version=told)


def test_what_may_be_deployed_no_more_may_still_be_compared_with() -> None:
    """Signatures and digest are asked for all the same, and the channel's number of them."""
    late = {"now": datetime(2027, 1, 1, tzinfo=UTC), "minimum_version": "6", "to_compare": True}
    pinned = policy(OLD, NEW, channels={"stable": 2}, minimum_versions={"test": "7"})
    assert judged((OLD,), pinned, **late) == RELEASE.manifest
    with pytest.raises(ReleaseExpired):
        judged((OLD,), pinned, **{**late, "to_compare": False})
    for signers, channel in (((STRANGER,), None), ((OLD,), "stable")):
        with pytest.raises(ManifestSignature):
            judged(signers, pinned, **late, channel=channel)
    other = Asked("0" * 64, None, None, NOW, to_compare=True)
    data = RELEASE.manifest.to_bytes()
    with pytest.raises(ManifestDigest):
        trusted_manifest(data, signed(data, OLD), other, pinned)


# --- what the service says of it --------------------------------------------------------------


def told(**changes: Any) -> dict[str, Any]:
    return {**deployment(RELEASE), "boot_url": "http://10.0.0.1:80", **changes}


def test_what_hello_says_is_understood() -> None:
    mirrors = ["http://10.0.0.2:81/files", "https://10.0.0.3", "http://name/", 5]
    session = parse_session(
        told(
            mode="full",
            channel="stable",
            now="2026-11-25T12:00:00Z",
            minimum_version="4",
            mirrors=mirrors,
        )
    )
    assert (session.mode, session.channel, session.minimum_version) == ("full", "stable", "4")
    assert session.now == NOW
    assert [str(origin) for origin in session.mirrors] == ["http://10.0.0.2:81/files"]
    assert not session.writes_nothing


def test_a_service_that_says_nothing_of_it_asks_for_a_delta() -> None:
    session = parse_session(told())
    assert (session.mode, session.channel, session.mirrors, session.now) == (
        "delta",
        None,
        (),
        None,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "verification", "mode": "verify"},
        {"kind": "verification", "mode": "full"},
        {"kind": "verification"},
        {"mode": "verify"},
    ],
)
def test_whoever_says_verify_gets_nothing_written(changes: dict[str, Any]) -> None:
    assert parse_session(told(**changes)).writes_nothing


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "maybe"},
        {"mode": 1},
        {"channel": 7},
        {"channel": ["stable"]},
        {"minimum_version": 4},
        {"now": "today"},
        {"kind": "verification", "release": None},
        {"kind": "wipe"},
    ],
)
def test_an_answer_that_is_not_understood_is_refused(changes: dict[str, Any]) -> None:
    """Above all no wish for more trust is overlooked."""
    with pytest.raises(ServiceRefused):
        parse_session(told(**changes))


def test_a_moment_without_a_zone_is_utc() -> None:
    session = parse_session(told(now="2026-11-25T12:00:00"))
    assert session.now == NOW
    assert parse_session(told(now="2026-11-25T13:00:00+01:00")).now == NOW
    assert NOW.utcoffset() == timedelta(0)


# --- the compressed manifest --------------------------------------------------------------------


def test_a_packed_manifest_is_unpacked_within_its_limit() -> None:
    """A frame that says nothing of its size, or too much, is none."""
    data = RELEASE.manifest.to_bytes()
    assert unpack_manifest(zstandard.compress(data)) == data
    silent = zstandard.ZstdCompressor(write_content_size=False).compress(data)
    bomb = zstandard.compress(bytes(MANIFEST_BYTES_MAX + 1))
    for packed in (b"", b"nothing", silent, bomb, zstandard.compress(data)[:-1]):
        assert unpack_manifest(packed) is None
