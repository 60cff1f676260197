"""The keys that sign releases, and those that releases are trusted by, as files in one folder.

`release.key` is the private key in use, `release.pub` holds all trusted public keys. Each
change replaces one file as a whole, and no private key is ever lost: one that goes out of use
stays as `release-<id>.key`.
"""

import errno
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from .core.trust import KEYS_MAX, key_id
from .errors import Conflict, NotFound, RequestError, Unavailable
from .whole_files import FOR_ITS_OWNER, alone_in, replace_whole, sync, write_secret

RELEASE_KEY: Final = "release.key"
RELEASE_PUB: Final = "release.pub"
ID_PREFIX_MIN: Final = 8
PUBLIC_BYTES_MAX: Final = 65536
_PEM: Final = re.compile(r"-----BEGIN ([A-Z ]+)-----[^-]+-----END \1-----")
_ID_IN_NAME: Final = 16


@dataclass(frozen=True)
class ReleaseKey:
    """A trusted public key. `id` names it in signatures, `public_hex` is its raw 32 bytes."""

    id: str
    public_hex: str
    pem: str
    is_in_use: bool = False


def trusted_keys(folder: Path) -> tuple[ReleaseKey, ...]:
    """Return all trusted keys; the one that signs new releases is marked as in use."""
    used = _id_of_private((folder / RELEASE_KEY).read_text(encoding="ascii"))
    found = parse((folder / RELEASE_PUB).read_text(encoding="ascii"))
    return tuple(replace(key, is_in_use=key.id == used) for key in found)


def trust_key(folder: Path, pem: str) -> ReleaseKey:
    """Trust releases signed by this public key, too. Repeatable.

    Raises RequestError for anything but one Ed25519 public key, and Conflict when there are
    as many as a policy takes.
    """
    if "PRIVATE KEY" in pem:
        raise RequestError(
            "that is a private key, which stays with its owner",
            expected="a public key in PEM",
            hint="openssl pkey -in FILE -pubout writes the public half",
        )
    added = parse(pem)
    if len(added) != 1:
        raise RequestError("one key is trusted at a time", expected="1 key", found=len(added))
    with _changing(folder):
        known = trusted_keys(folder)
        same = [key for key in known if key.id == added[0].id]
        if same:
            return same[0]
        if len(known) >= KEYS_MAX:
            raise Conflict(
                "no more keys can be trusted",
                expected=f"at most {KEYS_MAX}",
                found=len(known),
                hint="drop one that is not used any more: provisioner image keys drop ID",
            )
        _write_public(folder, (*known, added[0]))
    return added[0]


def drop_key(folder: Path, key: str, *, needed: int = 1) -> ReleaseKey:
    """Trust this key no more, given by its id or the start of it; return it.

    `needed` is how many keys the settings ask to have signed a release. Raises Conflict for
    the key in use or when fewer than needed would be left, NotFound for no or several keys.
    """
    with _changing(folder):
        known = trusted_keys(folder)
        gone = _named(known, key)
        if gone.is_in_use:
            raise Conflict(
                f"key {gone.id[:_ID_IN_NAME]} signs new releases, so it is not dropped",
                hint="provisioner image keys new makes another one; then drop this one",
            )
        left = tuple(one for one in known if one.id != gone.id)
        if len(left) < needed:
            raise Conflict(
                "too few trusted keys would be left",
                expected=f"{needed}, which releases.threshold or a channel asks for",
                found=len(left),
                hint="trust another key first, or lower the threshold",
            )
        _write_public(folder, left)
    return gone


