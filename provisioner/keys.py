"""The installation's keys: made once by `provisioner init`, read and checked at every start.

A missing, weak or readable-by-others key is a problem that stops the start. No key is ever
replaced here.
"""

import hashlib
import ipaddress
import os
import re
import secrets
import stat
import tomllib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from .core.model import Secret
from .errors import RequestError
from .release_keys import RELEASE_KEY as RELEASE_KEY
from .release_keys import RELEASE_PUB as RELEASE_PUB
from .release_keys import check_in_use, new_pair
from .release_keys import parse as parse_public
from .whole_files import write_secret

if TYPE_CHECKING:
    from cryptography import x509

FOLDER: Final = "keys"
MASTER_KEY: Final = "master.key"
AGENT_TLS_KEY: Final = "agent-tls.key"
AGENT_TLS_PEM: Final = "agent-tls.pem"
ADMIN_TOKEN: Final = "admin.token"
S3_CREDENTIALS: Final = "s3.toml"
FILES: Final = (MASTER_KEY, RELEASE_KEY, RELEASE_PUB, AGENT_TLS_KEY, AGENT_TLS_PEM, ADMIN_TOKEN)
PUBLIC: Final = frozenset({RELEASE_PUB, AGENT_TLS_PEM})

MASTER_KEY_BYTES: Final = 32
TOKEN_BYTES: Final = 32
TOKEN_CHARACTERS_MIN: Final = 32
# Of 32 random bytes about 30 are distinct; fewer than this many is no accident.
DISTINCT_BYTES_MIN: Final = 16
KEY_FILE_BYTES_MAX: Final = 65536
# The ramdisk pins this very certificate, so it is not a CA's to renew; ten years outlive
# the ramdisks that carry it.
CERTIFICATE_LIFETIME: Final = timedelta(days=3650)

_HEX_KEY = re.compile(r"[0-9a-f]{64}")
_TOKEN = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class S3Credentials:
    """What opens the bucket of releases."""

    access_key: str
    secret_key: Secret


@dataclass(frozen=True)
class Keys:
    """What the files in the folder of keys hold.

    `master` (64 hex digits) encrypts BMC credentials, `release_private` (Ed25519, PEM)
    signs releases, `release_public` is the PEM of all keys that releases are trusted by, and
    `trusted` holds the same as raw keys in hex. `admin_token` is the first API token. The TLS
    files are given as paths, since the HTTP server reads them itself. `s3` is there when the
    releases are kept in a bucket.
    """

    folder: Path
    master: Secret
    release_private: Secret
    release_public: str
    agent_tls_key: Path
    agent_tls_pem: Path
    admin_token: Secret
    trusted: tuple[str, ...] = ()
    s3: S3Credentials | None = None


def load_keys(folder: Path, agent_url: str, problems: list[str], *, with_s3: bool = False) -> Keys:
    """Return the keys in `folder`; whatever is wrong with one is added to `problems`."""
    content = {name: _read(folder / name, name in PUBLIC, problems) for name in FILES}
    if all(content.values()):
        _check_master(content[MASTER_KEY], problems)
        _check_token(content[ADMIN_TOKEN], problems)
        _check_tls_pair(content[AGENT_TLS_KEY], content[AGENT_TLS_PEM], agent_url, problems)
    return Keys(
        folder=folder,
        master=Secret(content[MASTER_KEY].strip()),
        release_private=Secret(content[RELEASE_KEY]),
        release_public=content[RELEASE_PUB],
        agent_tls_key=folder / AGENT_TLS_KEY,
        agent_tls_pem=folder / AGENT_TLS_PEM,
        admin_token=Secret(content[ADMIN_TOKEN].strip()),
        trusted=_trusted(content[RELEASE_KEY], content[RELEASE_PUB], problems),
        s3=_s3_credentials(folder, problems) if with_s3 else None,
    )


def _trusted(private: str, public: str, problems: list[str]) -> tuple[str, ...]:
    """Return the trusted keys as raw keys in hex; none when something is wrong with them."""
    if not private or not public:
        return ()
    try:
        found = parse_public(public)
        check_in_use(private, found)
    except RequestError as error:
        problems.append(f"key {error.message}")
        return ()
    return tuple(key.public_hex for key in found)


def _s3_credentials(folder: Path, problems: list[str]) -> S3Credentials | None:
    """Return what `s3.toml` holds: access_key and secret_key, and nothing else."""
    path = folder / S3_CREDENTIALS
    if not path.exists():
        problems.append(
            f"key {path}: is missing; write access_key and secret_key for releases.store into it"
        )
        return None
    try:
        # Not the error's text: it may show the line, and with it the secret.
        content = tomllib.loads(_read(path, False, problems))
    except tomllib.TOMLDecodeError:
        content = {}
    names = ("access_key", "secret_key")
    if set(content) != set(names) or not all(content[name] for name in names):
        problems.append(f'key {path}: expected access_key = "…" and secret_key = "…" in TOML')
        return None
    return S3Credentials(str(content["access_key"]), Secret(str(content["secret_key"])))


