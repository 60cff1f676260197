"""`image diff`: what moving a host from one release to another changes, and costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..messages import clean
from ..output import output_option, show_one, size
from ..site import config_option, opened

if TYPE_CHECKING:
    from provisioner.core.manifest import Manifest
    from provisioner.imaging.difference import Changes, Difference


@click.command()
@click.argument("old")
@click.argument("new")
@config_option
@output_option
def diff(old: str, new: str, config: Path | None, output: str) -> None:
    """Say how release NEW differs from OLD: packages, files, and the bytes to move.

    The bytes are those for a host whose disk holds OLD as it was deployed. With -o wide every
    file is listed.

    \b
      provisioner image diff web@2026.11.1 web@2026.11.2
      provisioner image diff web:stable web:candidate -o wide
    """
    from provisioner.imaging.difference import difference

    with opened(config) as site:
        manifests = [site.archive.load(site.digest_of(one)) for one in (old, new)]
        found = difference(site.archive, *manifests)
    if output in ("table", "wide"):
        for line in _lines(found, *manifests, is_wide=output == "wide"):
            click.echo(clean(line))
    else:
        show_one(asdict(found), output, name="new")


def _lines(found: Difference, old: Manifest, new: Manifest, *, is_wide: bool) -> Iterator[str]:
    yield f"{found.old} → {found.new}"
    yield f"packages  {_counts(found.packages)}"
    yield from _packages(found.packages, old, new)
    if found.files is None:
        yield "files     not known: a release has no list of its files"
    else:
        yield f"files     {_counts(found.files)}"
        if is_wide:
            yield from _marked(found.files)
    yield f"chunks    {found.chunks} of {found.chunks_total} differ ({_share(found)})"
    yield f"to write  {size(found.written_bytes)}"
    yield (
        f"to fetch  {size(found.fetched_bytes)} and {size(found.index_bytes)} of index; "
        f"the whole release is {size(found.whole_bytes)}"
    )


def _share(found: Difference) -> str:
    return f"{found.chunks / found.chunks_total:.1%}".replace("%", " %")


def _counts(changes: Changes) -> str:
    parts = {"added": changes.added, "removed": changes.removed, "changed": changes.changed}
    said = [f"{len(names)} {what}" for what, names in parts.items() if names]
    return ", ".join(said) or "no difference"


def _packages(changes: Changes, old: Manifest, new: Manifest) -> Iterator[str]:
    told: dict[str, str] = {}
    for name in changes.changed:
        told[name] = f"  ~ {name}  {old.packages[name]} → {new.packages[name]}"
    told |= {name: f"  + {name}  {new.packages[name]}" for name in changes.added}
    told |= {name: f"  - {name}  {old.packages[name]}" for name in changes.removed}
    yield from (told[name] for name in sorted(told))


def _marked(changes: Changes) -> Iterator[str]:
    marks: Any = (("~", changes.changed), ("+", changes.added), ("-", changes.removed))
    lines = [(name, mark) for mark, names in marks for name in names]
    yield from (f"  {mark} {name}" for name, mark in sorted(lines))