def new_release_key(folder: Path) -> ReleaseKey:
    """Make a new key, trust it, and sign with it from now on; return it.

    The old one stays trusted, and is kept as `release-<id>.key`. Killed in between, this
    leaves the old one in use. Raises Conflict when as many are trusted as a policy takes.
    """
    private, public = new_pair()
    made = parse(public)[0]
    aside = folder / _file_name(made.id)
    with _changing(folder):
        known = trusted_keys(folder)
        if len(known) >= KEYS_MAX:
            raise Conflict("no more keys can be trusted", expected=f"at most {KEYS_MAX}")
        used = next(key for key in known if key.is_in_use)
        write_secret(aside, private)
        try:
            _write_public(folder, (*known, made))
        except OSError:
            # Nobody trusts it, and nobody will.
            if made.id not in {key.id for key in trusted_keys(folder)}:
                with suppress(OSError):
                    aside.unlink()
            raise
        old = folder / _file_name(used.id)
        if not old.exists():
            os.link(folder / RELEASE_KEY, old)
        os.replace(aside, folder / RELEASE_KEY)
        sync(folder)
    return replace(made, is_in_use=True)


def parse(pem: str) -> tuple[ReleaseKey, ...]:
    """Return the public keys in a PEM text, each once.

    Raises RequestError when it holds none, or anything but Ed25519 public keys.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    blocks = [match[0] for match in _PEM.finditer(pem[:PUBLIC_BYTES_MAX])]
    if not blocks:
        raise RequestError(f"{RELEASE_PUB}: expected public keys in PEM")
    found: dict[str, ReleaseKey] = {}
    for block in blocks:
        try:
            key = load_pem_public_key(block.encode())
        except (ValueError, TypeError) as error:
            raise RequestError(f"{RELEASE_PUB}: expected public keys in PEM ({error})") from error
        if not isinstance(key, Ed25519PublicKey):
            raise RequestError(f"{RELEASE_PUB}: expected Ed25519 keys", found=type(key).__name__)
        public_hex = key.public_bytes_raw().hex()
        found[public_hex] = ReleaseKey(key_id(public_hex), public_hex, block + "\n")
    if len(found) > KEYS_MAX:
        raise RequestError(f"{RELEASE_PUB}: expected at most {KEYS_MAX} keys", found=len(found))
    return tuple(found.values())


def check_in_use(private: str, trusted: Sequence[ReleaseKey]) -> None:
    """Raise RequestError unless the private key (PEM) is the other half of a trusted one."""
    used = _id_of_private(private)
    if used not in {key.id for key in trusted}:
        raise RequestError(f"{RELEASE_PUB}: does not belong to {RELEASE_KEY}")


def new_pair() -> tuple[str, str]:
    """Return a new private key and its public key, in PEM."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return private.decode(), public.decode()


def _id_of_private(pem: str) -> str:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(pem.encode(), password=None)
    except (ValueError, TypeError) as error:
        raise RequestError(f"{RELEASE_KEY}: expected an Ed25519 key in PEM ({error})") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise RequestError(f"{RELEASE_KEY}: expected an Ed25519 key", found=type(key).__name__)
    return hashlib.sha256(key.public_key().public_bytes_raw()).hexdigest()


def _named(known: Sequence[ReleaseKey], key: str) -> ReleaseKey:
    fitting = [one for one in known if one.id.startswith(key)] if len(key) >= ID_PREFIX_MIN else []
    if len(fitting) != 1:
        raise NotFound(
            f"{key} is not one trusted key",
            expected=f"{ID_PREFIX_MIN} digits or more of one of the ids",
            found=[one.id[:_ID_IN_NAME] for one in known],
            hint="provisioner image keys list",
        )
    return fitting[0]


def _write_public(folder: Path, keys: Sequence[ReleaseKey]) -> None:
    text = "".join(key.pem for key in keys)
    replace_whole(folder / RELEASE_PUB, text, FOR_ITS_OWNER)


def _file_name(key: str) -> str:
    return f"release-{key[:_ID_IN_NAME]}.key"


@contextmanager
def _changing(folder: Path) -> Iterator[None]:
    """Be the only one who changes the keys. Raises Unavailable where the disk does not do it."""
    try:
        with alone_in(folder, f"somebody else is changing the keys in {folder}"):
            yield
    except OSError as error:
        raise Unavailable(
            f"the keys in {folder} cannot be changed: {error.strerror}",
            hint="free some space on that disk and try again; the key in use is the same as before"
            if error.errno in (errno.ENOSPC, errno.EDQUOT)
            else "may this user write there, and is that disk well? the key in use is the same",
        ) from error
