"""What a stranger's dpkg says is installed, judged before anything else works with it.

Reads no file: it is given what stands in dpkg's status file. Every step takes time and
memory in proportion to the text, whatever stands in it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from typing import Final

from provisioner.errors import RequestError

PACKAGES_MAX: Final = 20_000
# A Debian system has some 40 for each package: 1.2 million with all that it may have here.
LINES_MAX: Final = 2_000_000
# All that packages say of one another: Debian's have some 10 each.
RELATIONS_MAX: Final = 500_000

# Debian Policy, 5.6.1 and 5.6.12. Names become parts of paths further on.
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9+.-]{1,199}")
_VERSION: Final = re.compile(r"[A-Za-z0-9.+:~-]{1,200}")
_ARCHITECTURE: Final = re.compile(r"[a-z0-9-]{1,50}")
_SOURCE: Final = re.compile(rf"{_NAME.pattern}(?: \({_VERSION.pattern}\))?")
# Debian Policy, 7.1, without what stands only in source packages.
_RELATION: Final = re.compile(
    r"[a-z0-9][a-z0-9+.-]{0,199}(?::[a-z0-9-]{1,50})?"
    rf"(?: ?\( ?(?:<<|<=|=|>=|>>|<|>) ?{_VERSION.pattern} ?\))?"
)
_BLANKS: Final = re.compile(r"[ \t]{20,}")

_RELATIONS: Final = frozenset(
    {
        *("depends", "pre-depends", "recommends", "provides"),
        *("built-using", "static-built-using"),
    }
)
_DESCRIPTION: Final = "description"
# What a document tells of a package, and how long it may be. The longest that Debian has are
# what a collection of fonts or macros describes, and what a Rust library provides.
_LONG: Final = 256 * 1024
_CHARACTERS_MAX: Final[Mapping[str, int]] = {
    **dict.fromkeys(("package", "status", "version", "architecture", "source"), 500),
    **dict.fromkeys(("maintainer", "homepage", "essential", "priority"), 2_000),
    **dict.fromkeys((*_RELATIONS, _DESCRIPTION), _LONG),
}


def foreign_packages(status: str) -> dict[str, str]:
    """Return {package: version} of what is installed.

    Raises RequestError for a list that dpkg would not have written.
    """
    return {fields["package"]: fields["version"] for fields in _installed(status)}


def described_packages(status: str) -> str:
    """Return the same list with no more than SPDX needs, in the form dpkg writes.

    For reading by libraries that trust dpkg: installed packages only, each field once,
    short and without control characters or long runs of blanks, names and versions as
    Debian's Policy has them. Raises RequestError as `foreign_packages` does, and ValueError
    for a field that is longer, or not of its form, or too many relations: half a list would
    pass for a whole one.
    """
    relations = sum(
        1 + fields[name].count(",") + fields[name].count("|")
        for fields in _installed(status)
        for name in fields.keys() & _RELATIONS
    )
    if relations > RELATIONS_MAX:
        raise ValueError("too many relations")
    return "\n".join(
        "".join(f"{name}: {_described(name, value)}\n" for name, value in fields.items())
        for fields in _installed(status)
    )


def _installed(status: str) -> Iterator[dict[str, str]]:
    """Yield the fields, by their names in small letters, of each package that is installed."""
    if status.count("\n") > LINES_MAX:
        raise _refused(f"at most {LINES_MAX} lines", "more")
    for number, fields in enumerate(_paragraphs(status), 1):
        if number > PACKAGES_MAX:
            raise _refused(f"at most {PACKAGES_MAX} packages", "more")
        name = fields.get("package", "")
        if "package" in fields and not _NAME.fullmatch(name):
            raise _refused("packages named as Debian names them", repr(name[:100]))
        if not fields.get("status", "").endswith(" installed"):
            continue
        if "package" not in fields or "version" not in fields:
            raise _refused("a name and a version for each package", f"one without: {name[:100]}")
        if not _VERSION.fullmatch(fields["version"]):
            raise _refused("versions as Debian writes them", f"another, of {name}")
        # Whatever it said besides, this is what it came to.
        yield fields | {"status": "install ok installed"}


def _paragraphs(status: str) -> Iterator[dict[str, str]]:
    """Yield the fields of each paragraph that somebody asks for, as they stand there."""
    fields: dict[str, list[str]] = {}
    others: list[str] = []
    lines = others
    for line in io.StringIO(status + "\n\n", newline="\n"):
        if line == "\n":
            if fields:
                yield {name: "".join(value).strip() for name, value in fields.items()}
            fields, lines = {}, others
        elif line[0] not in " \t":
            # As the readers of such files take it: in any case, and with space before the colon.
            before, _, value = line.partition(":")
            name = before.strip().lower()
            if name in fields:
                raise _refused("each field once", f"another {name}")
            lines = fields.setdefault(name, [value]) if name in _CHARACTERS_MAX else others
        elif lines is not others:
            lines.append(line)


def _described(name: str, value: str) -> str:
    """Return a field's value as it may be handed on; ValueError if it may not."""
    if len(value) > _CHARACTERS_MAX[name]:
        raise ValueError(f"{name} is too long")
    if name == _DESCRIPTION:
        return _plain_lines(value)
    plain = _printable(" ".join(value.split()))
    if name in _RELATIONS:
        return _relations(plain)
    form = {"architecture": _ARCHITECTURE, "source": _SOURCE}.get(name)
    if form and not form.fullmatch(plain):
        raise ValueError(f"{name} is not as Debian writes it")
    return plain


def _relations(value: str) -> str:
    """Return the packages that a field names: all of (one or another), as dpkg writes them."""
    wanted = [part for part in (part.strip() for part in value.split(",")) if part]
    for part in wanted:
        for choice in part.split("|"):
            if not _RELATION.fullmatch(choice.strip()):
                raise ValueError("a relation is not as Debian writes it")
    return ", ".join(wanted)


def _plain_lines(value: str) -> str:
    """Return a description: one line, and more that each begin with a space."""
    first, *more = (_printable(line.rstrip()) for line in value.split("\n"))
    return "\n".join([first.strip(), *(line for line in more if line)])


def _printable(line: str) -> str:
    """Return a line in which nothing can move a cursor, end a line or hide."""
    if not line.isprintable():
        line = "".join(
            letter if letter.isprintable() else " " if letter.isspace() else "\ufffd"
            for letter in line
        )
    return _BLANKS.sub(" " * 20, line)


def _refused(expected: str, found: str) -> RequestError:
    return RequestError(
        "the image's list of packages is refused (/var/lib/dpkg/status)",
        expected=expected,
        found=found,
    )
