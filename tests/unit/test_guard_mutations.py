"""No check of the guard is decoration: each is removed from the source in turn, and some case
of the table then comes out another way. And every condition is seen true and seen false."""

import ast
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from provisioner.core import guard
from tests.unit.branches import Watched
from tests.unit.guard_cases import REFUSED, TABLE, Case

SOURCE: Final = Path(guard.__file__).read_text()
Removable = ast.If | ast.For | ast.Expr


def run_as_guard(tree: ast.Module, **more: object) -> types.ModuleType:
    """Return the module that a changed source makes. It has the names of the original's."""
    module = types.ModuleType(guard.__name__)
    module.__dict__.update(more, __package__="provisioner.core")
    exec(compile(ast.fix_missing_locations(tree), guard.__file__, "exec"), module.__dict__)
    return module


def checks(source: str) -> list[Removable]:
    """Return every statement that may stop something: each `if`, each loop over refusals, and
    each `yield from` that takes in the checks of another."""

    def may_stop(node: ast.AST) -> bool:
        is_shared = isinstance(node, ast.Expr) and isinstance(node.value, ast.YieldFrom)
        return isinstance(node, ast.If | ast.For) or is_shared

    found = [node for node in ast.walk(ast.parse(source)) if may_stop(node)]
    return sorted((n for n in found if isinstance(n, Removable)), key=lambda node: node.lineno)


class Without(ast.NodeTransformer):
    """Replaces the check at one line by nothing."""

    def __init__(self, line: int) -> None:
        self.line = line
        self.removed = 0

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, Removable) and node.lineno == self.line:
            self.removed += 1
            return ast.copy_location(ast.Pass(), node)
        return self.generic_visit(node)


def guard_without(source: str, line: int) -> types.ModuleType:
    without = Without(line)
    module = run_as_guard(without.visit(ast.parse(source)))
    assert without.removed == 1
    return module


def outcome(case: Case, module: Any) -> object:
    """Return what comes out, an error included: a mutant may break in any way."""
    try:
        return case.outcome(module)
    except Exception as error:  # noqa: BLE001 # whatever a mutant does is not the right answer
        return type(error).__name__


def noticed_by(source: str, line: int) -> set[str]:
    """Return the cases that come out another way without the check at this line."""
    mutant = guard_without(source, line)
    return {name for name, _, case in TABLE if outcome(case, mutant) != outcome(case, guard)}


@pytest.mark.parametrize("check", checks(SOURCE), ids=lambda check: f"line {check.lineno}")
def test_a_check_that_is_removed_is_missed(check: Removable) -> None:
    assert noticed_by(SOURCE, check.lineno), f"no case needs line {check.lineno} of core/guard.py"


@pytest.mark.parametrize(
    ("function", "check"),
    [
        ("_never", "if operation.rung > 90:\n        yield 0, 1, 'never tried'"),
        ("_write_refusals", "if request.disk.rotational:\n        yield 0, 1, 'never tried'"),
        ("_delays", "if rules.in_flight_max > 10 ** 6:\n        yield 'never tried'"),
    ],
)
def test_a_check_that_has_no_case_is_found(function: str, check: str) -> None:
    """The proof can fail: a check that somebody adds without a case survives its removal."""
    begin = SOURCE.index(f"def {function}(")
    place = SOURCE.index("\n    if ", begin)
    source = f"{SOURCE[:place]}\n    {check}{SOURCE[place:]}"
    line = source[: source.index(check)].count("\n") + 1
    assert len(checks(source)) == len(checks(SOURCE)) + 1
    assert noticed_by(source, line) == set()


def refusals() -> Iterator[ast.If]:
    """Yield the checks of the three functions that refuse."""
    for function in ast.parse(SOURCE).body:
        if isinstance(function, ast.FunctionDef) and function.name in (
            "_never",
            "_ticket_refusals",
            "_write_refusals",
        ):
            yield from (node for node in function.body if isinstance(node, ast.If))


def test_every_refusal_of_the_table_depends_on_exactly_one_check() -> None:
    """No case is refused by accident: one missing check lets it through, and no other."""
    mutants = [guard_without(SOURCE, check.lineno) for check in refusals()]
    refused = [(name, case) for why, cases in REFUSED.items() for name, case in cases.items()]
    for name, case in refused:
        ways = [mutant for mutant in mutants if outcome(case, mutant) == ("permit", "")]
        # Where nobody made a request, nobody was selected by it either.
        assert len(ways) == (0 if name.startswith("no request") else 1), name


def test_a_refusal_is_nothing_but_a_check() -> None:
    """Anything else in there would escape the proofs above."""
    listed = list(refusals())
    assert all(len(check.body) == 1 and not check.orelse for check in listed)
    assert all(isinstance(check.body[0], ast.Expr) for check in listed)
    assert len(listed) == sum(len(cases.keys()) > 0 for cases in REFUSED.values()) - 4
    # Four flags of a host are one check here: `Host.why_not_rebuilt` tells them apart.


# --- every branch ---------------------------------------------------------------------------


def branches_not_taken(cases: Iterable[Case]) -> list[str]:
    """Return the conditions of the guard that the cases do not see both ways."""
    watched = Watched()
    module = run_as_guard(watched.visit(ast.parse(SOURCE)), **watched.names)
    for case in cases:
        outcome(case, module)
    return watched.not_taken()


def test_the_table_takes_every_branch_of_the_guard_both_ways() -> None:
    assert branches_not_taken(case for _, _, case in TABLE) == []


def test_a_branch_that_no_case_takes_is_found() -> None:
    without = [case for name, _, case in TABLE if not name.startswith("enough of group web")]
    missing = branches_not_taken(without)
    assert [line for line in missing if "group_starts_per_minute_max" in line] == missing
    assert missing
