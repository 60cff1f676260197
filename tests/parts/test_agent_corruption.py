"""One hundred ways to damage a release in its store: none of them is ever booted.

The store is files as they lie in an archive, served by the real boot listener's routes; the
agent's real code deploys from there onto a file. Half of the time a mirror has sound chunks.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from provisioner.agent.layout import HEAD_BYTES, TAIL_BYTES
from provisioner.errors import ProvisionerError, TrustError
from tests.parts.agent_rig import Rig, rig_with
from tests.parts.agent_service import (
    CHUNK,
    MIB,
    Release,
    Service,
    make_image,
    make_release,
    running,
)
from tests.parts.release_store import lay_out, served

CASES = 100
IMAGE_MIB = 6
DISK_MIB = 12
MANIFESTS = ("manifest.json", "manifest.json.zst")
TOGETHER = {"manifests": MANIFESTS, "release": (*MANIFESTS, "manifest.sig")}
# What may end a deployment here; all say that the release is to blame, and none is a bug.
CODES = {"manifest_signature", "manifest_digest", "chunk_corrupt"}

Damage = Callable[[random.Random, bytes, bytes], bytes]


@dataclass(frozen=True)
class Releases:
    """The release that is asked for, and an earlier one by the same key."""

    asked: Release
    earlier: Release


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> Releases:
    image = make_image(tmp_path_factory.mktemp("image") / "image", size_mib=IMAGE_MIB)
    asked = make_release(image, version="2")
    return Releases(asked, make_release(image, asked.key, version="1"))


def flipped(chance: random.Random, data: bytes, _: bytes) -> bytes:
    spoilt = bytearray(data)
    spoilt[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(spoilt)


def truncated(chance: random.Random, data: bytes, _: bytes) -> bytes:
    return data[: chance.randrange(len(data))]


def swapped(_chance: random.Random, _data: bytes, other: bytes) -> bytes:
    return other


def damage(chance: random.Random, how: Damage, what: str, store: Path, releases: Releases) -> None:
    """Damage one file, or several that belong together."""
    asked, earlier = releases.asked.files(), releases.earlier.files()
    if what == "chunk":
        path, other = chance.sample(sorted(releases.asked.chunks), 2)
        (store / path[1:]).write_bytes(how(chance, asked[path], asked[other]))
        return
    for name in TOGETHER.get(what, (what,)):
        path = f"{releases.asked.folder}/{name}"
        swap = earlier[f"{releases.earlier.folder}/{name}"]
        (store / path[1:]).write_bytes(how(chance, asked[path], swap))


def is_bootable(disk: bytes) -> bool:
    """Say whether firmware could find a partition table, or boot code, anywhere."""
    tables = disk[512 : 512 + 8], disk[-512:][:8]
    return b"EFI PART" in tables or disk[510:512] == b"\x55\xaa"


@pytest.mark.parametrize("seed", range(CASES))
def test_what_is_damaged_is_never_booted(tmp_path: Path, releases: Releases, seed: int) -> None:
    chance = random.Random(seed)
    how = chance.choice([flipped, truncated, swapped])
    what = chance.choice(["chunk"] * 4 + [*MANIFESTS, "manifest.sig", *TOGETHER])
    has_mirror = chance.random() < 0.5
    store, release = tmp_path / "store", releases.asked
    lay_out(store, release)
    with (
        served(store) as url,
        running(Service(files=dict(release.chunks), hello={})) as mirror,
        rig_with(tmp_path / "host", release, disk_mib=DISK_MIB) as rig,
    ):
        damage(chance, how, what, store, releases)
        rig.service.boot_url = url
        if has_mirror:
            rig.service.hello["mirrors"] = [mirror.boot_url]
        error = outcome(rig)
    found = rig.disk.read_bytes()
    survives = what in MANIFESTS or (what == "chunk" and has_mirror)
    if error is None:
        assert found[CHUNK : IMAGE_MIB * MIB] == release.raw[CHUNK:]
        assert is_bootable(found)
        # A bit that means nothing to the unpacker harms nobody, and nothing else gets through.
        assert survives or (what == "chunk" and how is flipped)
        return
    assert not survives, error
    assert not is_bootable(found)
    assert not rig.service.told("seed")
    assert isinstance(error, TrustError)
    assert error.code in CODES
    assert error.expected


def outcome(rig: Rig) -> ProvisionerError | None:
    try:
        rig.run()
    except ProvisionerError as error:
        return error
    return None


def test_a_disk_that_is_whole_is_told_from_one_that_is_not(releases: Releases) -> None:
    """The hundred would prove nothing if `is_bootable` always said no."""
    whole = releases.asked.raw
    assert is_bootable(whole)
    assert is_bootable(bytes(HEAD_BYTES) + whole[HEAD_BYTES:])
    assert not is_bootable(bytes(HEAD_BYTES) + whole[HEAD_BYTES:-TAIL_BYTES] + bytes(TAIL_BYTES))
