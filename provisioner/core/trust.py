"""Which releases are trusted: by whose signatures, until when, and not below which version.

Decides; verifies no signature itself. Imports only the standard library: the ramdisk pins a
policy and asks the same questions as the service.
"""

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from provisioner.errors import RequestError, TrustError

from .manifest import Manifest
from .versions import is_older

FORMAT: Final = 1
KEYS_MAX: Final = 16
POLICY_BYTES_MAX: Final = 64 * 1024
SIGNATURES_BYTES_MAX: Final = 16 * 1024
_KEY: Final = re.compile(r"[0-9a-f]{64}")
_SIGNATURE: Final = re.compile(r"[0-9a-f]{128}")
_CHANNEL: Final = re.compile(r"[a-z][a-z0-9-]{0,30}")


def key_id(public_hex: str) -> str:
    """Return the name of a key: the sha256 of its raw 32 bytes, in hex."""
    return hashlib.sha256(bytes.fromhex(public_hex)).hexdigest()


def check_channel(name: object) -> None:
    """Raise RequestError unless this may be a channel's name, such as `stable`."""
    if not isinstance(name, str) or not _CHANNEL.fullmatch(name):
        raise RequestError(
            "not a channel", expected="small letters, digits and '-'", found=repr(name)[:100]
        )


@dataclass(frozen=True)
class TrustPolicy:
    """What this installation believes.

    keys are raw Ed25519 public keys in hex (64 digits). threshold is how many of them must
    have signed any release; channels ask for more by name. minimum_versions holds, by image,
    the version below which nothing is deployed.

    Raises RequestError for no keys, or a threshold that the keys cannot reach.
    """

    keys: tuple[str, ...]
    threshold: int = 1
    channels: Mapping[str, int] = field(default_factory=dict)
    minimum_versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "keys", tuple(sorted(set(self.keys))))
        if not 1 <= len(self.keys) <= KEYS_MAX:
            raise RequestError("trusted keys", expected=f"1 to {KEYS_MAX}", found=len(self.keys))
        if bad := [key for key in self.keys if not _is(_KEY, key)]:
            raise RequestError("not a public key", expected="64 hex digits", found=bad[0])
        for name in self.channels:
            check_channel(name)
        for name, number in (("threshold", self.threshold), *self.channels.items()):
            if type(number) is not int or not 1 <= number <= len(self.keys):
                raise RequestError(
                    f"the number of signatures asked for by {name} cannot be reached",
                    expected=f"1 to {len(self.keys)}, the number of trusted keys",
                    found=repr(number),
                )

    @classmethod
    def parse(cls, data: bytes) -> "TrustPolicy":
        """Return the policy that these bytes are. Raises TrustError for anything else."""
        value = _loaded(data, POLICY_BYTES_MAX, "the trust policy")
        names = {"format", "keys", "threshold", "channels", "minimum_versions"}
        if value.keys() != names or value["format"] != FORMAT:
            raise TrustError("the trust policy is not one", expected=f"format {FORMAT}")
        try:
            return cls(
                keys=tuple(value["keys"]),
                threshold=value["threshold"],
                channels=dict(value["channels"]),
                minimum_versions=dict(value["minimum_versions"]),
            )
        except (RequestError, TypeError, ValueError) as error:
            raise TrustError(f"the trust policy is not one: {error}") from error

    def to_bytes(self) -> bytes:
        """Return the canonical JSON that `parse` reads."""
        return _canonical(
            {
                "format": FORMAT,
                "keys": list(self.keys),
                "threshold": self.threshold,
                "channels": dict(self.channels),
                "minimum_versions": dict(self.minimum_versions),
            }
        )

    def differences(self, other: "TrustPolicy") -> list[str]:
        """Return what the two do not agree on, in words; nothing when they are the same."""
        found = []
        if self.keys != other.keys:
            found.append("keys")
        if (self.threshold, dict(self.channels)) != (other.threshold, dict(other.channels)):
            found.append("thresholds")
        mine, theirs = self.minimum_versions, other.minimum_versions
        images = {one for one in {*mine, *theirs} if mine.get(one) != theirs.get(one)}
        if images:
            found.append(f"minimum versions of {', '.join(sorted(images))}")
        return found

    def signatures_needed(self, channel: str | None) -> int:
        """Return how many trusted keys must have signed a release of this channel."""
        return max(self.threshold, self.channels.get(channel, 0) if channel else 0)


