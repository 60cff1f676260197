"""Releases from the command line, at the machine of a site that has never served anything."""

import json
import subprocess
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from provisioner.cli.image.keeping import given_up
from provisioner.cli.main import main
from provisioner.cli.site import OpenSite
from provisioner.errors import Unavailable
from provisioner.imaging.archive import Archive
from provisioner.imaging.blobs import FileBlobs
from provisioner.imaging.chunks import chunk_name
from provisioner.imaging.signing import create_signing_key, public_pem
from provisioner.settings import load
from provisioner.setup import Plan, initialise
from provisioner.wiring import ARCHIVE_LOCK, build

MIB = 1024 * 1024
ROOT_START = 2 * MIB


def release_id(version: str) -> str:
    """Return the id that each version of `tiny` has here."""
    return version.encode().hex().rjust(32, "0")


class Image:
    """Runs `provisioner image` at one site."""

    def __init__(self, folder: Path) -> None:
        initialise(folder, Plan())
        self.folder = folder
        self.config = folder / "provisioner.toml"

    def __call__(self, *words: str, exit_code: int = 0) -> Result:
        done = CliRunner().invoke(main, ["image", *words, "--config", str(self.config)])
        assert done.exit_code == exit_code, f"{done.stdout}{done.stderr}{done.exception!r}"
        return done

    def json(self, *words: str, exit_code: int = 0) -> Any:
        return json.loads(self(*words, "-o", "json", exit_code=exit_code).stdout)

    def publish(self, raw: Path, version: str, *, exit_code: int = 0) -> Result:
        wanted = ["--format", "raw", "--image", "tiny", "--version", version]
        known = ["--release-id", release_id(version), "--cache", str(self.folder / "cache")]
        return self("import", str(raw), *wanted, *known, exit_code=exit_code)


@pytest.fixture
def site(tmp_path: Path) -> Image:
    return Image(tmp_path / "site")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return make_raw(tmp_path / "disk.raw", b"one")


def make_raw(file: Path, content: bytes) -> Path:
    with file.open("wb") as disk:
        disk.truncate(64 * MIB)
    table = ["sgdisk", "-n1:2048:+1M", "-t1:ef02", "-n2:0:0", "-t2:8304", str(file)]
    subprocess.run(table, check=True, capture_output=True)
    with file.open("r+b") as disk:
        disk.seek(ROOT_START)
        disk.write(content * 1000)
    return file


# --- making -------------------------------------------------------------------------------


def test_a_first_image_is_imported_before_the_service_ever_ran(site: Image, raw: Path) -> None:
    site.publish(raw, "1")
    service = build(load(site.config))
    try:
        row = service.releases.show("tiny@1")
        assert row.release_id == release_id("1")
        assert service.releases.manifest("tiny@1").digest == row.digest
        assert service.audit.verify() == len(service.audit.rows())
    finally:
        service.close()


def test_the_same_version_with_other_content_is_refused(
    site: Image, raw: Path, tmp_path: Path
) -> None:
    site.publish(raw, "1")
    other = make_raw(tmp_path / "other.raw", b"two")
    assert "new version" in site.publish(other, "1", exit_code=2).stderr


def test_an_image_that_cannot_prove_itself_is_refused_with_what_to_do(
    site: Image, raw: Path
) -> None:
    words = ["--format", "raw", "--image", "tiny", "--version", "1"]
    done = site("import", str(raw), *words, "--cache", str(site.folder / "c"), exit_code=2)
    assert "release.json" in done.stderr


def test_an_image_needs_a_name_and_a_release_brings_its_own(site: Image, raw: Path) -> None:
    lacking = site("import", str(raw), "--format", "raw", "--image", "tiny", exit_code=2)
    assert "--version" in lacking.stderr
    double = site("import", str(raw), "--format", "release", "--image", "tiny", exit_code=2)
    assert "--image" in double.stderr
    assert not (site.folder / "state.db").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--parent", "x@1", "--no-parent"], "contradict"),
        (["--expires-in", "soon"], "90d"),
        (["--expires-at", "tomorrow"], "2027-03-01"),
        (["--expires-at", "2001-01-01"], "expired already"),
        (["--expires-at", "9999-12-31T23:59:59-12:00"], "2027-03-01"),
        (["--expires-at", "0001-01-01T00:00:00+12:00"], "2027-03-01"),
        (["--expires-in", "9d", "--expires-at", "2099-01-01"], "the same"),
    ],
)
def test_a_build_is_refused_before_any_work(site: Image, words: list[str], told: str) -> None:
    done = site("build", "debian-12", "--version", "1", *words, exit_code=2)
    assert told in done.stderr
    assert not (site.folder / "state.db").exists()


