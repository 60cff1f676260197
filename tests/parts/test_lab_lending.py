"""A release handed from one archive to another is whole there, and no less its own."""

import os
import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from provisioner.core.manifest import Manifest
from provisioner.core.trust import TrustPolicy, key_id
from provisioner.errors import TrustError
from provisioner.imaging.archive import Archive
from provisioner.imaging.blobs import FileBlobs
from provisioner.imaging.chunks import chunk_name
from provisioner.imaging.signing import public_hex
from provisioner.imaging.verify import verify_release
from provisioner.lab.lending import lend
from provisioner.lab.site import lab_profile
from provisioner.lab.trial import document_of, limits_of

OTHER = Ed25519PrivateKey.generate()


@pytest.fixture
def manifest(archive_of_two: Archive) -> Manifest:
    return archive_of_two.releases()[0]


def an_archive_that_trusts(folder: Path, *keys: str) -> Archive:
    return Archive(FileBlobs(folder), TrustPolicy(keys), folder / "lock", space_reserve_bytes=0)


def chunk_file(archive: Archive, manifest: Manifest) -> Path:
    assert isinstance(archive.blobs, FileBlobs)
    return archive.blobs.path(chunk_name(next(manifest.stored_chunks())[1]))


def test_it_keeps_its_signatures_and_shares_its_chunks(
    archive_of_two: Archive, manifest: Manifest, tmp_path: Path
) -> None:
    target = an_archive_that_trusts(tmp_path, *archive_of_two.policy.keys)
    stored_bytes = lend(archive_of_two, manifest, target)
    assert target.signed_by(manifest.digest) == archive_of_two.signed_by(manifest.digest)
    assert verify_release(target, manifest.digest) == []
    assert target.find(manifest.image, manifest.version) == manifest
    sizes = {digest: target.blobs.size(chunk_name(digest)) for digest in manifest.distinct_chunks}
    assert stored_bytes == sum(size or 0 for size in sizes.values())
    shared = os.stat(chunk_file(target, manifest)).st_ino
    assert shared == os.stat(chunk_file(archive_of_two, manifest)).st_ino


def test_another_site_signs_its_copy_which_it_may_break(
    archive_of_two: Archive, manifest: Manifest, tmp_path: Path
) -> None:
    public = public_hex(OTHER.public_key())
    target = an_archive_that_trusts(tmp_path, public)
    lend(archive_of_two, manifest, target, place=shutil.copyfile, signers=[OTHER])
    assert target.signed_by(manifest.digest) == {key_id(public)}
    chunk_file(target, manifest).write_bytes(b"broken")
    assert verify_release(target, manifest.digest) != []
    assert verify_release(archive_of_two, manifest.digest) == []


def test_a_site_that_does_not_trust_the_key_gets_nothing_to_deploy(
    archive_of_two: Archive, manifest: Manifest, tmp_path: Path
) -> None:
    target = an_archive_that_trusts(tmp_path, public_hex(OTHER.public_key()))
    lend(archive_of_two, manifest, target)
    with pytest.raises(TrustError):
        target.load(manifest.digest)


def test_a_profile_is_tried_with_the_racks_own_network_and_disk(tmp_path: Path) -> None:
    key = tmp_path / "key"
    Path(f"{key}.pub").write_text("ssh-ed25519 AAAA\n")
    profile = {
        "cloud_config": {"hostname": "web"},
        "network": {"version": 2},
        "disk": {"serial": "S-1"},
        "health": {"soak_s": 120, "checks": [{"type": "ssh"}]},
    }
    tried = document_of(key, profile)
    own = lab_profile(key)
    assert (tried["cloud_config"], tried["health"]) == (profile["cloud_config"], profile["health"])
    assert (tried["network"], tried["disk"]) == (own["network"], own["disk"])
    assert document_of(key, None) == own


def test_a_release_that_is_not_healthy_is_not_waited_for_as_long_as_hardware() -> None:
    assert limits_of({"health": {"soak_s": 120}})["proving_s"] == 720
    assert limits_of(None)["proving_s"] == 610
