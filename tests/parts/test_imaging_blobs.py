"""Blobs in a folder and in a bucket: the same promises, kept by both."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from provisioner.core.model import Secret
from provisioner.errors import ConfigError, NotFound, Unavailable
from provisioner.imaging.blobs import INCOMING, Blobs, FileBlobs, Unreadable
from provisioner.imaging.s3_blobs import S3Blobs, S3Place
from tests.parts.s3_server import make_bucket, s3_server


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_server(tmp_path_factory.mktemp("s3")) as address:
        yield address


def place(endpoint: str, bucket: str, prefix: str = "fleet/a") -> S3Place:
    url = f"s3://{bucket}/{prefix}"
    return S3Place(url, "key", Secret("very-secret"), endpoint)


@pytest.fixture(params=["folder", "bucket"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    if request.param == "folder":
        return FileBlobs(tmp_path / "archive")
    endpoint = request.getfixturevalue("endpoint")
    bucket = f"b-{secrets.token_hex(8)}"
    make_bucket(endpoint, bucket)
    return S3Blobs(place(endpoint, bucket))


def test_what_was_written_is_read_and_listed(blobs: Blobs) -> None:
    blobs.write("chunks/ab/one", b"1" * 1000)
    blobs.write("chunks/cd/two", b"")
    blobs.write("releases/x/manifest.json", b"{}")
    assert blobs.read("chunks/ab/one", 5000) == b"1" * 1000
    assert blobs.read("chunks/ab/one", 10) == b"1" * 10
    assert blobs.size("chunks/ab/one") == 1000
    assert blobs.read("chunks/cd/two", 10) == b""
    assert dict(blobs.sizes("chunks/")) == {"chunks/ab/one": 1000, "chunks/cd/two": 0}
    assert dict(blobs.sizes("releases/")) == {"releases/x/manifest.json": 2}


def test_what_is_not_there_is_said_so(blobs: Blobs) -> None:
    assert blobs.size("chunks/ab/none") is None
    assert list(blobs.sizes("chunks/")) == []
    with pytest.raises(NotFound, match="chunks/ab/none"):
        blobs.read("chunks/ab/none", 10)
    blobs.delete("chunks/ab/none")


def test_a_blob_is_replaced_and_deleted_as_a_whole(blobs: Blobs) -> None:
    blobs.write("names/web/1", b"first")
    blobs.write("names/web/1", b"second")
    assert blobs.read("names/web/1", 100) == b"second"
    blobs.delete("names/web/1")
    assert blobs.size("names/web/1") is None
    assert list(blobs.sizes("names/")) == []


def test_a_prefix_keeps_two_archives_in_one_bucket_apart(endpoint: str) -> None:
    make_bucket(endpoint, "shared")
    one, two = (S3Blobs(place(endpoint, "shared", name)) for name in ("one", "two"))
    one.write("names/web/1", b"one")
    assert two.size("names/web/1") is None
    assert list(two.sizes("names/")) == []


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    # A file system of 1 MiB, in a mount namespace that ends with the test's child.
    script = (
        f"mount -t tmpfs -o size=1m none {folder} && exec {sys.executable} -c '{_FILL}' {folder}"
    )
    run_apart(script)


def run_apart(script: str) -> None:
    """Run a script in a mount namespace of its own, and hold that it succeeded."""
    done = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        check=False,
    )
    assert done.returncode == 0, done.stderr


_FILL = """
import sys
from pathlib import Path
from provisioner.errors import Unavailable
from provisioner.imaging.blobs import FileBlobs
blobs = FileBlobs(Path(sys.argv[1]))
blobs.write("chunks/ab/fits", b"x" * 100_000)
try:
    blobs.write("chunks/ab/does-not", b"x" * 2_000_000)
except Unavailable as error:
    assert "filled up" in error.message
else:
    sys.exit("two megabytes fitted into one")
left = sorted(str(path) for path in Path(sys.argv[1]).rglob("*") if path.is_file())
assert left == [sys.argv[1] + "/chunks/ab/fits"], left
"""


def test_a_disk_that_went_read_only_is_told_with_the_archive_and_its_own_words(
    tmp_path: Path,
) -> None:
    script = (
        f"mount -t tmpfs none {tmp_path} && mkdir -p {tmp_path}/names/a && "
        f"touch {tmp_path}/names/a/1 && mount -o remount,ro {tmp_path} && "
        f"exec {sys.executable} -c '{_READ_ONLY}' {tmp_path}"
    )
    run_apart(script)


_READ_ONLY = """
import sys
from pathlib import Path
from provisioner.errors import Unavailable
from provisioner.imaging.blobs import FileBlobs
root = Path(sys.argv[1])
blobs = FileBlobs(root)
for change in (
    lambda: blobs.write("names/a/1", b"x"),
    lambda: blobs.delete("names/a/1"),
    lambda: FileBlobs(root / "deeper").free_bytes(),
):
    try:
        change()
    except Unavailable as error:
        assert str(root) in error.message and error.found == "Read-only file system", error
        assert error.hint
    else:
        sys.exit("it was written")
"""

FAILS_AT_READING = Path("/proc/self/mem")  # its first page is nobody's: EIO


def test_a_file_that_the_disk_does_not_give_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "chunks").mkdir()
    (tmp_path / "chunks" / "bad").symlink_to(FAILS_AT_READING)
    with pytest.raises(Unreadable, match=f"chunks/bad in {tmp_path}") as caught:
        FileBlobs(tmp_path).read("chunks/bad", 10)
    assert caught.value.found == "Input/output error"


def test_a_folder_that_cannot_be_listed_does_not_pass_for_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "releases").symlink_to(tmp_path / "releases")
    with pytest.raises(Unavailable, match="cannot be listed"):
        list(FileBlobs(tmp_path).sizes("releases/"))
    assert list(FileBlobs(tmp_path).sizes("chunks/")) == []


def test_what_a_killed_writer_left_is_cleared(tmp_path: Path) -> None:
    blobs = FileBlobs(tmp_path)
    (tmp_path / INCOMING).mkdir()
    (tmp_path / INCOMING / "half").write_bytes(b"half")
    blobs.clear_incoming()
    assert list(tmp_path.rglob("*")) == []
    blobs.write("names/a/1", b"x")
    assert blobs.read("names/a/1", 9) == b"x"


def test_a_bucket_that_does_not_answer_names_the_setting() -> None:
    blobs = S3Blobs(place("http://127.0.0.1:9", "gone"))
    with pytest.raises(Unavailable) as caught:
        blobs.size("names/web/1")
    assert "s3_endpoint" in str(caught.value.hint)
    assert "very-secret" not in f"{caught.value!r} {caught.value.as_dict()} {place('', 'x')!r}"


def test_a_url_that_is_no_bucket_is_refused() -> None:
    with pytest.raises(ConfigError):
        S3Blobs(S3Place("file:///etc", "key", Secret("secret")))