# --- one file -----------------------------------------------------------------------------


def test_a_release_travels_in_one_file_to_a_site_that_trusts_its_key(
    site: Image, raw: Path, tmp_path: Path
) -> None:
    site.publish(raw, "1")
    file = tmp_path / "tiny.release"
    assert "tiny@1" in site("export", "tiny@1", str(file)).stdout
    assert "exists already" in site("export", "tiny@1", str(file), exit_code=2).stderr
    other = Image(tmp_path / "other")
    refused = other("import", str(file), "--format", "release", exit_code=5)
    assert "keys trust" in refused.stderr
    assert other.json("verify", "--all") == []
    other("keys", "trust", str(site.folder / "keys" / "release.pub"))
    taken = other.json("import", str(file), "--format", "release")
    assert taken["name"] == "tiny@1"
    assert other.json("verify", "tiny@1") == []


def test_what_is_no_bundle_is_refused(site: Image, raw: Path) -> None:
    done = site("import", str(raw), "--format", "release", exit_code=2)
    assert "image export" in done.stderr


# --- looking ------------------------------------------------------------------------------


def test_two_releases_are_compared(site: Image, raw: Path, tmp_path: Path) -> None:
    site.publish(raw, "1")
    site.publish(make_raw(tmp_path / "two.raw", b"two"), "2")
    text = site("diff", "tiny@1", "tiny@2").stdout
    assert "tiny@1 → tiny@2" in text
    assert "chunks" in text
    found = site.json("diff", "tiny@1", "tiny@2")
    assert 1 <= found["chunks"] < found["chunks_total"]
    assert site.json("diff", "tiny@1", "tiny@1")["chunks"] == 0
    assert "did you mean" in site("diff", "tiny@1", "tny@2", exit_code=2).stderr


def test_a_damaged_chunk_is_found_by_name(site: Image, raw: Path) -> None:
    site.publish(raw, "1")
    assert "no problems" in site("verify", "--all").stderr
    chunk = damage_a_chunk(site)
    done = site("verify", "tiny@1", exit_code=5)
    assert "tiny@1" in done.stdout
    assert "1 release checked, 1 problem" in done.stderr
    chunk.unlink()
    assert site.json("verify", "--all", exit_code=5)[0]["release"] == "tiny@1"


def damage_a_chunk(site: Image) -> Path:
    """Change a byte of one stored chunk, and return its file."""
    service = build(load(site.config))
    try:
        digest = next(digest for _, digest in service.releases.manifest("tiny@1").stored_chunks())
    finally:
        service.close()
    chunk = FileBlobs(site.folder).path(chunk_name(digest))
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"x")
    return chunk


def test_an_empty_selection_verifies_nothing(site: Image, raw: Path) -> None:
    site.publish(raw, "1")
    assert "selects nothing" in site("verify", exit_code=2).stderr
    site("verify", "tiny@1", "--all", exit_code=2)


# --- keeping ------------------------------------------------------------------------------


def test_what_nothing_refers_to_is_removed_after_it_was_shown(site: Image, tmp_path: Path) -> None:
    site.config.write_text(site.config.read_text() + "\n[releases]\ngrace_s = 0\n")
    for version in ("1", "2", "3"):
        site.publish(make_raw(tmp_path / f"{version}.raw", version.encode() * 3), version)
    service = build(load(site.config))
    try:
        service.releases.promote("tiny@1", "stable", actor="test")
    finally:
        service.close()
    would = site.json("gc", "--keep", "1", "--dry-run")
    assert [one["name"] for one in would] == ["tiny@2"]
    assert site.json("verify", "tiny@2") == []
    done = site("gc", "--keep", "1")
    assert "removed" in done.stderr
    site("diff", "tiny@1", "tiny@3")
    site("diff", "tiny@1", "tiny@2", exit_code=2)
    assert site.json("verify", "--all") == []
    assert site.json("gc", "--keep", "1") == []


