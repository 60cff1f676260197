"""The stories take every branch of the diagnosis both ways."""

import ast
import importlib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Final

from provisioner.core import diagnosis
from provisioner.core.diagnosis import Facts

from .boot_stories import ASIDES, STORIES
from .branches import Watched

# In the order in which they import each other.
MODULES: Final = (
    *("downloads", "netboot_trace", "diagnosis"),
    *("causes_of_netboot", "causes_of_download", "causes"),
)


@contextmanager
def watched_modules() -> Iterator[list[Watched]]:
    """Stand watched copies of the modules in for them; the stories were made before."""
    names = [f"provisioner.core.{name}" for name in MODULES]
    kept, watched = {name: importlib.import_module(name) for name in names}, []
    try:
        for name in names:
            watched.append(_watch(name))
        yield watched
    finally:
        sys.modules.update(kept)


def _watch(name: str) -> Watched:
    source = Path(sys.modules[name].__file__ or "")
    copy, watched = ModuleType(name), Watched(f"{source.stem}, ")
    tree = ast.fix_missing_locations(watched.visit(ast.parse(source.read_text())))
    vars(copy).update(__package__="provisioner.core", **watched.names)
    sys.modules[name] = copy
    exec(compile(tree, str(source), "exec"), vars(copy))
    if name.endswith(".diagnosis"):
        copy.Dhcp = diagnosis.Dhcp  # type: ignore[attr-defined]  # the stories' own
    return watched


def branches_not_taken(stories: Iterable[Facts]) -> list[str]:
    with watched_modules() as watched:
        diagnose = sys.modules["provisioner.core.diagnosis"].diagnose
        causes = sys.modules["provisioner.core.causes"].CAUSES
        for facts in stories:
            diagnose(facts, causes)
    return [place for one in watched for place in one.not_taken()]


def test_the_stories_take_every_branch_both_ways() -> None:
    assert branches_not_taken([*(facts for _, facts in STORIES), *ASIDES]) == []


def test_a_branch_that_no_story_takes_is_found() -> None:
    without = [facts for name, facts in STORIES if not name.startswith("tftp_")]
    missing = branches_not_taken(without)
    assert [place for place in missing if "not found" in place]
