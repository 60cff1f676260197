"""The manifest of a release: what it is, and the digests of all that belongs to it.

No I/O and no signatures. Imports only the standard library: it runs in the ramdisk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from types import MappingProxyType
from typing import Any, Final, NoReturn

from provisioner.errors import RequestError, TrustError

from .manifest_fields import (
    ATTACHMENT,
    DIGEST,
    GUID,
    LABEL,
    MOMENT,
    PATH,
    RELEASE_ID,
    TEXT,
    VERSION,
    WORD,
    match,
    number,
    wrong,
)
from .manifest_fields import check_image_name as check_image_name
from .manifest_fields import check_version as check_version
from .manifest_fields import is_digest as is_digest
from .manifest_fields import is_release_id as is_release_id

FORMAT: Final = 2
# The agent holds a manifest in memory several times over while it checks it, in a ramdisk: so
# many chunks take about 140 MiB. Larger images are cut into larger chunks.
CHUNKS_MAX: Final = 1 << 18
MANIFEST_BYTES_MAX: Final = 32 * 1024 * 1024
CHUNK_BYTES_MIN: Final = 64 * 1024
CHUNK_BYTES_MAX: Final = 16 * 1024 * 1024
PARTITIONS_MAX: Final = 128
PACKAGES_MAX: Final = 100_000
ARGUMENTS_MAX: Final = 256
ATTACHMENTS_MAX: Final = 16
FILES: Final = "files.json"
"""The attachment that lists every file of the root."""
SPDX: Final = "spdx.json"
"""The attachment that lists every package, in SPDX."""

ARCHITECTURES: Final = frozenset({"amd64", "arm64"})
FIRMWARES: Final = frozenset({"bios", "uefi", "secure-boot"})


@dataclass(frozen=True)
class Partition:
    """One GPT partition of the image. `type` is its type GUID in capitals."""

    number: int
    name: str
    type: str
    start_bytes: int
    size_bytes: int


@dataclass(frozen=True)
class BootFile:
    """A kernel or an initrd in the root: what it takes to start the system without firmware."""

    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Manifest:
    """One release, immutable, with the fields of manifest format 2.

    chunks holds one entry for each chunk_bytes of the image, the last perhaps
    short: the sha256 of the raw bytes, or None where they are all zero. release_id
    also stands in the image, at /usr/lib/provisioner/release.json, so that a running
    system can say which release it is. root_digest is the sha256 of the root
    partition, or of the whole image where an imported image does not tell which
    partition that is. attachments holds the sha256 of each file beside the manifest.
    parent is the digest of the release it was built on. built_at is the date of what
    it was built from, so that building again gives the same digest. Moments are UTC,
    `2026-11-23T12:00:00Z`.

    Raises RequestError when the fields do not belong together.
    """

    image: str
    version: str
    architecture: str
    size_bytes: int
    chunk_bytes: int
    chunks: tuple[str | None, ...]
    firmware: tuple[str, ...]
    release_id: str
    root_digest: str
    partitions: tuple[Partition, ...]
    packages: Mapping[str, str]
    recipe_digest: str
    builder: str
    built_at: str
    parent: str | None = None
    minimum_version: str | None = None
    expires_at: str | None = None
    kernel: BootFile | None = None
    initrd: BootFile | None = None
    kernel_arguments: tuple[str, ...] = ()
    attachments: Mapping[str, str] = field(default_factory=dict)
    format: int = FORMAT

    def __post_init__(self) -> None:
        object.__setattr__(self, "chunks", tuple(self.chunks))
        object.__setattr__(self, "firmware", tuple(self.firmware))
        object.__setattr__(self, "partitions", tuple(self.partitions))
        object.__setattr__(self, "packages", MappingProxyType(dict(self.packages)))
        object.__setattr__(self, "kernel_arguments", tuple(self.kernel_arguments))
        object.__setattr__(self, "attachments", MappingProxyType(dict(self.attachments)))
        _check(self)

    @classmethod
    def parse(cls, data: bytes) -> Manifest:
        """Return the manifest that these bytes are, or refuse them.

        data must be the canonical form, byte for byte, so that one release has
        one digest. Raises TrustError with what was expected and found. Parsing
        says nothing about who wrote it: verify the signature first.
        """
        try:
            manifest = cls(**_fields_of(_load(data)))
        except RequestError as error:
            raise TrustError(
                f"manifest refused: {error}", expected=error.expected, found=error.found
            ) from error
        if manifest.to_bytes() != data:
            raise TrustError("manifest refused: its bytes are not in canonical form")
        return manifest

    def to_bytes(self) -> bytes:
        """Return the canonical JSON: sorted keys, no spaces, UTF-8, no newline at the end."""
        return self._canonical

    @cached_property
    def _canonical(self) -> bytes:
        value = {field.name: getattr(self, field.name) for field in fields(self)}
        value["partitions"] = [asdict(partition) for partition in self.partitions]
        for name in _OBJECTS:
            value[name] = dict(value[name])
        for name in _BOOT_FILES:
            value[name] = asdict(value[name]) if value[name] else None
        text = json.dumps(
            value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        )
        return text.encode("utf-8")

    @cached_property
    def digest(self) -> str:
        """The sha256 of the canonical bytes, in hex: the name of this release everywhere."""
        return hashlib.sha256(self._canonical).hexdigest()

    @property
    def name(self) -> str:
        """The release as people write it: `debian-12@2026.11.1`."""
        return f"{self.image}@{self.version}"

    def chunk_length(self, index: int) -> int:
        """Return the raw bytes in chunk `index` (from 0); only the last may be short."""
        if not 0 <= index < len(self.chunks):
            raise IndexError(f"chunk {index} of {len(self.chunks)}")
        return min(self.chunk_bytes, self.size_bytes - index * self.chunk_bytes)

    @property
    def used_bytes(self) -> int:
        """Raw bytes in chunks that are not all zero: what an empty disk needs written."""
        return sum(self.chunk_length(i) for i, digest in enumerate(self.chunks) if digest)

    @property
    def distinct_chunks(self) -> frozenset[str]:
        """The digests this release needs from the chunk store."""
        return frozenset(digest for digest in self.chunks if digest)

    def stored_chunks(self) -> Iterator[tuple[int, str]]:
        """Yield (index, digest) of the chunks that are not all zero, in order."""
        return ((i, digest) for i, digest in enumerate(self.chunks) if digest)


_OBJECTS: Final = ("packages", "attachments")
_BOOT_FILES: Final = ("kernel", "initrd")


def _load(data: bytes) -> dict[str, Any]:
    """Return the JSON object in data; TrustError for anything else, duplicate keys included."""
    if len(data) > MANIFEST_BYTES_MAX:
        raise TrustError(
            "manifest refused: too large",
            expected=f"at most {MANIFEST_BYTES_MAX} bytes",
            found=f"{len(data)} bytes",
        )
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_no_constant
        )
    # A deeply nested text makes the parser recurse; it is as malformed as a truncated one.
    except (ValueError, RecursionError) as error:
        raise TrustError(
            "manifest refused: not JSON we accept", found=str(error) or "too deeply nested"
        ) from error
    if not isinstance(value, dict):
        raise TrustError("manifest refused: not an object", found=type(value).__name__)
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands there twice")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _fields_of(value: dict[str, Any]) -> dict[str, Any]:
    """Return constructor arguments; every key must be there, and no other.

    The format is looked at first: of another format we know nothing more.
    """
    found = value.get("format")
    if type(found) is not int or found != FORMAT:
        raise RequestError("unknown manifest format", expected=str(FORMAT), found=repr(found))
    _keys("the manifest", value, {field.name for field in fields(Manifest)})
    arguments = dict(value)
    for name in ("chunks", "firmware", "partitions", "kernel_arguments"):
        if not isinstance(value[name], list):
            raise wrong(name, "a list", value[name])
        arguments[name] = tuple(value[name])
    arguments["partitions"] = tuple(
        Partition(**_object("a partition", item, Partition)) for item in arguments["partitions"]
    )
    for name in _OBJECTS:
        if not isinstance(value[name], dict):
            raise wrong(name, "an object", value[name])
    for name in _BOOT_FILES:
        if value[name] is not None:
            arguments[name] = BootFile(**_object(name, value[name], BootFile))
    return arguments


def _object(where: str, item: object, kind: type[Partition | BootFile]) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise wrong(where, "an object", item)
    _keys(where, item, {field.name for field in fields(kind)})
    return item


def _keys(where: str, value: Mapping[str, object], expected: set[str]) -> None:
    if missing := expected - value.keys():
        raise RequestError(f"{where} lacks {', '.join(sorted(missing))}")
    if unknown := value.keys() - expected:
        names = ", ".join(repr(key) for key in sorted(unknown))
        raise RequestError(f"{where} has keys of no known meaning: {names}")


def _check(manifest: Manifest) -> None:
    """Raise RequestError at the first field that is not what format 2 allows."""
    if type(manifest.format) is not int or manifest.format != FORMAT:
        raise wrong("format", str(FORMAT), manifest.format)
    check_image_name(manifest.image)
    check_version(manifest.version)
    if manifest.minimum_version is not None:
        match("minimum_version", manifest.minimum_version, VERSION, "a version or null")
    if not isinstance(manifest.architecture, str) or manifest.architecture not in ARCHITECTURES:
        raise wrong("architecture", " or ".join(sorted(ARCHITECTURES)), manifest.architecture)
    match("release_id", manifest.release_id, RELEASE_ID, "32 to 64 hex digits")
    match("root_digest", manifest.root_digest, DIGEST, "a sha256 in hex")
    match("recipe_digest", manifest.recipe_digest, DIGEST, "a sha256 in hex")
    if manifest.parent is not None:
        match("parent", manifest.parent, DIGEST, "a release digest or null")
    match("builder", manifest.builder, TEXT, "1 to 256 printable characters")
    match("built_at", manifest.built_at, MOMENT, "YYYY-MM-DDTHH:MM:SSZ")
    if manifest.expires_at is not None:
        match("expires_at", manifest.expires_at, MOMENT, "YYYY-MM-DDTHH:MM:SSZ or null")
    _check_firmware(manifest.firmware)
    _check_chunks(manifest)
    _check_partitions(manifest)
    _check_packages(manifest.packages)
    _check_boot_files(manifest)
    _check_attachments(manifest.attachments)


def boots_on(firmware: Iterable[str], host: str) -> bool:
    """Say whether a release for these firmwares starts on a host with that one.

    What is signed for Secure Boot starts with it off, too; other UEFI releases need it off.
    """
    names = set(firmware)
    return host in names or (host == "uefi" and "secure-boot" in names)


def _check_firmware(firmware: tuple[object, ...]) -> None:
    known = all(isinstance(item, str) and item in FIRMWARES for item in firmware)
    if not firmware or not known or len(set(firmware)) != len(firmware):
        raise wrong("firmware", f"some of {', '.join(sorted(FIRMWARES))}, each once", firmware)


def _check_chunks(manifest: Manifest) -> None:
    number("size_bytes", manifest.size_bytes, 1)
    number("chunk_bytes", manifest.chunk_bytes, CHUNK_BYTES_MIN, CHUNK_BYTES_MAX)
    if manifest.chunk_bytes & (manifest.chunk_bytes - 1):
        raise wrong("chunk_bytes", "a power of two", manifest.chunk_bytes)
    expected = -(-manifest.size_bytes // manifest.chunk_bytes)
    if expected > CHUNKS_MAX:
        raise wrong("chunk_bytes", f"at most {CHUNKS_MAX} chunks in an image", expected)
    if len(manifest.chunks) != expected:
        raise wrong("chunks", f"{expected} for this size", len(manifest.chunks))
    for digest in manifest.chunks:
        if digest is not None and not is_digest(digest):
            raise wrong("chunks", "sha256 digests in hex, or null", digest)


def _check_partitions(manifest: Manifest) -> None:
    if len(manifest.partitions) > PARTITIONS_MAX:
        raise wrong("partitions", f"at most {PARTITIONS_MAX}", len(manifest.partitions))
    numbers: set[int] = set()
    for part in manifest.partitions:
        number("partition number", part.number, 1, PARTITIONS_MAX)
        match("partition name", part.name, LABEL, "1 to 36 printable characters")
        match("partition type", part.type, GUID, "a GUID in capitals")
        number("partition start_bytes", part.start_bytes, 0)
        number("partition size_bytes", part.size_bytes, 1)
        if part.start_bytes + part.size_bytes > manifest.size_bytes:
            raise wrong(
                f"partition {part.number}",
                f"an end within {manifest.size_bytes} bytes",
                part.start_bytes + part.size_bytes,
            )
        if part.number in numbers:
            raise wrong("partitions", "each number once", part.number)
        numbers.add(part.number)


def _check_packages(packages: Mapping[str, str]) -> None:
    if len(packages) > PACKAGES_MAX:
        raise wrong("packages", f"at most {PACKAGES_MAX}", len(packages))
    for name, version in packages.items():
        match("package name", name, TEXT, "1 to 256 printable characters")
        match("package version", version, TEXT, "1 to 256 printable characters")


def _check_boot_files(manifest: Manifest) -> None:
    for name in _BOOT_FILES:
        file = getattr(manifest, name)
        if file is None:
            continue
        match(f"{name} path", file.path, PATH, "an absolute path")
        match(f"{name} sha256", file.sha256, DIGEST, "a sha256 in hex")
        number(f"{name} size_bytes", file.size_bytes, 1)
    if len(manifest.kernel_arguments) > ARGUMENTS_MAX:
        raise wrong("kernel_arguments", f"at most {ARGUMENTS_MAX}", len(manifest.kernel_arguments))
    for argument in manifest.kernel_arguments:
        match("kernel_arguments", argument, WORD, "printable words without blanks")


def _check_attachments(attachments: Mapping[str, str]) -> None:
    if len(attachments) > ATTACHMENTS_MAX:
        raise wrong("attachments", f"at most {ATTACHMENTS_MAX}", len(attachments))
    for name, digest in attachments.items():
        match("attachment name", name, ATTACHMENT, "a name such as files.json")
        match("attachment sha256", digest, DIGEST, "a sha256 in hex")
