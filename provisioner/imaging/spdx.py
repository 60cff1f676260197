"""The list of a release's packages as an SPDX 2.3 document: names, versions, origin, licences.

Works on what dpkg left in a tree, without a network and without apt's lists. The same
input gives the same bytes.
"""

from __future__ import annotations

import functools
import io
import json
import logging
import tempfile
import urllib.parse
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

COPYRIGHT_BYTES_MAX: Final = 4 * 1024 * 1024

_STATUS: Final = "var/lib/dpkg/status"
_EXTENDED_STATES: Final = "var/lib/apt/extended_states"
_DOC: Final = "usr/share/doc"
# SPDX 2.3, section 6.5: where who makes a document has no address of their own.
_NAMESPACE: Final = "https://spdx.org/spdxdocs"


@dataclass(frozen=True)
class InstalledPackages:
    """What dpkg and apt know of the packages in a tree, as they write it.

    extended_states tells what was installed only because something needs it; copyrights
    maps a binary package to its copyright file.
    """

    status: str
    extended_states: str = ""
    copyrights: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, tree: Path) -> InstalledPackages:
        """Return what stands in a tree; no link is followed out of it."""
        extended_states = tree / _EXTENDED_STATES
        return cls(
            (tree / _STATUS).read_text(),
            extended_states.read_text() if extended_states.is_file() else "",
            dict(_copyrights(tree)),
        )


def spdx_document(
    installed: InstalledPackages,
    *,
    image: str,
    version: str,
    architecture: str,
    release_id: str,
    created_at: datetime,
) -> bytes:
    """Return the document (JSON, UTF-8) of a release's packages.

    release_id (32 hex digits) makes the document's address; created_at (aware) is the date
    of the inputs. About two seconds for 250 packages, most of it for the licences.
    """
    # Slow to import, and needed by builds only.
    from debsbom.bomwriter import BomWriter
    from debsbom.generate.generate import Debsbom
    from debsbom.sbom import SBOMType

    _make_debsbom_quick_and_quiet()
    address = f"{_NAMESPACE}/{image}-{version}-{uuid.UUID(release_id)}"
    with tempfile.TemporaryDirectory(prefix="spdx-") as folder:
        _lay_out(installed, Path(folder))
        sbom = Debsbom(
            image,
            root=folder,
            distro_version=version,
            distro_arch=architecture,
            spdx_namespace=urllib.parse.urlparse(address),
            timestamp=created_at.astimezone(UTC).replace(microsecond=0),
            with_licenses=True,
        )
        sbom.scan()
        # Of several packages that provide the same, debsbom takes the first it comes to.
        for providers in sbom.virtual_packages.values():
            providers.sort(key=lambda pair: (pair[1].name, str(pair[1].version)))
        written = io.StringIO()
        BomWriter.create(SBOMType.SPDX).write_to_stream(
            sbom.generate(SBOMType.SPDX), written, validate=False
        )
    document = json.loads(written.getvalue())
    document["name"] = f"{image}@{version}"
    return _canonical(document)


def _canonical(document: dict[str, Any]) -> bytes:
    """Return the document with everything sorted, since debsbom works with sets."""
    document["packages"].sort(key=lambda package: package["SPDXID"])
    document["relationships"].sort(
        key=lambda relationship: json.dumps(relationship, sort_keys=True)
    )
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode() + b"\n"


def _lay_out(installed: InstalledPackages, root: Path) -> None:
    """Put the files where debsbom looks for them in a tree."""
    files = {_STATUS: installed.status}
    if installed.extended_states:
        files[_EXTENDED_STATES] = installed.extended_states
    for package, text in installed.copyrights.items():
        files[f"{_DOC}/{package}/copyright"] = text
    for place, text in files.items():
        path = root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _copyrights(tree: Path) -> Iterator[tuple[str, str]]:
    """Yield (package, its copyright file). Packages of one source often link to one folder."""
    real_tree = tree.resolve()
    for folder in sorted((tree / _DOC).glob("*")):
        path = (folder / "copyright").resolve()
        if not path.is_relative_to(real_tree) or not path.is_file():
            continue
        if path.stat().st_size <= COPYRIGHT_BYTES_MAX:
            yield folder.name, path.read_text("utf-8", "replace")


def _make_debsbom_quick_and_quiet() -> None:
    """Have it read the list of all known licences once, and not for each package anew.

    That is most of its time. Its warnings are about single packages that name no
    maintainer, of which the document tells as well.
    """
    from debsbom.apt import copyright as licences

    if not hasattr(licences.get_spdx_licensing, "cache_info"):
        licences.get_spdx_licensing = functools.cache(licences.get_spdx_licensing)
    logging.getLogger("debsbom").setLevel(logging.ERROR)
