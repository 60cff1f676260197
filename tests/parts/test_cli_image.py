"""Images are published from the command line, by a site that has never served anything."""

import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from provisioner.cli.main import main
from provisioner.settings import load
from provisioner.setup import Plan, initialise
from provisioner.wiring import build

RELEASE_ID = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    initialise(tmp_path / "site", Plan())
    return tmp_path / "site" / "provisioner.toml"


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    file = tmp_path / "disk.raw"
    with file.open("wb") as disk:
        disk.truncate(64 * 1024 * 1024)
    table = ["sgdisk", "-n1:2048:+1M", "-t1:ef02", "-n2:0:0", "-t2:8304", str(file)]
    subprocess.run(table, check=True, capture_output=True)
    return file


def import_image(site: Path, raw: Path, *more: str) -> Result:
    wanted = ["--format", "raw", "--image", "tiny", "--version", "1", "--config", str(site)]
    cache = ["--cache", str(site.parent / "cache")]
    return CliRunner().invoke(main, ["image", "import", str(raw), *wanted, *cache, *more])


def test_a_first_image_is_imported_before_the_service_ever_ran(site: Path, raw: Path) -> None:
    done = import_image(site, raw, "--release-id", RELEASE_ID)
    assert done.exit_code == 0, done.output
    service = build(load(site))
    try:
        row = service.releases.show("tiny@1")
        assert row.release_id == RELEASE_ID
        assert service.releases.manifest("tiny@1").digest == row.digest
        assert service.audit.verify() == len(service.audit.rows())
    finally:
        service.close()


def test_the_same_version_with_other_content_is_refused(site: Path, raw: Path) -> None:
    assert import_image(site, raw, "--release-id", RELEASE_ID).exit_code == 0
    other = import_image(site, raw, "--release-id", RELEASE_ID[::-1])
    assert other.exit_code == 2, other.output


def test_an_image_that_cannot_prove_itself_is_refused_with_what_to_do(
    site: Path, raw: Path
) -> None:
    done = import_image(site, raw)
    assert done.exit_code == 2
    assert "release.json" in done.stderr
