"""Signatures of releases: Ed25519 over the canonical manifest. Keeps no key in memory by itself."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from provisioner.core.trust import KEYS_MAX, TrustPolicy, key_id
from provisioner.errors import ConfigError, TrustError

KEY_FILE_BYTES_MAX: Final = 4096 * KEYS_MAX
_PEM: Final = re.compile(rb"-----BEGIN [A-Z ]+-----[^-]+-----END [A-Z ]+-----")


def create_signing_key(path: Path) -> Ed25519PrivateKey:
    """Write a new private key, readable by its owner only, and return it.

    Raises FileExistsError rather than replace a key: releases signed with the
    old one would no longer be trusted.
    """
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(pem)
        file.flush()
        os.fsync(file.fileno())
    return key


def load_signing_key(path: Path) -> Ed25519PrivateKey:
    """Return the private key in this PEM file. Raises ConfigError when it is not one."""
    pem = _read(path)
    if path.stat().st_mode & 0o077:
        raise ConfigError(
            f"the signing key {path} can be read by others",
            expected="mode 0600",
            found=f"mode {path.stat().st_mode & 0o7777:04o}",
            hint=f"chmod 600 {path}",
        )
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is not a private key in PEM form") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path} is not an Ed25519 key", found=type(key).__name__)
    return key


def load_public_keys(path: Path) -> tuple[Ed25519PublicKey, ...]:
    """Return all public keys in this PEM file, at least one; ConfigError when it is not that."""
    blocks = _PEM.findall(_read(path))
    if not blocks:
        raise ConfigError(f"{path} holds no public key in PEM form")
    return tuple(_public(block, path) for block in blocks)


def public_pem(key: Ed25519PublicKey) -> bytes:
    """Return the key as PEM."""
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def public_hex(key: Ed25519PublicKey) -> str:
    """Return the raw 32 bytes of the key in hex, as a TrustPolicy holds them."""
    return key.public_bytes(Encoding.Raw, PublicFormat.Raw).hex()


def sign(data: bytes, signers: Iterable[Ed25519PrivateKey]) -> dict[str, bytes]:
    """Return {key id: signature} over data."""
    return {key_id(public_hex(one.public_key())): one.sign(data) for one in signers}


def valid_keys(data: bytes, signatures: Mapping[str, bytes], policy: TrustPolicy) -> set[str]:
    """Return the ids of the policy's keys whose signature over data is right.

    A signature by a key that is not trusted (any more) counts for nothing. Raises TrustError
    for a wrong signature under a trusted key's name: somebody changed something.
    """
    valid = set()
    for public in policy.keys:
        name = key_id(public)
        if name in signatures:
            key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
            verify(key, signatures[name], data, what=f"key {name[:12]}")
            valid.add(name)
    return valid


def verify(key: Ed25519PublicKey, signature: bytes, data: bytes, *, what: str) -> None:
    """Raise TrustError unless signature (64 raw bytes) is the key's over data.

    `what` names the key in the error.
    """
    try:
        key.verify(signature, data)
    except InvalidSignature as error:
        raise TrustError(
            f"the signature by {what} is wrong",
            expected="a signature over the manifest as it stands there",
            found="a signature over other bytes",
            hint="do not deploy it; find out who changed it, then publish it again",
        ) from error


def _public(pem: bytes, path: Path) -> Ed25519PublicKey:
    try:
        key = load_pem_public_key(pem)
    except ValueError as error:
        raise ConfigError(f"{path} is not a public key in PEM form") from error
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"{path} is not an Ed25519 key", found=type(key).__name__)
    return key


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(KEY_FILE_BYTES_MAX)
    except OSError as error:
        raise ConfigError(f"cannot read the key {path}: {error.strerror}") from error
