"""Keys of releases as files: trusted, dropped, exchanged, and never lost."""

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from provisioner import keys
from provisioner.core.trust import KEYS_MAX, key_id
from provisioner.errors import Conflict, NotFound, ProvisionerError, RequestError
from provisioner.imaging.signing import load_public_keys, load_signing_key, public_hex
from provisioner.release_keys import (
    ReleaseKey,
    drop_key,
    new_pair,
    new_release_key,
    parse,
    trust_key,
    trusted_keys,
)
from provisioner.settings import CONFIG_FILE, load
from provisioner.setup import Plan, initialise


@pytest.fixture
def installation(tmp_path: Path) -> Path:
    folder = tmp_path / "installation"
    initialise(folder, Plan())
    return folder


@pytest.fixture
def folder(installation: Path) -> Path:
    return installation / keys.FOLDER


def in_use(folder: Path) -> ReleaseKey:
    return next(key for key in trusted_keys(folder) if key.is_in_use)


def test_a_new_installation_trusts_its_own_key(folder: Path) -> None:
    (key,) = trusted_keys(folder)
    signer = load_signing_key(folder / keys.RELEASE_KEY)
    assert key.public_hex == public_hex(signer.public_key())
    assert key.id == key_id(key.public_hex)
    assert key.is_in_use


def test_another_key_is_trusted_once(folder: Path, installation: Path) -> None:
    _, public = new_pair()
    added = trust_key(folder, public)
    assert trust_key(folder, "a comment\n" + public) == added
    assert [key.id for key in trusted_keys(folder)] == [in_use(folder).id, added.id]
    assert len(load_public_keys(folder / keys.RELEASE_PUB)) == 2
    assert load(installation / CONFIG_FILE).keys.trusted == tuple(
        key.public_hex for key in trusted_keys(folder)
    )
    assert stat.S_IMODE((folder / keys.RELEASE_PUB).stat().st_mode) == 0o600


def an_ec_key() -> str:
    public = ec.generate_private_key(ec.SECP256R1()).public_key()
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


NO_KEYS: dict[str, tuple[Callable[[], str], str]] = {
    "nothing": (lambda: "", "public keys in PEM"),
    "a private key": (lambda: new_pair()[0], "private key"),
    "two keys": (lambda: new_pair()[1] + new_pair()[1], "one key"),
    "another kind": (an_ec_key, "Ed25519"),
    "a damaged one": (lambda: new_pair()[1].replace("MC", "MX"), "public keys in PEM"),
}


@pytest.mark.parametrize("case", NO_KEYS)
def test_what_is_no_public_key_is_not_trusted(folder: Path, case: str) -> None:
    make, words = NO_KEYS[case]
    before = (folder / keys.RELEASE_PUB).read_text()
    with pytest.raises(RequestError, match=words):
        trust_key(folder, make())
    assert (folder / keys.RELEASE_PUB).read_text() == before


def test_so_many_keys_at_most(folder: Path) -> None:
    for _ in range(KEYS_MAX - 1):
        trust_key(folder, new_pair()[1])
    calls: list[Callable[[], object]] = [
        lambda: trust_key(folder, new_pair()[1]),
        lambda: new_release_key(folder),
    ]
    for call in calls:
        with pytest.raises(Conflict, match="no more keys"):
            call()
    assert len(trusted_keys(folder)) == KEYS_MAX


def test_a_key_is_exchanged_and_the_old_one_is_kept(folder: Path, installation: Path) -> None:
    old = in_use(folder)
    secret = (folder / keys.RELEASE_KEY).read_text()
    made = new_release_key(folder)
    assert in_use(folder) == made != old
    assert {key.id for key in trusted_keys(folder)} == {old.id, made.id}
    kept = folder / f"release-{old.id[:16]}.key"
    assert kept.read_text() == secret
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert drop_key(folder, old.id[:8]).id == old.id
    assert [key.id for key in trusted_keys(folder)] == [made.id]
    assert len(load(installation / CONFIG_FILE).keys.trusted) == 1
    assert kept.exists()


def test_exchanging_back_and_forth_loses_nothing(folder: Path) -> None:
    made = [in_use(folder), new_release_key(folder), new_release_key(folder)]
    stored = {
        public_hex(load_signing_key(path).public_key()) for path in folder.glob("release*.key")
    }
    assert stored == {key.public_hex for key in made}
    assert {key.id for key in trusted_keys(folder)} == {key.id for key in made}


def test_the_key_in_use_is_not_dropped(folder: Path) -> None:
    trust_key(folder, new_pair()[1])
    with pytest.raises(Conflict, match="signs new releases") as caught:
        drop_key(folder, in_use(folder).id)
    assert "keys new" in (caught.value.hint or "")


def test_no_fewer_keys_are_left_than_are_needed(folder: Path) -> None:
    added = trust_key(folder, new_pair()[1])
    with pytest.raises(Conflict, match="too few"):
        drop_key(folder, added.id, needed=2)
    drop_key(folder, added.id)


@pytest.mark.parametrize("name", ["", "0" * 64, "ab"])
def test_an_unknown_key_is_met_with_the_known_ones(folder: Path, name: str) -> None:
    with pytest.raises(NotFound) as caught:
        drop_key(folder, name)
    assert caught.value.found == [in_use(folder).id[:16]]


def test_one_change_at_a_time(folder: Path) -> None:
    holder = (
        "import fcntl, os, sys; fd = os.open(sys.argv[1], os.O_RDONLY);"
        "fcntl.flock(fd, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "held\n"
        calls: list[Callable[[], object]] = [
            lambda: new_release_key(folder),
            lambda: trust_key(folder, new_pair()[1]),
        ]
        for call in calls:
            with pytest.raises(Conflict, match="somebody else"):
                call()
        other.stdin.close()
    assert len(trusted_keys(folder)) == 1


STEPS = 12
# Ends the process at one call that touches the disk, as a power cut would.
DIES = """
import os, sys
from pathlib import Path
from provisioner import release_keys
calls = 0
def dying(real):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == int(sys.argv[2]):
            os._exit(9)
        return real(*args, **kwargs)
    return call
for name in ("open", "replace", "link", "fsync"):
    setattr(os, name, dying(getattr(os, name)))
release_keys.new_release_key(Path(sys.argv[1]))
"""


@pytest.mark.parametrize("call", range(1, STEPS + 2))
def test_a_kill_at_any_step_leaves_a_key_that_signs_and_is_trusted(
    installation: Path, call: int
) -> None:
    folder = installation / keys.FOLDER
    old = in_use(folder)
    ended = subprocess.run(
        [sys.executable, "-c", DIES, str(folder), str(call)], check=False, cwd=os.getcwd()
    )
    assert ended.returncode == (9 if call <= STEPS else 0)
    load(installation / CONFIG_FILE)
    assert old.id in {key.id for key in trusted_keys(folder)}
    secrets = {
        public_hex(load_signing_key(path).public_key())
        for path in folder.glob("release*.key")
        if path.stat().st_size
    }
    assert old.public_hex in secrets
    # Nothing is trusted whose private half was lost.
    assert {key.public_hex for key in trusted_keys(folder)} <= secrets
    new_release_key(folder)
    assert in_use(folder) != old


def test_a_file_of_public_keys_says_what_is_wrong_with_it() -> None:
    with pytest.raises(ProvisionerError, match=r"release\.pub: expected public keys"):
        parse("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n")
