"""What moving from one release to another changes: packages, files, chunks, bytes. Reads only."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from provisioner.core.manifest import FILES, Manifest
from provisioner.errors import NotFound
from provisioner.imaging.archive import MANIFEST, SIGNATURES, Archive, folder_of

# What makes a file another file. Its time of change does not.
_COMPARED: Final = ("type", "mode", "uid", "gid", "size", "sha256", "target", "device", "xattrs")


@dataclass(frozen=True)
class Changes:
    """Names that are new, gone, and there in both but not equal; each sorted."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]


@dataclass(frozen=True)
class Difference:
    """What a host that holds `old`, untouched, needs to become `new`.

    packages and files are by name (files is None where a release has no list of them). A
    chunk counts when it is not equal at its own place. fetched_bytes is what goes over the
    wire for chunks; index_bytes what goes for the manifest and its signature besides;
    written_bytes what is written, zeros included.
    """

    old: str
    new: str
    packages: Changes
    files: Changes | None
    chunks: int
    chunks_total: int
    written_bytes: int
    fetched_bytes: int
    index_bytes: int
    whole_bytes: int


def difference(archive: Archive, old: Manifest, new: Manifest) -> Difference:
    """Compare two releases of the archive. Raises NotFound when a chunk is missing."""
    differing = [
        index
        for index in range(len(new.chunks))
        if new.chunk_bytes != old.chunk_bytes
        or index >= len(old.chunks)
        or new.chunks[index] != old.chunks[index]
    ]
    sizes = _stored(archive, new.distinct_chunks)
    fetched = [digest for index in differing if (digest := new.chunks[index])]
    files = [archive.blobs.size(f"{folder_of(new.digest)}/{name}") or 0 for name in _INDEX]
    return Difference(
        old=old.name,
        new=new.name,
        packages=changes(old.packages, new.packages),
        files=_files(archive, old, new),
        chunks=len(differing),
        chunks_total=len(new.chunks),
        written_bytes=sum(new.chunk_length(index) for index in differing),
        fetched_bytes=sum(sizes[digest] for digest in fetched),
        index_bytes=sum(files),
        whole_bytes=sum(sizes[digest] for digest in new.chunks if digest),
    )


# What a host fetches before the first chunk.
_INDEX: Final = (f"{MANIFEST}.zst", SIGNATURES)


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Changes:
    """Return which keys came, went, and changed their value."""
    return Changes(
        added=tuple(sorted(new.keys() - old.keys())),
        removed=tuple(sorted(old.keys() - new.keys())),
        changed=tuple(sorted(key for key in new.keys() & old.keys() if new[key] != old[key])),
    )


def _files(archive: Archive, old: Manifest, new: Manifest) -> Changes | None:
    if FILES not in old.attachments or FILES not in new.attachments:
        return None
    return changes(_listed(archive, old), _listed(archive, new))


def _listed(archive: Archive, manifest: Manifest) -> dict[str, tuple[Any, ...]]:
    entries = json.loads(archive.attachment(manifest, FILES))["files"]
    return {entry["path"]: tuple(_plain(entry.get(key)) for key in _COMPARED) for entry in entries}


def _plain(value: Any) -> Any:
    return json.dumps(value, sort_keys=True) if isinstance(value, dict | list) else value


def _stored(archive: Archive, digests: Collection[str]) -> dict[str, int]:
    """Return the bytes that chunks take in the archive."""
    listed = archive.blobs.sizes("chunks/")
    sizes = {
        digest: size for name, size in listed if (digest := name.rpartition("/")[2]) in digests
    }
    if missing := set(digests) - sizes.keys():
        raise NotFound(f"chunk {min(missing)} is missing from {archive.blobs.place}")
    return sizes
