"""What is done with published releases: verified, compared, collected, carried elsewhere."""

from __future__ import annotations

import io
import json
import os
import random
import secrets
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from provisioner.core.manifest import Manifest
from provisioner.core.model import Secret
from provisioner.core.trust import TrustPolicy
from provisioner.errors import Conflict, NotFound, RequestError, TrustError, Unavailable
from provisioner.imaging import signing
from provisioner.imaging.archive import Archive, folder_of
from provisioner.imaging.bundle import export_release, import_release
from provisioner.imaging.chunks import chunk_name
from provisioner.imaging.difference import difference
from provisioner.imaging.garbage import collect
from provisioner.imaging.publish import Publisher
from provisioner.imaging.s3_blobs import S3Blobs, S3Place
from provisioner.imaging.verify import verify_release
from tests.parts.s3_server import make_bucket, s3_server
from tests.parts.test_imaging_archive import (
    CHUNK,
    FACTS,
    MIB,
    SIGNER,
    an_archive,
    files_of,
    make_disk,
    publish,
    root_of,
)
from tests.parts.test_imaging_blobs import FAILS_AT_READING

CORRUPTIONS = 100
NOW = datetime(2026, 11, 25, tzinfo=UTC)


def listing(**sizes: int) -> bytes:
    """Return a file manifest with files of these sizes."""
    files = [{"path": f"/{name}", "type": "file", "size": size} for name, size in sizes.items()]
    return json.dumps({"format": 1, "files": files}).encode()


OLD = replace(
    FACTS,
    attachments={"files.json": listing(a=1, b=2), "spdx.json": b'{"spdxVersion":"SPDX-2.3"}'},
    packages={"bash": "5.2", "less": "590"},
    log="it was built",
    record={"builder": "here"},
)
NEW = replace(
    OLD,
    version="2",
    packages={"bash": "5.3", "vim": "9"},
    attachments={**OLD.attachments, "files.json": listing(b=3, c=1)},
)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk.raw", os.urandom(20 * CHUNK))


def change(disk: Path, chunk: int, content: bytes = b"changed") -> None:
    with disk.open("r+b") as file:
        file.seek(MIB + chunk * CHUNK)
        file.write(content)


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_server(tmp_path_factory.mktemp("s3")) as address:
        yield address


@pytest.fixture(params=["folder", "bucket"])
def archive(request: pytest.FixtureRequest, tmp_path: Path) -> Archive:
    if request.param == "folder":
        return an_archive(tmp_path / "archive")
    endpoint, bucket = request.getfixturevalue("endpoint"), f"b-{secrets.token_hex(8)}"
    make_bucket(endpoint, bucket)
    place = S3Place(f"s3://{bucket}/site", "key", Secret("secret"), endpoint)
    policy = TrustPolicy((signing.public_hex(SIGNER.public_key()),))
    return Archive(S3Blobs(place), policy, tmp_path / "lock")


def test_a_release_is_published_verified_and_put_together(
    archive: Archive, disk: Path, tmp_path: Path
) -> None:
    manifest = publish(archive, disk, OLD)
    assert verify_release(archive, manifest.digest) == []
    assert archive.attachment(manifest, "spdx.json") == OLD.attachments["spdx.json"]
    assert archive.log(manifest.digest) == "it was built"
    assert archive.record(manifest.digest) == {"builder": "here"}
    archive.write_image(manifest, tmp_path / "again.raw")
    assert (tmp_path / "again.raw").read_bytes() == disk.read_bytes()


def test_what_differs_is_told_by_package_file_and_chunk(archive: Archive, disk: Path) -> None:
    old = publish(archive, disk, OLD)
    change(disk, 3)
    change(disk, 7, bytes(CHUNK))
    new = publish(archive, disk, NEW)
    found = difference(archive, old, new)
    assert (found.packages.added, found.packages.removed) == (("vim",), ("less",))
    assert found.packages.changed == ("bash",)
    assert found.files is not None
    assert (found.files.added, found.files.removed) == (("/c",), ("/a",))
    assert found.files.changed == ("/b",)
    assert (found.chunks, found.written_bytes) == (2, 2 * CHUNK)
    # The chunk that became zero is written and not fetched.
    assert found.fetched_bytes == archive.blobs.size(chunk_name(str(new.chunks[16 + 3])))
    assert 0 < found.index_bytes < 20_000
    assert difference(archive, new, new).chunks == 0


