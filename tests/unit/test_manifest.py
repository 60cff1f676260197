"""The manifest: one canonical form, and a clear refusal of everything else."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from provisioner.core.manifest import (
    FIRMWARES,
    MANIFEST_BYTES_MAX,
    BootFile,
    Manifest,
    Partition,
    boots_on,
    is_digest,
)
from provisioner.errors import RequestError, TrustError

MIB = 1024 * 1024
LINUX = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"


def manifest(**changes: Any) -> Manifest:
    base = Manifest(
        image="debian-12",
        version="2026.11.1",
        architecture="amd64",
        size_bytes=2 * MIB + 512,
        chunk_bytes=MIB,
        chunks=("a" * 64, None, "b" * 64),
        firmware=("bios", "uefi"),
        release_id="0" * 32,
        root_digest="c" * 64,
        partitions=(Partition(1, "root", LINUX, MIB, MIB),),
        packages={"bash": "5.2.15-2+b8", "adduser": "3.134"},
        recipe_digest="d" * 64,
        builder="provisioner 0.1.0",
        built_at="2026-11-23T12:00:00Z",
        kernel=BootFile("/boot/vmlinuz-6.1.0-31-amd64", "e" * 64, 8 * MIB),
        initrd=BootFile("/boot/initrd.img-6.1.0-31-amd64", "f" * 64, 40 * MIB),
        kernel_arguments=("root=UUID=0", "ro"),
        attachments={"files.json": "1" * 64, "spdx.json": "2" * 64},
    )
    return replace(base, **changes)


def canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def as_object() -> dict[str, Any]:
    value = json.loads(manifest().to_bytes())
    assert isinstance(value, dict)
    return value


def test_bytes_and_back_is_the_same_manifest() -> None:
    one = manifest()
    assert Manifest.parse(one.to_bytes()) == one
    assert Manifest.parse(one.to_bytes()).digest == one.digest
    assert is_digest(one.digest)


def test_canonical_bytes_are_exactly_these() -> None:
    """Other programs compute the digest, too: a change here is a change of format."""
    data = manifest().to_bytes()
    assert data == canonical(json.loads(data))
    assert data.startswith(b'{"architecture":"amd64","attachments":{"files.json":"1111')
    assert b'"packages":{"adduser":"3.134","bash":"5.2.15-2+b8"}' in data
    assert b"\n" not in data


def test_chunk_lengths_and_used_bytes() -> None:
    one = manifest()
    assert [one.chunk_length(i) for i in range(3)] == [MIB, MIB, 512]
    assert one.used_bytes == MIB + 512
    assert list(one.stored_chunks()) == [(0, "a" * 64), (2, "b" * 64)]
    assert one.distinct_chunks == {"a" * 64, "b" * 64}
    with pytest.raises(IndexError):
        one.chunk_length(3)
    with pytest.raises(IndexError):
        one.chunk_length(-1)


def test_a_release_without_a_known_kernel_is_one() -> None:
    one = manifest(kernel=None, initrd=None, kernel_arguments=(), attachments={})
    assert Manifest.parse(one.to_bytes()) == one


def test_packages_cannot_be_changed_after_construction() -> None:
    with pytest.raises(TypeError):
        manifest().packages["bash"] = "0"  # type: ignore[index]  # to see that it is refused


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image", "../etc"),
        ("image", "Debian"),
        ("image", ["debian"]),
        ("image", ""),
        ("version", "1/2"),
        ("version", "1\n"),
        ("architecture", "z80"),
        ("architecture", ["amd64"]),
        ("size_bytes", 0),
        ("size_bytes", True),
        ("size_bytes", 2.0 * MIB),
        ("size_bytes", "2097664"),
        ("size_bytes", 4 * MIB),
        ("chunk_bytes", 0),
        ("chunk_bytes", MIB + 1),
        ("chunk_bytes", 2 * MIB),
        ("chunks", []),
        ("chunks", "aaa"),
        ("chunks", ["a" * 64, None]),
        ("chunks", ["a" * 64, None, "b" * 63]),
        ("chunks", ["a" * 64, None, "B" * 64]),
        ("chunks", ["a" * 64, 0, "b" * 64]),
        ("firmware", []),
        ("firmware", ["bios", "bios"]),
        ("firmware", ["coreboot"]),
        ("firmware", [{}]),
        ("release_id", "xyz"),
        ("root_digest", None),
        ("recipe_digest", "a"),
        ("parent", "yesterday"),
        ("minimum_version", 3),
        ("builder", ""),
        ("built_at", "2026-11-23"),
        ("built_at", "2026-11-23T12:00:00+00:00"),
        ("expires_at", 0),
        ("packages", []),
        ("packages", {"bash": 5}),
        ("partitions", {}),
        ("partitions", [1]),
        ("partitions", [{"number": 1}]),
        ("kernel", {}),
        ("kernel", "/boot/vmlinuz"),
        ("kernel", {"path": "boot", "sha256": "e" * 64, "size_bytes": 1}),
        ("kernel", {"path": "/boot/k", "sha256": "e", "size_bytes": 1}),
        ("initrd", {"path": "/boot/i", "sha256": "e" * 64, "size_bytes": 0}),
        ("initrd", {"path": "/boot/i", "sha256": "e" * 64, "size_bytes": 1, "mode": 0}),
        ("kernel_arguments", "ro"),
        ("kernel_arguments", ["ro quiet"]),
        ("kernel_arguments", ["ro"] * 257),
        ("attachments", []),
        ("attachments", {"../files.json": "1" * 64}),
        ("attachments", {"files.json": "1"}),
        ("format", 1),
        ("format", 3),
        ("format", True),
        ("format", None),
    ],
)
def test_wrong_field_is_refused(field: str, value: object) -> None:
    changed = as_object() | {field: value}
    with pytest.raises(TrustError) as caught:
        Manifest.parse(canonical(changed))
    assert "manifest refused" in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("number", 0),
        ("number", True),
        ("name", ""),
        ("type", LINUX.lower()),
        ("start_bytes", -1),
        ("size_bytes", 0),
        ("size_bytes", 3 * MIB),
        ("colour", "red"),
    ],
)
def test_wrong_partition_is_refused(field: str, value: object) -> None:
    changed = as_object()
    changed["partitions"][0][field] = value
    with pytest.raises(TrustError):
        Manifest.parse(canonical(changed))


def test_same_partition_number_twice_is_refused() -> None:
    changed = as_object()
    changed["partitions"] *= 2
    with pytest.raises(TrustError, match="partitions"):
        Manifest.parse(canonical(changed))


@pytest.mark.parametrize("field", sorted(as_object()))
def test_missing_field_is_refused(field: str) -> None:
    changed = as_object()
    del changed[field]
    with pytest.raises(TrustError):
        Manifest.parse(canonical(changed))


def test_unknown_field_is_refused() -> None:
    with pytest.raises(TrustError, match="no known meaning: 'extra'"):
        Manifest.parse(canonical(as_object() | {"extra": 1}))


def test_duplicate_key_is_refused() -> None:
    data = manifest().to_bytes()
    twice = b'{"architecture":"amd64",' + data[1:]
    with pytest.raises(TrustError) as caught:
        Manifest.parse(twice)
    assert "twice" in str(caught.value.found)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data + b"\n",
        lambda data: b" " + data,
        lambda data: data.replace(b":", b": ", 1),
        lambda data: data.replace(b"bios", b"\\u0062ios"),
        lambda data: canonical(dict(reversed(json.loads(data).items()))) + b" ",
        lambda data: json.dumps(dict(reversed(json.loads(data).items()))).encode(),
    ],
)
def test_other_spellings_of_the_same_manifest_are_refused(
    spoil: Callable[[bytes], bytes],
) -> None:
    """One release has one digest, so it may have only one spelling."""
    with pytest.raises(TrustError, match="canonical"):
        Manifest.parse(spoil(manifest().to_bytes()))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"format":NaN}',
        b'{"format":1e999}',
        b'{"format":' + b"9" * 10_000 + b"}",
    ],
)
def test_what_is_not_a_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(TrustError):
        Manifest.parse(data)


def test_too_large_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(TrustError, match="too large"):
        Manifest.parse(b" " * (MANIFEST_BYTES_MAX + 1))


def test_constructing_a_wrong_manifest_is_the_callers_error() -> None:
    with pytest.raises(RequestError):
        manifest(version="")


@given(st.binary(max_size=64), st.integers(min_value=0, max_value=400))
def test_damaged_bytes_are_refused_never_crash(noise: bytes, place: int) -> None:
    data = manifest().to_bytes()
    damaged = data[:place] + noise + data[place + len(noise) :]
    if damaged == data:
        return
    try:
        other = Manifest.parse(damaged)
    except TrustError:
        return
    assert other.digest != manifest().digest


@pytest.mark.parametrize(
    ("firmware", "hosts"),
    [
        (("bios",), {"bios"}),
        (("bios", "uefi"), {"bios", "uefi"}),
        (("bios", "uefi", "secure-boot"), {"bios", "uefi", "secure-boot"}),
        (("secure-boot",), {"uefi", "secure-boot"}),
    ],
)
def test_what_is_signed_also_starts_where_nobody_checks(
    firmware: tuple[str, ...], hosts: set[str]
) -> None:
    assert {host for host in FIRMWARES if boots_on(firmware, host)} == hosts
