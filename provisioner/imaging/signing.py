"""Signatures of releases: Ed25519 over the canonical manifest. Keeps no key in memory by itself."""

from __future__ import annotations

import os
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

from provisioner.errors import ConfigError, TrustError

SIGNATURE_BYTES: Final = 64
KEY_FILE_BYTES_MAX: Final = 4096


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


def load_public_key(path: Path) -> Ed25519PublicKey:
    """Return the public key in this PEM file. Raises ConfigError when it is not one."""
    try:
        key = load_pem_public_key(_read(path))
    except ValueError as error:
        raise ConfigError(f"{path} is not a public key in PEM form") from error
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"{path} is not an Ed25519 key", found=type(key).__name__)
    return key


def public_pem(key: Ed25519PublicKey) -> bytes:
    """Return the key as PEM, the form that is pinned in the ramdisk."""
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def verify(key: Ed25519PublicKey, signature: bytes, data: bytes, *, what: str) -> None:
    """Raise TrustError unless signature (64 raw bytes) is the key's over data.

    `what` names the signed thing in the error.
    """
    if len(signature) != SIGNATURE_BYTES:
        raise TrustError(
            f"the signature of {what} is not one",
            expected=f"{SIGNATURE_BYTES} bytes",
            found=f"{len(signature)} bytes",
        )
    try:
        key.verify(signature, data)
    except InvalidSignature as error:
        raise TrustError(
            f"the signature of {what} is wrong",
            expected="a signature by this installation's release key",
            found="a signature by another key, or over other bytes",
            hint="do not deploy it; find out who changed it, then publish it again",
        ) from error


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(KEY_FILE_BYTES_MAX)
    except OSError as error:
        raise ConfigError(f"cannot read the key {path}: {error.strerror}") from error
