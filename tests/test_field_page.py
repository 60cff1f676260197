"""tests/FIELD.md says the truth: every line of the field notes is there, every test that it
names exists, and every test that is named for a line is there."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

import pytest

TESTS: Final = Path(__file__).parent
PAGE: Final = (TESTS / "FIELD.md").read_text()
NOTES: Final = range(1, 29)
NOT_BUILT: Final = "not built yet: "
# What went wrong in public: the rows of the field notes, by how they begin.
PUBLIC: Final = (
    "A large CDN's disks",
    "A university's PCs",
    "All nodes of a cloud region",
    "883 customers",
    "A pension fund's cloud",
    "8.5 million hosts",
    "Files of a supercomputer",
    "BMC password hash",
    "Metadata served by source address",
    "Boot-script injection",
    "`file://` image paths",
    "`qemu-img` on a hostile image",
    "Raw IPMI commands",
    "A shared secret",
    "Jinja2 sandbox escapes",
    "Identity overwritten",
)
_NAME: Final = re.compile(r"`((?:unit|parts|lab|sim)/test_\w+\.py)`|`(test_\w+)`")


def rows() -> Iterator[tuple[str, str]]:
    """Yield what each row is about, and what it says of tests."""
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 3 and cells[0] not in ("note", "what happened", "---"):
            yield cells[0], cells[2]


def named_in(text: str) -> Iterator[tuple[str, str]]:
    """Yield (file, test) for each test that a row names."""
    file = ""
    for found in _NAME.finditer(text):
        if found[1]:
            file = found[1]
        else:
            yield file, found[2]


@cache
def functions_of(file: str) -> frozenset[str]:
    path = TESTS / file
    tree = ast.parse(path.read_text()) if path.is_file() else ast.Module([], [])
    return frozenset(one.name for one in ast.walk(tree) if isinstance(one, ast.FunctionDef))


ROWS: Final = list(rows())


@pytest.mark.parametrize(("about", "says"), ROWS, ids=[about[:30] for about, _ in ROWS])
def test_a_row_names_tests_that_exist(about: str, says: str) -> None:
    named = list(named_in(says))
    assert named, f"{about} names no test"
    missing = [f"{file} {test}" for file, test in named if test not in functions_of(file)]
    assert not missing
    assert says.startswith((NOT_BUILT, "`")), "a row begins with its tests, or with what it lacks"


def test_every_line_of_the_field_notes_has_a_row() -> None:
    notes = {about for about, _ in ROWS if about.isdigit()}
    assert notes == {str(number) for number in NOTES}
    public = [about for about, _ in ROWS if not about.isdigit()]
    assert len(public) == len(PUBLIC)
    for about, begin in zip(public, PUBLIC, strict=True):
        assert about.startswith(begin)


def test_every_test_that_is_named_for_a_line_has_its_row() -> None:
    told = {test for _, says in ROWS for _, test in named_in(says)}
    for path in sorted(TESTS.rglob("test_*.py")):
        for test in functions_of(str(path.relative_to(TESTS))):
            if found := re.match(r"test_field_(\d+)_", test):
                rows_of = [says for about, says in ROWS if about == str(int(found[1]))]
                assert any(test in says for says in rows_of), f"FIELD.md lacks {test}"
            elif test.startswith("test_public_"):
                assert test in told, f"FIELD.md lacks {test}"