def test_what_nothing_refers_to_is_removed_and_nothing_else(archive: Archive, disk: Path) -> None:
    old = publish(archive, disk, OLD)
    change(disk, 3)
    new = publish(archive, disk, NEW)
    only_old = old.distinct_chunks - new.distinct_chunks
    planned = collect(archive, lambda: {new.digest}, dry_run=True)
    assert (planned.releases, planned.chunks) == ((old.digest,), len(only_old))
    assert verify_release(archive, old.digest) == []
    assert collect(archive, lambda: {new.digest}) == planned
    assert verify_release(archive, new.digest) == []
    with pytest.raises(NotFound):
        archive.load(old.digest)
    assert not list(archive.blobs.sizes(f"{folder_of(old.digest)}/"))
    assert all(archive.blobs.size(chunk_name(digest)) is None for digest in only_old)
    again = collect(archive, lambda: {new.digest})
    assert (again.releases, again.chunks, again.freed_bytes) == ((), 0, 0)


def test_nothing_is_removed_while_a_kept_release_cannot_be_read(tmp_path: Path, disk: Path) -> None:
    archive = an_archive(tmp_path / "archive")
    old = publish(archive, disk, OLD)
    new = publish(archive, disk, replace(NEW, version="3"))
    (root_of(archive) / folder_of(new.digest) / "manifest.json").write_bytes(b"{}")
    before = files_of(archive)
    with pytest.raises(Conflict, match="nothing was removed"):
        collect(archive, lambda: {new.digest})
    assert files_of(archive) == before
    assert verify_release(archive, old.digest) == []


def test_what_is_signed_by_dropped_keys_only_holds_up_no_collecting(
    tmp_path: Path, disk: Path
) -> None:
    """A key that was stolen is dropped at once: that must not end all housekeeping."""
    archive = an_archive(tmp_path / "archive")
    old = publish(archive, disk, OLD)
    change(disk, 3)
    kept = publish(archive, disk, NEW)
    fresh = Ed25519PrivateKey.generate()
    later = an_archive(tmp_path / "archive", fresh)
    assert collect(later, lambda: {kept.digest}).releases == (old.digest,)
    with pytest.raises(TrustError, match="no trusted key"):
        later.load(kept.digest)
    # Its digest stands in the database; so a trusted key may still vouch for it.
    assert Publisher(later, [fresh]).sign(kept.digest) == kept
    assert verify_release(later, kept.digest) == []


def test_a_kept_release_without_its_manifest_is_not_taken_for_a_leftover(
    archive: Archive, disk: Path, tmp_path: Path
) -> None:
    kept = publish(archive, disk, OLD)
    export_release(archive, kept.digest, tmp_path / "bundle")
    archive.blobs.delete(f"{folder_of(kept.digest)}/manifest.json")
    before = dict(archive.blobs.sizes(""))
    for is_dry_run in (True, False):
        with pytest.raises(Conflict, match="nothing was removed") as refused:
            collect(archive, lambda: {kept.digest}, dry_run=is_dry_run)
        assert f"tiny@1 ({kept.digest})" in str(refused.value.found)
    assert dict(archive.blobs.sizes("")) == before
    assert [one.what for one in verify_release(archive, kept.digest)] == ["manifest"]
    import_release(archive, tmp_path / "bundle")
    assert collect(archive, lambda: {kept.digest}).freed_bytes == 0
    assert verify_release(archive, kept.digest) == []


