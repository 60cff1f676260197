"""BMC passwords at rest: AES-256-GCM under a key that is kept outside the database.

Each sealed value is bound to its host and column, so that one copied to another row or column
does not open there. Reads no files: the key is handed in.
"""

import os
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from provisioner.core.model import HostId, Secret
from provisioner.errors import ConfigError, TrustError

KEY_BYTES: Final = 32
# 96 random bits, as NIST SP 800-38D §8.2.2 has them: safe for 2^32 values under one key.
NONCE_BYTES: Final = 12
FORMAT: Final = b"\x01"


def seal(key: bytes, host_id: HostId, column: str, secret: Secret) -> bytes:
    """Return the secret encrypted: one byte of format, the nonce, the ciphertext with its tag.

    Raises ConfigError when the key is not 32 bytes.
    """
    nonce = os.urandom(NONCE_BYTES)
    sealed = _cipher(key).encrypt(nonce, secret.reveal().encode(), _binding(host_id, column))
    return FORMAT + nonce + sealed


def open_(key: bytes, host_id: HostId, column: str, sealed: bytes) -> Secret:
    """Return the secret that `seal` put away for this host and column.

    Raises TrustError when the key, the host or the column is another or a byte was changed,
    and ConfigError when the key is not 32 bytes.
    """
    nonce, body = sealed[1 : 1 + NONCE_BYTES], sealed[1 + NONCE_BYTES :]
    cipher = _cipher(key)
    try:
        if sealed[:1] != FORMAT or len(nonce) != NONCE_BYTES:
            raise InvalidTag
        return Secret(cipher.decrypt(nonce, body, _binding(host_id, column)).decode())
    except InvalidTag as error:
        raise TrustError(
            f"a sealed value of host {host_id} does not open",
            expected=f"{column} sealed for this host with the configured key",
            hint="was the key replaced, or the row copied or edited? Set the credentials again",
        ) from error


def _cipher(key: bytes) -> AESGCM:
    if len(key) != KEY_BYTES:
        raise ConfigError(
            "the key for stored credentials has a wrong length",
            expected=f"{KEY_BYTES} bytes",
            found=f"{len(key)} bytes",
        )
    return AESGCM(key)


def _binding(host_id: HostId, column: str) -> bytes:
    # The length keeps ("ab", "c") and ("a", "bc") apart.
    host = host_id.encode()
    return b"provisioner credential\0%d\0%b\0%b" % (len(host), host, column.encode())
