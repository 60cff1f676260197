"""files.json has one form, says what differs, and is refused in any other form."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from provisioner.errors import TrustError
from provisioner.imaging.file_manifest import (
    FileEntry,
    boot_file,
    differences,
    parse,
    to_bytes,
)

EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
ROOT = FileEntry("/", "dir", 0o755, 0, 0, 1)
FILE = FileEntry("/ö x", "file", 0o4755, 1, 2, 3, size=0, sha256=EMPTY, xattrs={"user.a": "00"})
LINK = FileEntry("/vmlinuz", "link", 0o777, 0, 0, 1, target="boot/vmlinuz-6")
KERNEL = FileEntry("/boot/vmlinuz-6", "file", 0o644, 0, 0, 1, size=0, sha256=EMPTY)
NULL = FileEntry("/null", "char", 0o666, 0, 0, 1, device=(1, 3))
TWIN = replace(FILE, path="/ü", hardlink="/ö x")
ENTRIES = (ROOT, KERNEL, NULL, LINK, FILE, TWIN)


def test_the_canonical_form_is_read_back() -> None:
    data = to_bytes(reversed(ENTRIES))
    assert parse(data) == ENTRIES
    assert to_bytes(parse(data)) == data


def test_only_keys_that_apply_are_written() -> None:
    files = {one["path"]: one for one in json.loads(to_bytes(ENTRIES))["files"]}
    assert files["/"] == {"path": "/", "type": "dir", "mode": 493, "uid": 0, "gid": 0, "mtime": 1}
    assert files["/null"]["device"] == [1, 3]
    assert files["/ü"]["hardlink"] == "/ö x"
    assert "xattrs" not in files["/vmlinuz"]


def test_differences_name_the_path_and_what_changed() -> None:
    changed = replace(FILE, mode=0o755, uid=7, mtime=99)
    lines = differences(ENTRIES, (ROOT, KERNEL, NULL, changed, TWIN, replace(LINK, path="/x")))
    assert lines == [
        "/vmlinuz: missing",
        "/x: should not be there",
        "/ö x: mode 0755 instead of 4755, uid 7 instead of 1",
    ]


def test_times_are_no_difference() -> None:
    assert differences((ROOT,), (replace(ROOT, mtime=5),)) == []


def test_the_kernel_is_found_behind_its_link() -> None:
    found = boot_file(ENTRIES, "/vmlinuz")
    assert found is not None
    assert (found.path, found.sha256, found.size_bytes) == ("/boot/vmlinuz-6", EMPTY, 0)
    assert boot_file(ENTRIES, "/initrd.img") is None
    assert boot_file(ENTRIES, "/null") is None
    assert boot_file((replace(LINK, target="/vmlinuz"),), "/vmlinuz") is None


@pytest.mark.parametrize(
    "change",
    [
        {"path": "etc"},
        {"path": 1},
        {"type": "socket"},
        {"mode": "0755"},
        {"mode": True},
        {"size": 1},
        {"target": "x"},
        {"device": [1, 2]},
        {"device": [1]},
        {"xattrs": {"a": 1}},
        {"surprise": 1},
    ],
)
def test_an_entry_of_another_form_is_refused(change: dict[str, object]) -> None:
    value = {"format": 1, "files": [ROOT.to_json() | change]}
    data = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    with pytest.raises(TrustError):
        parse(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"\xff",
        b'{"files":[],"format":2}',
        b'{"files":[],"format":true}',
        b'{"files":[], "format":1}',
        b'{"files":{},"format":1,"more":1}',
        b"[" * 100_000,
        to_bytes((ROOT, ROOT)),
    ],
)
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(TrustError):
        parse(data)
