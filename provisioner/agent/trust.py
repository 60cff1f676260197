"""Proves that a manifest is a release's, and that this release may be deployed.

By signatures first, then by digest, then by shape, then by expiry and version. Signatures
are checked by the openssl program, since Python's library has no Ed25519.
"""

import base64
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import Final

from provisioner.agent.problems import (
    ManifestDigest,
    ManifestMalformed,
    ManifestSignature,
    ReleaseExpired,
    ReleaseTooOld,
)
from provisioner.core.manifest import Manifest
from provisioner.core.trust import (
    TrustPolicy,
    check_expiry,
    check_release,
    check_version_floor,
    key_id,
    parse_signatures,
)
from provisioner.errors import ProvisionerError, TrustError

OPENSSL: Final = "/usr/bin/openssl"
# What stands before the raw 32 bytes of an Ed25519 public key in DER. Source: RFC 8410 §4.
_DER_PREFIX: Final = bytes.fromhex("302a300506032b6570032100")
# The numbers under which the child sees its three files; ours are lower.
_THEIRS: Final = (100, 101, 102)


@dataclass(frozen=True)
class Asked:
    """What the service asked for, as far as trust goes. `now` is the later of all clocks.

    With `to_compare` nothing will be written: what a disk holds is worth knowing, also when
    the release may be deployed no more.
    """

    release: str
    channel: str | None
    minimum_version: str | None
    now: datetime
    to_compare: bool = False


def trusted_manifest(data: bytes, signatures: bytes, asked: Asked, policy: TrustPolicy) -> Manifest:
    """Return the manifest in data, once it is proven to be that of the release asked for.

    policy is what the ramdisk pins; what the service says can only make it stricter. Raises
    ManifestSignature, ManifestDigest, ManifestMalformed, ReleaseExpired or ReleaseTooOld, in
    this order: bytes that nobody signed are not parsed. The last two only stop what would
    be written.
    """
    valid = signers_of(data, signatures, policy, channel=asked.channel)
    found = hashlib.sha256(data).hexdigest()
    if found != asked.release:
        raise ManifestDigest(
            "the manifest is that of another release; nothing was written",
            expected=asked.release,
            found=found,
        )
    try:
        manifest = Manifest.parse(data)
    except TrustError as error:
        raise _as(ManifestMalformed, error) from error
    if not asked.to_compare:
        _check_deployable(manifest, valid, asked, policy)
    return manifest


def _check_deployable(
    manifest: Manifest, valid: list[str], asked: Asked, policy: TrustPolicy
) -> None:
    """Raise ReleaseExpired or ReleaseTooOld for what is signed, and not to be written any more."""
    try:
        check_expiry(manifest, asked.now)
    except TrustError as error:
        raise _as(ReleaseExpired, error) from error
    try:
        check_version_floor(manifest, asked.minimum_version)
        check_version_floor(manifest, policy.minimum_versions.get(manifest.image))
    except TrustError as error:
        raise _as(ReleaseTooOld, error) from error
    # The same judge as the service's, so that nothing it looks at is forgotten here.
    check_release(manifest, valid, policy, channel=asked.channel, now=asked.now)


def signers_of(
    data: bytes, signatures: bytes, policy: TrustPolicy, *, channel: str | None
) -> list[str]:
    """Return the ids of as many pinned keys as must have signed data, and have.

    Raises ManifestSignature when there are fewer.
    """
    needed = policy.signatures_needed(channel)
    wanted = f"Ed25519 signatures by {needed} of {len(policy.keys)} pinned keys"
    try:
        made = parse_signatures(signatures)
    except TrustError as error:
        raise ManifestSignature(
            f"the manifest's signatures cannot be read; nothing was written: {error.message}",
            expected=wanted,
            found=error.found,
        ) from error
    valid = list(islice(_valid(data, made, policy.keys), needed))
    if len(valid) < needed:
        raise ManifestSignature(
            "the manifest is not signed by enough release keys; nothing was written",
            expected=wanted,
            found=f"{len(made)} signatures, {len(valid)} of them by pinned keys and right",
            hint="was the ramdisk built with the keys that sign the releases?",
        )
    return valid


def _valid(data: bytes, made: dict[str, bytes], keys: tuple[str, ...]) -> Iterator[str]:
    for key in keys:
        name = key_id(key)
        if name in made and is_signed(data, made[name], pem_of(key)):
            yield name


def pem_of(public_hex: str) -> bytes:
    """Return the PEM form of a raw Ed25519 public key in hex."""
    encoded = base64.b64encode(_DER_PREFIX + bytes.fromhex(public_hex))
    return b"-----BEGIN PUBLIC KEY-----\n" + encoded + b"\n-----END PUBLIC KEY-----\n"


def is_signed(data: bytes, signature: bytes, key: bytes) -> bool:
    """Say whether this PEM public key made this Ed25519 signature over data."""
    words = ["openssl", "pkeyutl", "-verify", "-rawin", "-pubin"]
    actions: list[tuple[int | str, ...]] = [
        (os.POSIX_SPAWN_OPEN, number, "/dev/null", os.O_RDWR, 0) for number in (0, 1, 2)
    ]
    ours = [_in_memory(content) for content in (key, data, signature)]
    try:
        for option, number, theirs in zip(
            ("-inkey", "-in", "-sigfile"), ours, _THEIRS, strict=True
        ):
            words += [option, f"/proc/self/fd/{theirs}"]
            actions.append((os.POSIX_SPAWN_DUP2, number, theirs))
        # Not the subprocess module: its import takes as long as the check.
        process = os.posix_spawn(OPENSSL, words, {"PATH": "/usr/bin"}, file_actions=actions)
        _, status = os.waitpid(process, 0)
    finally:
        for number in ours:
            os.close(number)
    return os.waitstatus_to_exitcode(status) == 0


def _in_memory(content: bytes) -> int:
    """Return a descriptor of a nameless file in memory."""
    number = os.memfd_create("trust")
    with open(number, "wb", closefd=False) as file:
        file.write(content)
    return number


def _as(kind: type[ProvisionerError], error: TrustError) -> ProvisionerError:
    return kind(error.message, expected=error.expected, found=error.found, hint=error.hint)
