"""Every command and option that a page, a message of the changelog or a hint names is there."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from provisioner.cli.main import main

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
QUOTED = re.compile(r"`(?:\.venv/bin/)?(provisioner\s[^`]+)`")
OWN_LINE = re.compile(r"^ *(?:\$ )?(?:\.venv/bin/)?(provisioner [a-z].*)$", re.MULTILINE)
IN_A_HINT = re.compile(r"(?:`|hint=f?\")(provisioner [a-z][^`\"]*)[`\"]")
ENDS = ("|", ";", "&&", "--")


def named_in(text: str, *patterns: re.Pattern[str]) -> Iterator[list[str]]:
    """Yield the words behind `provisioner`, as far as they are of one command."""
    for line in sorted({found for pattern in patterns for found in pattern.findall(text)}):
        try:
            words = shlex.split(" ".join(line.split()), comments=True)
        except ValueError:  # an apostrophe in a sentence
            words = line.split()
        last = next((number for number, word in enumerate(words) if word[-1:] in ",;:"), len(words))
        end = next((number for number, word in enumerate(words) if word in ENDS), last + 1)
        yield words[1 : min(end, last + 1)]


def missing_in(words: list[str]) -> str | None:
    """Return the first word that no command or option answers to."""
    command: click.Command = main
    context = click.Context(main)
    while isinstance(command, click.Group) and words:
        first, *words = (word.strip(",;:.()") for word in words)
        if first.startswith(("-", "[", "…", "{")) or first.isupper() or not first:
            return None
        inner = command.get_command(context, first)
        if inner is None:
            return first
        command = inner
    known = {name for one in command.params for name in (*one.opts, *one.secondary_opts)}
    known |= {"--help", "-h"}
    options = [word.partition("=")[0].strip(",;:.()[]") for word in words]
    return next((one for one in options if re.match(r"--?[a-z]", one) and one not in known), None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_says_to_type_is_there(page: Path) -> None:
    found = {
        " ".join(words): missing_in(words) for words in named_in(page.read_text(), QUOTED, OWN_LINE)
    }
    assert {said: missing for said, missing in found.items() if missing is not None} == {}


def test_what_a_hint_says_to_type_is_there() -> None:
    texts = [file.read_text() for file in sorted((ROOT / "provisioner").rglob("*.py"))]
    found = [words for text in texts for words in named_in(text, IN_A_HINT)]
    assert len(found) > 40
    assert [words for words in found if missing_in(words) is not None] == []


@pytest.mark.parametrize("said", ["host remove r1n1", "host list --wide", "deploy r1n1"])
def test_what_is_not_there_is_found_out(said: str) -> None:
    assert missing_in(said.split()) is not None