@pytest.mark.parametrize("kept_files", range(1, 7))
def test_what_a_killed_publisher_or_collector_left_is_removed(
    tmp_path: Path, disk: Path, kept_files: int
) -> None:
    """Whatever was written last or deleted first: a folder without its manifest is nobody's."""
    archive = an_archive(tmp_path / "archive")
    whole = publish(archive, disk, OLD)
    before = files_of(archive)
    change(disk, 3)
    half = publish(archive, disk, NEW)
    folder = root_of(archive) / folder_of(half.digest)
    (folder / "manifest.json").unlink()
    for path in sorted(folder.iterdir())[kept_files:]:
        path.unlink()
    # One that is to be kept was published: nobody's are only those that the service forgot.
    left = files_of(archive)
    with pytest.raises(Conflict, match="not in the archive") as refused:
        collect(archive, lambda: {whole.digest, half.digest})
    assert half.digest in str(refused.value.found)
    assert files_of(archive) == left
    collect(archive, lambda: {whole.digest})
    assert files_of(archive) == before
    assert publish(archive, disk, NEW) == half


def test_nothing_is_removed_while_somebody_publishes(tmp_path: Path, disk: Path) -> None:
    archive = an_archive(tmp_path / "archive")

    def collect_meanwhile(_: Manifest, __: int) -> None:
        collect(archive, set)

    with pytest.raises(Unavailable, match="another publisher"):
        publish(archive, disk, OLD, collect_meanwhile)


def test_a_release_travels_as_one_file(archive: Archive, disk: Path, tmp_path: Path) -> None:
    manifest = publish(archive, disk, OLD)
    bundle = tmp_path / "web.release"
    export_release(archive, manifest.digest, bundle)
    elsewhere = an_archive(tmp_path / "elsewhere")
    registered: list[tuple[Manifest, int]] = []
    taken = import_release(elsewhere, bundle, lambda *one: registered.append(one))
    assert taken == manifest
    stored = sum(size for _, size in elsewhere.blobs.sizes("chunks/"))
    assert registered == [(manifest, stored)]
    assert verify_release(elsewhere, manifest.digest) == []
    assert elsewhere.log(manifest.digest) == "it was built"
    assert import_release(elsewhere, bundle) == manifest
    with pytest.raises(RequestError, match="exists already"):
        export_release(archive, manifest.digest, bundle)
    assert [path.name for path in tmp_path.glob("*.release*")] == ["web.release"]


def test_a_bundle_of_an_untrusted_publisher_is_refused(tmp_path: Path, disk: Path) -> None:
    archive = an_archive(tmp_path / "archive")
    bundle = tmp_path / "bundle"
    export_release(archive, publish(archive, disk, OLD).digest, bundle)
    elsewhere = an_archive(tmp_path / "elsewhere", Ed25519PrivateKey.generate())
    with pytest.raises(TrustError, match="no key that is trusted here"):
        import_release(elsewhere, bundle)
    assert files_of(elsewhere) == set()


def test_a_bundle_is_not_taken_for_another_release_with_the_same_bytes(
    tmp_path: Path, disk: Path
) -> None:
    archive, elsewhere = an_archive(tmp_path / "archive"), an_archive(tmp_path / "elsewhere")
    theirs = publish(archive, disk, OLD)
    ours = publish(elsewhere, disk, replace(OLD, builder="another"))
    assert ours.digest != theirs.digest
    export_release(archive, theirs.digest, tmp_path / "bundle")
    before = files_of(elsewhere)
    with pytest.raises(Conflict, match="another release") as refused:
        import_release(elsewhere, tmp_path / "bundle")
    assert theirs.digest in str(refused.value.expected)
    assert ours.digest in str(refused.value.found)
    assert files_of(elsewhere) == before


def test_a_bundle_that_was_signed_elsewhere_brings_the_signature_home(
    tmp_path: Path, disk: Path
) -> None:
    other = Ed25519PrivateKey.generate()
    here = an_archive(tmp_path / "here", SIGNER, other)
    there = an_archive(tmp_path / "there", SIGNER, other)
    manifest = publish(here, disk, OLD)
    export_release(here, manifest.digest, tmp_path / "out")
    import_release(there, tmp_path / "out")
    Publisher(there, [other]).sign(manifest.digest)
    export_release(there, manifest.digest, tmp_path / "back")
    import_release(here, tmp_path / "back")
    assert len(here.signed_by(manifest.digest)) == 2


