"""The rules of the house, held by tools and by reading the sources.

What a rule must let pass stands beside it with its reason; an exception that nothing needs
any more fails, too.
"""

import ast
import dataclasses
import importlib
import json
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Final

import pytest

import provisioner
from provisioner.core.lifecycle import LIMIT
from provisioner.core.model import FINAL, Phase
from provisioner.errors import ProvisionerError
from tests import lifecycle_page, why_page

ROOT: Final = Path(__file__).parent.parent
BIN: Final = Path(sys.executable).parent
TOOL_LIMIT_S: Final = 900  # the first run of the type checker has nothing cached

FUNCTION_LINES_MAX: Final = 60
MODULE_LINES_MAX: Final = 400
TEST_MODULE_LINES_MAX: Final = 500  # cases side by side; there is no flow to follow

# Longer than the rule, with the reason that a reader accepted.
LONG_FUNCTIONS: Final[Mapping[str, str]] = {
    "provisioner/wiring.py:build": "a list of constructors without a decision",
    "provisioner/store/migrations/versions/v0001_first_tables.py:upgrade": "a list of tables",
}
LONG_MODULES: Final[Mapping[str, str]] = {}


def sources(*folders: str) -> list[Path]:
    """Return the Python files of folders or files below the root, scripts without suffix too."""
    found: list[Path] = []
    for folder in folders or ("provisioner", "tests"):
        place = ROOT / folder
        found += [place] if place.is_file() else sorted(place.rglob("*.py"))
    return found


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def text_files() -> Iterator[Path]:
    """Yield every file that people read: code, docs, templates, scripts, units."""
    for folder in ("provisioner", "tests", "docs", "templates", "images", "script", "systemd"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts and _is_text(path):
                yield path
    yield from (path for path in sorted(ROOT.glob("*")) if path.suffix in (".md", ".toml"))


def _is_text(path: Path) -> bool:
    try:
        return b"\0" not in path.read_bytes()[:4096]
    except OSError:
        return False


def run(*command: str) -> str:
    """Run a tool of this environment and return what it said; fail with it otherwise."""
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=TOOL_LIMIT_S, check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, f"{' '.join(command)}\n{said[-6000:]}"
    return said


# --- tools --------------------------------------------------------------------------------


def test_everything_is_formatted() -> None:
    run(str(BIN / "ruff"), "format", "--check", "--quiet", "provisioner", "tests")


def test_the_linter_is_content() -> None:
    run(str(BIN / "ruff"), "check", "--quiet", "provisioner", "tests")


def test_every_type_is_strict() -> None:
    run(str(BIN / "mypy"), "--strict", "provisioner", "tests")


def test_arrows_point_inward() -> None:
    run(str(BIN / "lint-imports"), "--config", ".importlinter", "--no-cache")


def test_words_are_spelt_right() -> None:
    names = [named(path) for path in text_files()]
    run(str(BIN / "codespell"), "--ignore-words-list", "confirmin,importin,lmit", *names)


def shell_scripts() -> list[str]:
    return [
        named(path)
        for path in text_files()
        if path.read_text(errors="replace").startswith(("#!/bin/sh", "#!/usr/bin/env bash"))
    ] + [".ci/run"]


def test_shell_scripts_are_sound() -> None:
    scripts = shell_scripts()
    assert {"script/setup", "script/test", ".ci/run"} <= set(scripts)
    run("shellcheck", *scripts)


# --- rooms: what import-linter cannot say -------------------------------------------------

# The core is told the time and is handed its tokens; these modules would do it themselves.
WORLD: Final = frozenset(
    re.findall(
        r"\w+",
        """asyncio ctypes fcntl getpass glob http io logging mmap multiprocessing os pathlib
        platform random secrets select shutil signal socket sqlite3 ssl subprocess sys tempfile
        threading time urllib uuid""",
    )
)
AGENT_MAY: Final = frozenset(
    {"zstandard", "provisioner.errors"}
    | {
        f"provisioner.core.{name}"
        for name in ("batches", "disks", "manifest", "manifest_fields", "trust", "versions")
    }
)
SERVER_LIBRARIES: Final = frozenset(
    re.findall(
        r"\w+",
        """alembic apiflask cryptography dbos flask gunicorn jinja2 prometheus_client psycopg
        pydantic pyghmi sqlalchemy tftpy zstandard""",
    )
)


def imports_of(path: Path) -> Iterator[str]:
    """Yield the full name of every module that a file imports, wherever in the file."""
    package = list(path.relative_to(ROOT).with_suffix("").parts)[:-1]
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                yield inner if _is_module(inner) else module


def _is_module(name: str) -> bool:
    place = ROOT / Path(*name.split("."))
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()


def is_standard(name: str) -> bool:
    return name.split(".")[0] in sys.stdlib_module_names


@pytest.mark.parametrize("path", sources("provisioner/core", "provisioner/errors.py"), ids=named)
def test_the_core_touches_nothing_of_the_world(path: Path) -> None:
    imported = set(imports_of(path))
    assert not [name for name in imported if name.split(".")[0] in WORLD]
    outside = [name for name in imported if not is_standard(name)]
    assert all(name.startswith(("provisioner.core", "provisioner.errors")) for name in outside)
    calls = {
        ast.unparse(node.func) for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)
    }
    assert not calls & {"datetime.now", "datetime.utcnow", "date.today", "open", "print", "input"}


