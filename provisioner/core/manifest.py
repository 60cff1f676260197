"""The manifest of a release: what it is, and the digests of all that belongs to it.

No I/O and no signatures. Imports only the standard library: it runs in the ramdisk.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from types import MappingProxyType
from typing import Any, Final, NoReturn

from provisioner.errors import RequestError, TrustError

FORMAT: Final = 2
# A 64 GiB image in 64 KiB chunks makes a manifest of 70 MB; beyond it, use larger chunks.
MANIFEST_BYTES_MAX: Final = 96 * 1024 * 1024
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

_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_RELEASE_ID: Final = re.compile(r"[0-9a-f]{32,64}")
_IMAGE: Final = re.compile(r"[a-z0-9][a-z0-9.-]{0,62}")
_VERSION: Final = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+~-]{0,62}")
_MOMENT: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
_GUID: Final = re.compile(r"[0-9A-F]{8}(-[0-9A-F]{4}){3}-[0-9A-F]{12}")
_LABEL: Final = re.compile(r"[ -~]{1,36}")
_TEXT: Final = re.compile(r"[ -~]{1,256}")
_WORD: Final = re.compile(r"[!-~]{1,256}")
_PATH: Final = re.compile(r"(/[!-.0-~]+)+")
_ATTACHMENT: Final = re.compile(r"[a-z][a-z0-9-]{0,30}\.json")


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


def is_digest(value: object) -> bool:
    """Say whether value is a sha256 in lower-case hex, and so safe as a file name."""
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def is_release_id(value: object) -> bool:
    """Say whether value may stand as release_id: 32 to 64 lower-case hex digits."""
    return isinstance(value, str) and _RELEASE_ID.fullmatch(value) is not None


def check_image_name(image: object) -> None:
    """Raise RequestError unless this is a usable image name, such as `debian-12`."""
    _match("image", image, _IMAGE, "lower-case letters, digits, '.' and '-', at most 63")


def check_version(version: object) -> None:
    """Raise RequestError unless this is a usable version, such as `2026.11.1`."""
    _match("version", version, _VERSION, "letters, digits and '.+~-', at most 63")


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
            raise _wrong(name, "a list", value[name])
        arguments[name] = tuple(value[name])
    arguments["partitions"] = tuple(
        Partition(**_object("a partition", item, Partition)) for item in arguments["partitions"]
    )
    for name in _OBJECTS:
        if not isinstance(value[name], dict):
            raise _wrong(name, "an object", value[name])
    for name in _BOOT_FILES:
        if value[name] is not None:
            arguments[name] = BootFile(**_object(name, value[name], BootFile))
    return arguments


def _object(where: str, item: object, kind: type[Partition | BootFile]) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise _wrong(where, "an object", item)
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
        raise _wrong("format", str(FORMAT), manifest.format)
    check_image_name(manifest.image)
    check_version(manifest.version)
    if manifest.minimum_version is not None:
        _match("minimum_version", manifest.minimum_version, _VERSION, "a version or null")
    if not isinstance(manifest.architecture, str) or manifest.architecture not in ARCHITECTURES:
        raise _wrong("architecture", " or ".join(sorted(ARCHITECTURES)), manifest.architecture)
    _match("release_id", manifest.release_id, _RELEASE_ID, "32 to 64 hex digits")
    _match("root_digest", manifest.root_digest, _DIGEST, "a sha256 in hex")
    _match("recipe_digest", manifest.recipe_digest, _DIGEST, "a sha256 in hex")
    if manifest.parent is not None:
        _match("parent", manifest.parent, _DIGEST, "a release digest or null")
    _match("builder", manifest.builder, _TEXT, "1 to 256 printable characters")
    _match("built_at", manifest.built_at, _MOMENT, "YYYY-MM-DDTHH:MM:SSZ")
    if manifest.expires_at is not None:
        _match("expires_at", manifest.expires_at, _MOMENT, "YYYY-MM-DDTHH:MM:SSZ or null")
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
        raise _wrong("firmware", f"some of {', '.join(sorted(FIRMWARES))}, each once", firmware)


def _check_chunks(manifest: Manifest) -> None:
    _number("size_bytes", manifest.size_bytes, 1)
    _number("chunk_bytes", manifest.chunk_bytes, CHUNK_BYTES_MIN, CHUNK_BYTES_MAX)
    if manifest.chunk_bytes & (manifest.chunk_bytes - 1):
        raise _wrong("chunk_bytes", "a power of two", manifest.chunk_bytes)
    expected = -(-manifest.size_bytes // manifest.chunk_bytes)
    if len(manifest.chunks) != expected:
        raise _wrong("chunks", f"{expected} for this size", len(manifest.chunks))
    for digest in manifest.chunks:
        if digest is not None and not is_digest(digest):
            raise _wrong("chunks", "sha256 digests in hex, or null", digest)


def _check_partitions(manifest: Manifest) -> None:
    if len(manifest.partitions) > PARTITIONS_MAX:
        raise _wrong("partitions", f"at most {PARTITIONS_MAX}", len(manifest.partitions))
    numbers: set[int] = set()
    for part in manifest.partitions:
        _number("partition number", part.number, 1, PARTITIONS_MAX)
        _match("partition name", part.name, _LABEL, "1 to 36 printable characters")
        _match("partition type", part.type, _GUID, "a GUID in capitals")
        _number("partition start_bytes", part.start_bytes, 0)
        _number("partition size_bytes", part.size_bytes, 1)
        if part.start_bytes + part.size_bytes > manifest.size_bytes:
            raise _wrong(
                f"partition {part.number}",
                f"an end within {manifest.size_bytes} bytes",
                part.start_bytes + part.size_bytes,
            )
        if part.number in numbers:
            raise _wrong("partitions", "each number once", part.number)
        numbers.add(part.number)


def _check_packages(packages: Mapping[str, str]) -> None:
    if len(packages) > PACKAGES_MAX:
        raise _wrong("packages", f"at most {PACKAGES_MAX}", len(packages))
    for name, version in packages.items():
        _match("package name", name, _TEXT, "1 to 256 printable characters")
        _match("package version", version, _TEXT, "1 to 256 printable characters")


def _check_boot_files(manifest: Manifest) -> None:
    for name in _BOOT_FILES:
        file = getattr(manifest, name)
        if file is None:
            continue
        _match(f"{name} path", file.path, _PATH, "an absolute path")
        _match(f"{name} sha256", file.sha256, _DIGEST, "a sha256 in hex")
        _number(f"{name} size_bytes", file.size_bytes, 1)
    if len(manifest.kernel_arguments) > ARGUMENTS_MAX:
        raise _wrong("kernel_arguments", f"at most {ARGUMENTS_MAX}", len(manifest.kernel_arguments))
    for argument in manifest.kernel_arguments:
        _match("kernel_arguments", argument, _WORD, "printable words without blanks")


def _check_attachments(attachments: Mapping[str, str]) -> None:
    if len(attachments) > ATTACHMENTS_MAX:
        raise _wrong("attachments", f"at most {ATTACHMENTS_MAX}", len(attachments))
    for name, digest in attachments.items():
        _match("attachment name", name, _ATTACHMENT, "a name such as files.json")
        _match("attachment sha256", digest, _DIGEST, "a sha256 in hex")


def _match(name: str, value: object, pattern: re.Pattern[str], expected: str) -> None:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise _wrong(name, expected, value)


def _number(name: str, value: object, least: int, most: int = 1 << 62) -> None:
    # type() and not isinstance(): true is an int to Python, and 1 to nobody else.
    if type(value) is not int or not least <= value <= most:
        raise _wrong(name, f"a whole number from {least} to {most}", value)


def _wrong(name: str, expected: str, found: object) -> RequestError:
    return RequestError(f"{name} is wrong", expected=expected, found=repr(found)[:200])
