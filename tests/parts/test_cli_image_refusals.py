"""What `provisioner image` is asked to do with files and bounds, and refuses before any work."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from provisioner.settings import load
from provisioner.wiring import build
from tests.parts.test_cli_image import Image, make_raw, release_id

NOBODY = 65534
SPAN = ("--expires-in", "90d")
LATER = ("--expires-at", "2099-01-01")


@pytest.fixture
def site(tmp_path: Path) -> Image:
    return Image(tmp_path / "site")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return make_raw(tmp_path / "disk.raw", b"one")


def publish(site: Image, raw: Path, *words: str, version: str = "1", exit_code: int = 0) -> str:
    """Import the image with further options; return what was said."""
    wanted = ["--format", "raw", "--image", "tiny", "--version", version]
    wanted += ["--release-id", release_id(version)]
    done = site(
        "import",
        str(raw),
        *wanted,
        *("--cache", str(site.folder / "cache")),
        *words,
        exit_code=exit_code,
    )
    return done.stdout + done.stderr


# --- files --------------------------------------------------------------------------------

# Each with FILE where the file goes.
READERS = {
    "import raw": ["import", "FILE", "--format", "raw", "--image", "a", "--version", "1"],
    "import qcow2": ["import", "FILE", "--format", "qcow2", "--image", "a", "--version", "1"],
    "import release": ["import", "FILE", "--format", "release"],
    "keys trust": ["keys", "trust", "FILE"],
    "sign": ["sign", "tiny@1", "--key-file", "FILE"],
    "build": ["build", "FILE", "--version", "1"],
}


def words_for(case: str, file: Path) -> list[str]:
    return [str(file) if word == "FILE" else word for word in READERS[case]]


@pytest.mark.parametrize("case", READERS)
def test_a_missing_file_and_a_folder_are_the_callers_mistake(
    site: Image, tmp_path: Path, case: str
) -> None:
    for file in (tmp_path / "nosuch.yaml", tmp_path, tmp_path / "nosuch" / "x.yaml"):
        done = site(*words_for(case, file), exit_code=2)
        assert str(file) in done.stderr
    assert not (site.folder / "state.db").exists()


@pytest.fixture
def secret() -> Iterator[Path]:
    """A file in a folder open to all, which only its owner may read."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        file = Path(folder, "secret.yaml")
        file.write_text("x")
        file.chmod(0)
        yield file


def as_nobody(*words: str) -> "subprocess.CompletedProcess[str]":
    """Run a command as a user who may read nothing that is not open to all."""
    us = os.geteuid() == 0
    drop = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"] if us else []
    return subprocess.run(
        [*drop, sys.executable, "-m", "provisioner", "image", *words],
        cwd=Path(__file__).parents[2],
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", "XDG_CACHE_HOME": "/tmp"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


@pytest.mark.parametrize("case", READERS)
def test_an_unreadable_file_is_the_callers_mistake(secret: Path, case: str) -> None:
    done = as_nobody(*words_for(case, secret))
    assert done.returncode in (2, 78), done.stderr
    assert str(secret) in done.stderr


def test_a_bundle_needs_a_folder_that_can_be_written(site: Image, raw: Path) -> None:
    publish(site, raw)
    for file in (raw / "x", site.folder / "nosuch" / "x", site.folder):
        done = site("export", "tiny@1", str(file), exit_code=2)
        assert str(file) in done.stderr
    refused = as_nobody("export", "tiny@1", "/usr/x.release")
    assert (refused.returncode, "write access to /usr" in refused.stderr) == (2, True)


def test_a_cache_that_cannot_be_made_is_refused_before_any_work(site: Image, raw: Path) -> None:
    for cache in (raw, raw / "below"):
        publish(site, raw, "--cache", str(cache), exit_code=2)
    assert not (site.folder / "state.db").exists()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe key", b"-----BEGIN PUBLIC KEY-----\nAAAA\n"])
def test_a_file_without_a_key_is_refused(site: Image, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "some.pub"
    file.write_bytes(content)
    assert "PEM" in site("keys", "trust", str(file), exit_code=2).stderr


# --- bounds -------------------------------------------------------------------------------


def test_an_import_has_bounds_and_firmware(site: Image, raw: Path) -> None:
    words = ("--firmware", "uefi", "--firmware", "secure-boot", "--minimum-version", "1")
    publish(site, raw, *LATER, *words)
    service = build(load(site.config))
    try:
        manifest = service.releases.manifest("tiny@1")
    finally:
        service.close()
    assert manifest.expires_at == "2099-01-01T00:00:00Z"
    assert manifest.minimum_version == "1"
    assert manifest.firmware == ("uefi", "secure-boot")


@pytest.mark.parametrize(
    "words", [SPAN, LATER, ("--minimum-version", "1"), ("--firmware", "bios")], ids=" ".join
)
def test_a_release_from_elsewhere_has_its_own(site: Image, raw: Path, words: list[str]) -> None:
    done = site("import", str(raw), "--format", "release", *words, exit_code=2)
    assert words[0] in done.stderr
    assert not (site.folder / "state.db").exists()


def test_a_minimum_above_the_own_version_is_refused_before_any_work(site: Image, raw: Path) -> None:
    told = publish(site, raw, "--minimum-version", "2", exit_code=2)
    assert "tiny@1 cannot ask for the minimum version 2" in told
    done = site("build", "debian-12", "--version", "1", "--minimum-version", "1.1", exit_code=2)
    assert "debian-12@1 cannot ask for the minimum version 1.1" in done.stderr
    assert not (site.folder / "state.db").exists()


def expires_at(site: Image) -> object:
    service = build(load(site.config))
    try:
        return service.releases.show("tiny@1").expires_at
    finally:
        service.close()


def test_a_span_from_now_means_the_same_moment_when_it_is_asked_for_again(
    site: Image, raw: Path
) -> None:
    publish(site, raw, *SPAN)
    first = expires_at(site)
    publish(site, raw, "--expires-in", "91d")
    assert expires_at(site) == first


@pytest.mark.parametrize(
    ("first", "again"),
    [
        ([], SPAN),
        ([], ["--minimum-version", "1"]),
        (SPAN, []),
        (LATER, ["--expires-at", "2098-01-01"]),
        (["--minimum-version", "1"], ["--minimum-version", "0.9"]),
    ],
)
def test_other_bounds_for_what_is_published_are_refused_before_any_work(
    site: Image, raw: Path, first: list[str], again: list[str]
) -> None:
    publish(site, raw, *first)
    assert "published already, with other bounds" in publish(site, raw, *again, exit_code=2)


def test_a_version_that_was_removed_keeps_its_bounds(site: Image, raw: Path) -> None:
    """The archive has forgotten it; the database has not."""
    site.config.write_text(site.config.read_text() + "\n[releases]\ngrace_s = 0\n")
    publish(site, raw, *LATER)
    publish(site, make_raw(raw.with_name("two.raw"), b"two"), version="2")
    assert "tiny@1" in site("gc", "--keep", "1").stdout
    told = publish(site, raw, "--expires-at", "2098-01-01", exit_code=2)
    assert "published already, with other bounds" in told