@pytest.mark.parametrize("path", sources("provisioner/agent"), ids=named)
def test_the_agent_imports_only_what_the_ramdisk_carries(path: Path) -> None:
    for name in imports_of(path):
        ours = name.startswith("provisioner.agent") or name == "provisioner"
        assert is_standard(name) or ours or name in AGENT_MAY, name


@pytest.mark.parametrize("name", sorted(name for name in AGENT_MAY if "." in name))
def test_what_the_agent_borrows_needs_nothing_else(name: str) -> None:
    path = (ROOT / Path(*name.split("."))).with_suffix(".py")
    for imported in imports_of(path):
        assert is_standard(imported) or imported in AGENT_MAY, imported


@pytest.mark.parametrize("path", sources("provisioner/reporter"), ids=named)
def test_the_reporter_runs_anywhere(path: Path) -> None:
    for name in imports_of(path):
        assert is_standard(name) or name.startswith("provisioner.reporter"), name


def test_the_command_line_starts_without_the_server() -> None:
    code = "import json, sys, provisioner.cli.main; print(json.dumps(sorted(sys.modules)))"
    loaded = {name.split(".")[0] for name in json.loads(run(sys.executable, "-c", code))}
    assert not loaded & SERVER_LIBRARIES


def test_importing_a_module_does_no_work() -> None:
    """Every module of ours can be imported in a process that is not allowed a thing."""
    code = (
        "import importlib, pkgutil, provisioner, socket, threading\n"
        "def refuse(*_a, **_k): raise AssertionError('a socket was opened by an import')\n"
        "socket.socket.bind = socket.socket.connect = refuse\n"
        "for found in pkgutil.walk_packages(provisioner.__path__, 'provisioner.'):\n"
        "    if not found.name.endswith('__main__') and '.migrations.' not in found.name:\n"
        "        importlib.import_module(found.name)\n"
        "assert threading.active_count() == 1, threading.enumerate()\n"
    )
    run(sys.executable, "-c", code)


# --- sizes and words ----------------------------------------------------------------------