def parse_signatures(data: bytes) -> dict[str, bytes]:
    """Return {key id: signature of 64 bytes} of a `manifest.sig`. Nothing is verified.

    Raises TrustError unless the bytes are its canonical form.
    """
    value = _loaded(data, SIGNATURES_BYTES_MAX, "the signature file")
    entries = value.get("signatures")
    if value.get("format") != FORMAT or not isinstance(entries, list) or len(entries) > KEYS_MAX:
        raise TrustError("the signature file is not one", expected=f"format {FORMAT}")
    found: dict[str, bytes] = {}
    for entry in entries:
        if not isinstance(entry, dict) or entry.keys() != {"key", "signature"}:
            raise TrustError("the signature file is not one", expected="keys and signatures")
        if not _is(_KEY, entry["key"]) or not _is(_SIGNATURE, entry["signature"]):
            raise TrustError("the signature file is not one", expected="hex digits")
        found[entry["key"]] = bytes.fromhex(entry["signature"])
    if signatures_to_bytes(found) != data:
        raise TrustError("the signature file is not in canonical form")
    return found


def signatures_to_bytes(signatures: Mapping[str, bytes]) -> bytes:
    """Return the canonical `manifest.sig` for {key id: signature}."""
    entries = [{"key": key, "signature": signatures[key].hex()} for key in sorted(signatures)]
    return _canonical({"format": FORMAT, "signatures": entries})


def check_release(
    manifest: Manifest,
    valid_keys: Collection[str],
    policy: TrustPolicy,
    *,
    channel: str | None,
    now: datetime,
) -> None:
    """Return when this release may be deployed, as far as trust goes.

    valid_keys are the ids of trusted keys whose signature over the manifest was verified.
    Raises TrustError for too few of them, for a release past its expiry, and for one below
    the image's minimum version.
    """
    check_signatures(manifest, valid_keys, policy, channel=channel)
    check_expiry(manifest, now)
    check_version_floor(manifest, policy.minimum_versions.get(manifest.image))


def check_signatures(
    manifest: Manifest, valid_keys: Collection[str], policy: TrustPolicy, *, channel: str | None
) -> None:
    """Raise TrustError unless enough trusted keys signed this release.

    Alone this is enough for a release that a disk is only compared with.
    """
    needed = policy.signatures_needed(channel)
    if len(set(valid_keys)) < needed:
        raise TrustError(
            f"{manifest.name} has too few signatures"
            + (f" for the channel {channel}" if channel else ""),
            expected=f"{needed} by trusted keys",
            found=str(len(set(valid_keys))),
            hint=f"provisioner image sign {manifest.name} --key-file FILE",
        )


def check_expiry(manifest: Manifest, now: datetime) -> None:
    """Raise TrustError when the release has expired at this (aware) moment."""
    if manifest.expires_at is None:
        return
    end = datetime.fromisoformat(manifest.expires_at)
    if now >= end:
        raise TrustError(
            f"{manifest.name} has expired",
            expected=f"before {manifest.expires_at}",
            found=now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            hint="build and publish a new version",
        )


def check_version_floor(manifest: Manifest, minimum: str | None) -> None:
    """Raise TrustError for a version older than the image's minimum."""
    if minimum is not None and is_older(manifest.version, minimum):
        raise TrustError(
            f"{manifest.name} is older than what this image may go back to",
            expected=f"{minimum} or newer",
            found=manifest.version,
            hint="a later release set that minimum; deploy a newer version",
        )


def _loaded(data: bytes, limit_bytes: int, what: str) -> dict[str, Any]:
    if len(data) > limit_bytes:
        raise TrustError(f"{what} is too large", expected=f"at most {limit_bytes} bytes")
    try:
        value = json.loads(data.decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise TrustError(f"{what} is not JSON", found=str(error)) from error
    if not isinstance(value, dict):
        raise TrustError(f"{what} is not an object", found=type(value).__name__)
    return value


def _canonical(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")


def _is(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None