def test_files_that_cannot_be_read_or_written_are_the_callers_matter(
    tmp_path: Path, disk: Path
) -> None:
    archive = an_archive(tmp_path / "archive")
    manifest = publish(archive, disk, OLD)
    with pytest.raises(RequestError, match="cannot be written"):
        export_release(archive, manifest.digest, tmp_path / "no" / "folder")
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(RequestError, match="cannot be read"):
            import_release(archive, path)
    (tmp_path / "other").write_bytes(b"some other file")
    with pytest.raises(RequestError, match="not a whole release bundle"):
        import_release(archive, tmp_path / "other")


def test_of_a_failed_import_the_disk_is_blamed_that_failed(tmp_path: Path, disk: Path) -> None:
    archive = an_archive(tmp_path / "archive")
    bundle = tmp_path / "bundle"
    export_release(archive, publish(archive, disk, OLD).digest, bundle)
    elsewhere = an_archive(tmp_path / "elsewhere")
    with pytest.raises(RequestError, match=f"{FAILS_AT_READING} cannot be read"):
        import_release(elsewhere, FAILS_AT_READING)
    (tmp_path / "elsewhere" / "chunks").write_bytes(b"a file where a folder belongs")
    with pytest.raises(Unavailable, match=f"in {tmp_path / 'elsewhere'}") as caught:
        import_release(elsewhere, bundle)
    assert "Not a directory" in str(caught.value.found)


def test_a_chunk_on_a_bad_sector_is_a_problem_of_its_release(tmp_path: Path, disk: Path) -> None:
    archive = an_archive(tmp_path / "archive")
    manifest = publish(archive, disk, OLD)
    index, digest = next(manifest.stored_chunks())
    path = root_of(archive) / chunk_name(digest)
    path.unlink()
    path.symlink_to(FAILS_AT_READING)
    found = verify_release(archive, manifest.digest)
    assert [(one.what, one.found) for one in found] == [
        (f"chunk {index}", "cannot be read: Input/output error")
    ]


@pytest.mark.parametrize("seed", range(30))
def test_a_damaged_bundle_leaves_nothing_behind(tmp_path: Path, disk: Path, seed: int) -> None:
    """Bits flipped, the file cut, a member left out, added, or put in another's place."""
    archive = an_archive(tmp_path / "archive")
    bundle = tmp_path / "bundle"
    manifest = export_release(archive, publish(archive, disk, OLD).digest, bundle)
    chance = random.Random(seed)
    how = damage_bundle(bundle, chance)
    elsewhere = an_archive(tmp_path / "elsewhere")
    try:
        import_release(elsewhere, bundle)
    except (TrustError, RequestError):
        assert files_of(elsewhere) == set(), how
    else:
        # What is not signed may change: the log, the record, the tar's own padding.
        assert verify_release(elsewhere, manifest.digest) == [], how


def damage_bundle(bundle: Path, chance: random.Random) -> str:
    data = bundle.read_bytes()
    kind = chance.choice(["flip", "cut", "drop", "add", "swap"])
    if kind == "flip":
        at = chance.randrange(len(data))
        bundle.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        return f"a bit of byte {at}"
    if kind == "cut":
        bundle.write_bytes(data[: chance.randrange(len(data) - 10240)])
        return "cut"
    with tarfile.open(bundle) as tar:
        members = [(one.name, tar.extractfile(one).read()) for one in tar]  # type: ignore[union-attr] # files only
    at = chance.randrange(2, len(members) - 1)
    if kind == "drop":
        del members[at]
    elif kind == "add":
        members.insert(at, ("chunks/ab/" + "ab" * 32, b"stranger"))
    else:
        (one, first), (two, second) = members[at], members[at + 1]
        members[at : at + 2] = [(one, second), (two, first)]
    with tarfile.open(bundle, "w") as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return f"{kind} of {members[at][0]}"