@pytest.mark.parametrize("path", sources(), ids=named)
def test_a_module_says_what_it_does_and_is_not_long(path: Path) -> None:
    text = path.read_text()
    if text.strip():
        assert ast.get_docstring(tree_of(path)), f"{named(path)} has no docstring"
    lines = text.count("\n")
    most = TEST_MODULE_LINES_MAX if named(path).startswith("tests/") else MODULE_LINES_MAX
    if named(path) in LONG_MODULES:
        assert lines > most, f"{named(path)} needs no exception any more"
    else:
        assert lines <= most, f"{named(path)} has {lines} lines: look again"


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the lines of a function without those of the functions inside it, which are
    read, and counted, by themselves: a group of routes is as long as its longest one."""
    inner = [
        node for node in function.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    whole = [(node.end_lineno or node.lineno) - node.lineno + 1 for node in (function, *inner)]
    return whole[0] - sum(whole[1:])


@pytest.mark.parametrize("path", sources(), ids=named)
def test_no_function_is_long(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        lines, name = lines_of(node), f"{named(path)}:{node.name}"
        if name in LONG_FUNCTIONS:
            assert lines > FUNCTION_LINES_MAX, f"{name} needs no exception any more"
        else:
            assert lines <= FUNCTION_LINES_MAX, f"{name} has {lines} lines: look again"


def test_a_file_is_named_for_what_it_does() -> None:
    vague = re.compile(r"(util|utils|helper|helpers|manager|common|misc|base_?class)s?")
    assert not [named(path) for path in sources() if vague.fullmatch(path.stem)]


# Words that we have another one for. `machine` is right for the computer that we run on, and
# for what QEMU pretends to be; so only names are judged, and those words in prose.
OTHER_WORDS: Final = re.compile(r"(?<![a-z])(node|nodes|box|boxes|baremetal)(?![a-z=])", re.I)
OTHER_NAMES: Final = re.compile(r"(^|_)(node|machine|box|baremetal)s?(_|$)", re.I)
WORDS_ALLOWED: Final[Mapping[str, str]] = {
    "provisioner/cli/given_files.py": "YAML's own name for a piece of a document",
    "provisioner/imaging/strict_yaml.py": "YAML's own name for a piece of a document",
    "provisioner/lab": "a QEMU machine stands in for a host's hardware",
    "provisioner/agent": "the machine that the ramdisk runs on, and the kernel's word for it",
}
NAMES_ALLOWED: Final = re.compile(r"machine_id")


def is_allowed_word(path: Path) -> bool:
    return any(named(path).startswith(place) for place in WORDS_ALLOWED)


@pytest.mark.parametrize("path", sources("provisioner"), ids=named)
def test_one_word_for_one_thing(path: Path) -> None:
    if is_allowed_word(path):
        return
    found = [
        f"{named(path)}:{number}: {line.strip()}"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if OTHER_WORDS.search(line)
    ]
    assert not found, "we say host"
    names = {name for name in names_in(path) if OTHER_NAMES.search(name)}
    assert not {name for name in names if not NAMES_ALLOWED.search(name)}


def names_in(path: Path) -> Iterator[str]:
    """Yield the names that a file gives to things."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


@pytest.mark.parametrize("place", sorted(WORDS_ALLOWED))
def test_every_allowed_place_exists(place: str) -> None:
    assert (ROOT / place).exists()


IGNORES: Final = re.compile(r"#\s*(noqa|type:\s*ignore|ruff:\s*noqa|fmt:\s*off|pragma)(.*)$")
_IGNORE_ALONE: Final = re.compile(r"\s*(:\s*[A-Z0-9, ]+|\[[a-z0-9, -]+\])?\s*")


@pytest.mark.parametrize("path", sources(), ids=named)
def test_an_ignore_has_its_reason_on_the_same_line(path: Path) -> None:
    for number, line in enumerate(path.read_text().splitlines(), 1):
        match = IGNORES.search(line)
        if match is None or "re.compile" in line:
            continue
        reason = _IGNORE_ALONE.sub("", match[2], count=1).strip(" #-:")
        assert len(reason) > 8, f"{named(path)}:{number}: {line.strip()}"


def test_no_text_leans_on_something_that_is_not_here() -> None:
    """Trackers, notes to be done later and places on somebody's disk mean nothing to others."""
    elsewhere = re.compile(r"\b(issue|ticket|PR) #\d|\bTO" + r"DO\b|\bFIX" + r"ME\b|\bX" + r"XX\b")
    for path in text_files():
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            assert not elsewhere.search(line), f"{named(path)}:{number}: {line.strip()}"


# --- secrets ------------------------------------------------------------------------------

# A process's arguments and environment are readable by others, and so is a shell's history.
IN_ARGV: Final = (
    re.compile(r"""["']-P["']\s*,"""),  # ipmitool's password
    re.compile(r"--(bmc-)?(password|token|secret|passphrase)[= ]\S*\{"),
    re.compile(r"\b(IPMI_PASSWORD|PGPASSWORD|PROVISIONER_TOKEN)\s*="),
)
SECRET_OPTION: Final = re.compile(r"--[a-z-]*(password|token|secret|passphrase|key)$")


@pytest.mark.parametrize("path", [*text_files()], ids=named)
def test_no_secret_is_an_argument(path: Path) -> None:
    if path == Path(__file__):
        return
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        assert not [p for p in IN_ARGV if p.search(line)], f"{named(path)}:{number}"


def test_no_logging_of_what_reveals_itself() -> None:
    """`.reveal()` may stand where a secret is used, never inside a log call or an f-string."""
    for path in sources("provisioner"):
        for node in ast.walk(tree_of(path)):
            if not isinstance(node, ast.Call) or not ast.unparse(node.func).startswith("log."):
                continue
            if ".reveal(" in ast.unparse(node):
                pytest.fail(f"{named(path)}:{node.lineno} logs a secret")


