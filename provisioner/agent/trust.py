"""Proves that a manifest is a release's: by signature first, then by digest, then by shape.

The signature is checked by the openssl program, since Python's library has no Ed25519.
"""

import os
import re
from collections.abc import Iterator
from typing import Final

from provisioner.agent.problems import ManifestDigest, ManifestMalformed, ManifestSignature
from provisioner.core.manifest import Manifest
from provisioner.errors import TrustError

OPENSSL: Final = "/usr/bin/openssl"
SIGNATURE_BYTES: Final = 64
KEYS_MAX: Final = 16
# The numbers under which the child sees its three files; ours are lower.
_THEIRS: Final = (100, 101, 102)
_PEM: Final = re.compile(
    rb"-----BEGIN PUBLIC KEY-----\n[A-Za-z0-9+/=\n]+-----END PUBLIC KEY-----\n"
)


def trusted_manifest(data: bytes, signature: bytes, release: str, keys_file: str) -> Manifest:
    """Return the manifest in data, once it is proven to be that of the release.

    keys_file holds PEM public keys; one of them must have made the signature. Raises
    ManifestSignature, ManifestDigest or ManifestMalformed, in this order: bytes that
    nobody signed are not parsed.
    """
    with open(keys_file, "rb") as file:
        pinned = list(_public_keys(file.read()))
    if len(signature) != SIGNATURE_BYTES or not any(
        is_signed(data, signature, key) for key in pinned
    ):
        raise ManifestSignature(
            "the manifest's signature is not by a release key; nothing was written",
            expected=f"an Ed25519 signature by one of {len(pinned)} pinned keys",
            found=f"{len(signature)} bytes that none of them made",
            hint="was the ramdisk built with the key that signs the releases?",
        )
    try:
        manifest = Manifest.parse(data)
    except TrustError as error:
        raise ManifestMalformed(
            error.message, expected=error.expected, found=error.found
        ) from error
    if manifest.digest != release:
        raise ManifestDigest(
            "the manifest is that of another release; nothing was written",
            expected=release,
            found=manifest.digest,
        )
    return manifest


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


def _public_keys(pem: bytes) -> Iterator[bytes]:
    for count, match in enumerate(_PEM.finditer(pem)):
        if count == KEYS_MAX:
            raise ManifestSignature(f"the ramdisk pins more than {KEYS_MAX} keys")
        yield match[0]