def _read(path: Path, is_public: bool, problems: list[str]) -> str:
    try:
        with path.open(encoding="ascii") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(KEY_FILE_BYTES_MAX)
    except FileNotFoundError:
        problems.append(f"key {path}: is missing; `provisioner init` makes the keys")
        return ""
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"key {path}: cannot be read ({type(error).__name__})")
        return ""
    if not is_public and mode & (stat.S_IRWXG | stat.S_IRWXO):
        found = stat.S_IMODE(mode)
        problems.append(f"key {path}: others may read it (mode {found:04o}); chmod 600 it")
    if not content.strip():
        problems.append(f"key {path}: is empty")
    return content


def _check_master(content: str, problems: list[str]) -> None:
    text = content.strip()
    if not _HEX_KEY.fullmatch(text):
        problems.append(f"key {MASTER_KEY}: expected {MASTER_KEY_BYTES} random bytes in hex")
    elif len(set(bytes.fromhex(text))) < DISTINCT_BYTES_MIN:
        problems.append(f"key {MASTER_KEY}: is weak, its bytes repeat")


def _check_token(content: str, problems: list[str]) -> None:
    text = content.strip()
    if len(text) < TOKEN_CHARACTERS_MIN or not _TOKEN.fullmatch(text):
        problems.append(
            f"key {ADMIN_TOKEN}: expected at least {TOKEN_CHARACTERS_MIN} letters and digits"
        )
    elif len(set(text)) < DISTINCT_BYTES_MIN:
        problems.append(f"key {ADMIN_TOKEN}: is weak, its characters repeat")


def _check_tls_pair(private: str, pem: str, agent_url: str, problems: list[str]) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    try:
        key = serialization.load_pem_private_key(private.encode(), password=None)
        certificate = x509.load_pem_x509_certificate(pem.encode())
    except (ValueError, TypeError) as error:
        problems.append(f"key {AGENT_TLS_PEM}: expected a key and a certificate in PEM ({error})")
        return
    if key.public_key() != certificate.public_key():
        problems.append(f"key {AGENT_TLS_PEM}: does not belong to {AGENT_TLS_KEY}")
    if certificate.not_valid_after_utc <= datetime.now(UTC):
        problems.append(f"key {AGENT_TLS_PEM}: expired on {certificate.not_valid_after_utc:%F}")
    host = urlsplit(agent_url).hostname or ""
    if host and host not in (names := _names_in(certificate)):
        problems.append(
            f"key {AGENT_TLS_PEM}: is for {', '.join(names) or 'no name'}, "
            f"while agent.url says {host}"
        )


def _names_in(certificate: "x509.Certificate") -> list[str]:
    from cryptography import x509

    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    addresses = found.value.get_values_for_type(x509.IPAddress)
    return [*found.value.get_values_for_type(x509.DNSName), *(str(one) for one in addresses)]


def make_keys(folder: Path, agent_url: str) -> None:
    """Write a new set of keys into `folder`, which is created with mode 0700.

    Raises FileExistsError when there is a folder of that name already.
    """
    folder.mkdir(mode=0o700)
    release_key, release_pub = new_pair()
    tls_key, tls_pem = _new_tls_pair(urlsplit(agent_url).hostname or "localhost")
    write_secret(folder / MASTER_KEY, secrets.token_hex(MASTER_KEY_BYTES) + "\n")
    write_secret(folder / RELEASE_KEY, release_key)
    write_secret(folder / RELEASE_PUB, release_pub)
    write_secret(folder / AGENT_TLS_KEY, tls_key)
    write_secret(folder / AGENT_TLS_PEM, tls_pem)
    write_secret(folder / ADMIN_TOKEN, secrets.token_urlsafe(TOKEN_BYTES) + "\n")


def _new_tls_pair(host: str) -> tuple[str, str]:
    """Return the private key and the self-signed certificate for the agent listener."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "provisioner agent listener")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # Hosts come up with clocks that are wrong; a day of grace costs nothing here.
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + CERTIFICATE_LIFETIME)
        .add_extension(x509.SubjectAlternativeName([_general_name(host)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return private.decode(), certificate.public_bytes(serialization.Encoding.PEM).decode()


def _general_name(host: str) -> "x509.GeneralName":
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def token_digest(token: Secret) -> str:
    """Return what is kept of a token: its SHA-256 in hex."""
    return hashlib.sha256(token.reveal().encode()).hexdigest()