# --- documents ----------------------------------------------------------------------------


def page(name: str) -> str:
    path = ROOT / "docs" / name
    assert path.is_file(), f"docs/{name} is missing"
    return path.read_text()


def test_the_picture_of_the_lifecycle_is_that_of_the_tables() -> None:
    assert page("lifecycle.md") == lifecycle_page.page(), "run python -m tests.lifecycle_page"
    assert page("why.md") == why_page.page(), "run python -m tests.why_page"


def test_every_open_phase_has_its_limit_on_the_page() -> None:
    assert {phase for phase in Phase if phase not in FINAL} == set(LIMIT)


def commands() -> Iterator[tuple[str, object]]:
    """Yield every command with its words: ("host add", the click command)."""
    import click

    main = importlib.import_module("provisioner.cli.main").main

    def below(words: tuple[str, ...], command: click.Command) -> Iterator[tuple[str, object]]:
        if words:
            yield " ".join(words), command
        if isinstance(command, click.Group):
            context = click.Context(command)
            for name in command.list_commands(context):
                inner = command.get_command(context, name)
                assert inner is not None
                yield from below((*words, name), inner)

    yield from below((), main)


def test_every_command_has_help_and_stands_in_the_documents() -> None:
    import click

    documented = page("cli.md")
    seen = 0
    for words, command in commands():
        assert isinstance(command, click.Command)
        seen += 1
        assert command.help, f"`provisioner {words}` has no help"
        assert f"provisioner {words}" in documented, f"docs/cli.md lacks `provisioner {words}`"
        for option in command.params:
            if isinstance(option, click.Option) and not option.hidden:
                assert option.help, f"`provisioner {words}` {option.opts[0]} has no help"
                assert not SECRET_OPTION.search(option.opts[0]), (
                    f"`provisioner {words}` takes a secret as an argument: {option.opts[0]}"
                )
    assert seen > 20


def test_every_setting_stands_in_the_documents() -> None:
    from provisioner.settings import Settings

    documented = page("settings.md")
    hints = {field.name: field.type for field in dataclasses.fields(Settings)}
    sections = [name for name in hints if f"## [{name}]" in documented]
    assert {"service", "database", "api", "boot", "agent", "tftp", "dhcp", "limits"} <= set(
        sections
    )
    for section in sections:
        kind = hints[section]
        assert dataclasses.is_dataclass(kind)
        for field in dataclasses.fields(kind):
            assert f"`{section}.{field.name}`" in documented, f"{section}.{field.name}"


def error_codes() -> set[str]:
    """Return every code of the error tree, with all rooms imported."""
    for found in pkgutil.walk_packages(provisioner.__path__, "provisioner."):
        if not found.name.endswith("__main__") and ".migrations" not in found.name:
            importlib.import_module(found.name)
    waiting, codes = [ProvisionerError], set()
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if kind.__module__.startswith("provisioner"):
            codes.add(kind.code)
    return codes


def test_every_error_code_stands_in_the_documents() -> None:
    documented = page("errors.md")
    missing = sorted(code for code in error_codes() if f"`{code}`" not in documented)
    assert not missing, f"docs/errors.md lacks {missing}"


CODE_IN_JSON: Final = re.compile(r'"code": "([a-z_]+)"')


def test_every_way_an_operation_fails_stands_in_the_documents() -> None:
    """Codes that are saved with a failed operation without being raised."""
    documented = page("errors.md")
    for path in sources("provisioner/service"):
        for code in CODE_IN_JSON.findall(path.read_text()):
            assert f"`{code}`" in documented, f"docs/errors.md lacks {code} of {named(path)}"
    for phase in LIMIT:
        assert f"`{phase}_timed_out`" in documented, f"docs/errors.md lacks {phase}_timed_out"


def test_every_page_is_linked_and_every_link_leads_somewhere() -> None:
    linked: set[Path] = set()
    pages = [ROOT / "README.md", ROOT / "provisioner" / "ARCHITECTURE.md"]
    pages += sorted((ROOT / "docs").glob("*.md"))
    for here in pages:
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", here.read_text()):
            place = (here.parent / target).resolve()
            assert place.exists(), f"{named(here)} links to {target}, which is not there"
            linked.add(place)
    unlinked = [named(path) for path in pages[2:] if path.resolve() not in linked]
    assert not unlinked, f"no page links to {unlinked}"