def test_a_release_that_lost_its_manifest_is_a_problem_and_no_rubbish(
    site: Image, raw: Path
) -> None:
    site.publish(raw, "1")
    manifest = next((site.folder / "releases").glob("*/manifest.json"))
    manifest.rename(site.folder / "manifest.json")
    files = sorted(site.folder.glob("*/**/*"))
    told = site.json("verify", "--all", exit_code=5)
    assert [(one["release"], one["what"]) for one in told] == [("tiny@1", "manifest")]
    refused = site("gc", exit_code=2)
    assert "tiny@1" in refused.stderr
    assert "backup" in refused.stderr
    assert sorted(site.folder.glob("*/**/*")) == files
    (site.folder / "manifest.json").rename(manifest)
    assert site.json("verify", "--all") == []
    assert site.json("gc") == []


def test_a_removed_import_is_brought_back_by_the_same_file(site: Image, raw: Path) -> None:
    site.config.write_text(site.config.read_text() + "\n[releases]\ngrace_s = 0\n")
    site.publish(raw, "1")
    first = standing(site, "tiny@1")
    site.publish(make_raw(site.folder / "other.raw", b"two"), "2")
    assert [one["name"] for one in site.json("gc", "--keep", "1")] == ["tiny@1"]
    assert standing(site, "tiny@1") == (first[0], False)
    site.publish(raw, "1")
    assert standing(site, "tiny@1") == first
    assert site.json("verify", "tiny@1") == []


def test_gc_that_finds_a_publisher_at_work_gives_up_nothing(site: Image, raw: Path) -> None:
    site.config.write_text(site.config.read_text() + "\n[releases]\ngrace_s = 0\n")
    site.publish(raw, "1")
    site.publish(make_raw(site.folder / "other.raw", b"two"), "2")
    settings = load(site.config)
    service = build(settings)
    own = service.archive
    lock = site.folder / ARCHIVE_LOCK
    impatient = Archive(own.blobs, own.policy, lock, lock_wait=timedelta(0))
    try:
        open_site = OpenSite(settings, replace(service, archive=impatient))
        with own.locked(), pytest.raises(Unavailable, match="another publisher"):
            given_up(open_site, 1)
        assert standing(site, "tiny@1")[1]
        rows, found = given_up(open_site, 1)
        assert [row.digest for row in rows] == list(found.releases) != []
    finally:
        service.close()
    assert not standing(site, "tiny@1")[1]


def standing(site: Image, name: str) -> tuple[str, bool]:
    """Return the digest of a release, and whether it is there."""
    service = build(load(site.config))
    try:
        row = service.releases.show(name)
        return row.digest, row.removed_at is None
    finally:
        service.close()


# --- signatures ---------------------------------------------------------------------------


def test_a_second_key_signs_and_is_dropped(site: Image, raw: Path, tmp_path: Path) -> None:
    site.publish(raw, "1")
    second = tmp_path / "second.key"
    public: Ed25519PrivateKey = create_signing_key(second)
    (tmp_path / "second.pub").write_bytes(public_pem(public.public_key()))
    assert "keys list" in site("sign", "tiny@1", "--key", str(second), exit_code=5).stderr
    trusted = site.json("keys", "trust", str(tmp_path / "second.pub"))[0]
    listed = site.json("keys", "list")
    assert sorted(one["is_in_use"] for one in listed) == [False, True]
    signed = site.json("sign", "tiny@1", "--key", str(second))
    assert sorted(signed["signed_by"]) == sorted(one["id"] for one in listed)
    assert site.json("verify", "tiny@1") == []
    assert site.json("keys", "drop", trusted["id"][:12])["id"] == trusted["id"]
    assert len(site.json("keys", "list")) == 1
    own = site.json("keys", "list")[0]["id"]
    site("keys", "drop", own, exit_code=2)


def test_a_new_key_signs_from_now_on_and_the_old_one_stays_trusted(
    site: Image, raw: Path, tmp_path: Path
) -> None:
    site.publish(raw, "1")
    old = site.json("keys", "list")[0]["id"]
    made = site("keys", "new")
    assert "ramdisk build" in made.stderr
    site.publish(make_raw(tmp_path / "two.raw", b"two"), "2")
    in_use = [one["id"] for one in site.json("keys", "list") if one["is_in_use"]]
    assert in_use != [old]
    assert site.json("verify", "--all") == []


@pytest.mark.parametrize("word", ["prmote", "bild", "dif"])
def test_a_typo_is_met_with_what_was_meant(word: str) -> None:
    done = CliRunner().invoke(main, ["image", word])
    assert done.exit_code == 2
    assert "Did you mean" in done.stderr