def test_every_one_of_a_hundred_corruptions_is_found(tmp_path: Path, disk: Path) -> None:
    """Bit flips, truncations and swaps of all that is signed, and of the signature."""
    archive = an_archive(tmp_path / "archive")
    manifest = publish(archive, disk, OLD)
    chance = random.Random(20261125)
    root = root_of(archive)
    unsigned = {"build.json", "build.log.zst"}
    names = [
        *(root / chunk_name(digest) for digest in manifest.distinct_chunks),
        *(
            path
            for path in (root / folder_of(manifest.digest)).iterdir()
            if path.name not in unsigned
        ),
    ]
    kinds = set()
    for number in range(CORRUPTIONS):
        path = names[number] if number < len(names) else chance.choice(names)
        other = chance.choice([one for one in names if one != path])
        kinds.add((kind := chance.choice(["flip", "cut", "swap"]), path.parent.parent.name))
        kept = {one: one.read_bytes() for one in (path, other)}
        spoil_file(path, other, kind, chance)
        found = verify_release(archive, manifest.digest)
        assert found, f"{kind} of {path}"
        if path.name.split(".")[0] in ("spdx", "files") or path.name == "manifest.sig":
            with pytest.raises(TrustError):
                archive.check(manifest.digest, channel=None, now=NOW)
        for one, content in kept.items():
            one.write_bytes(content)
    assert len(kinds) == 6
    assert verify_release(archive, manifest.digest) == []


def spoil_file(path: Path, other: Path, kind: str, chance: random.Random) -> None:
    data = path.read_bytes()
    if kind == "flip":
        at = chance.randrange(len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :])
    elif kind == "cut":
        path.write_bytes(data[: chance.randrange(len(data))])
    else:
        path.write_bytes(other.read_bytes())
        other.write_bytes(data)


def test_a_second_key_signs_and_the_first_may_be_retired(tmp_path: Path, disk: Path) -> None:
    """Key rotation: sign with the new key, and only then stop to trust the old one."""
    fresh = Ed25519PrivateKey.generate()
    root = tmp_path / "archive"
    both = an_archive(root, SIGNER, fresh)
    manifest = publish(both, disk, OLD)
    assert len(both.signed_by(manifest.digest)) == 1
    with pytest.raises(TrustError, match="no trusted key"):
        an_archive(root, fresh).load(manifest.digest)
    assert Publisher(both, [fresh]).sign(manifest.digest) == manifest
    assert len(both.signed_by(manifest.digest)) == 2
    assert an_archive(root, fresh).load(manifest.digest) == manifest
    assert an_archive(root, SIGNER).load(manifest.digest) == manifest


def test_a_wrong_signature_under_a_trusted_name_is_not_outvoted(tmp_path: Path, disk: Path) -> None:
    fresh = Ed25519PrivateKey.generate()
    archive = an_archive(tmp_path / "archive", SIGNER, fresh)
    manifest = publish(archive, disk, OLD, signers=[SIGNER, fresh])
    path = root_of(archive) / folder_of(manifest.digest) / "manifest.sig"
    value = json.loads(path.read_bytes())
    value["signatures"][0]["signature"] = "00" * 64
    path.write_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())
    with pytest.raises(TrustError, match="is wrong"):
        archive.load(manifest.digest)


def test_one_damaged_release_holds_up_nobody_else(tmp_path: Path, disk: Path) -> None:
    archive = an_archive(tmp_path / "archive")
    bad = publish(archive, disk, OLD)
    (root_of(archive) / folder_of(bad.digest) / "manifest.json").write_bytes(b"{}")
    change(disk, 1)
    good = publish(archive, disk, NEW)
    assert archive.releases() == [good]
    assert set(archive.digests()) == {bad.digest, good.digest}
    assert [one.what for one in verify_release(archive, bad.digest)] == ["manifest"]
