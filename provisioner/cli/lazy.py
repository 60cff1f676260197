"""A group of commands whose modules are imported when one of them is called, not before:
`--help` and completion read a table."""

import difflib
import importlib
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import click
from click.shell_completion import CompletionItem


class Lazy(NamedTuple):
    """Where a command is (`module:attribute`), and its line in the help."""

    place: str
    help: str


# What other programs call it, and no spelling leads to.
MEANT: Final[Mapping[str, tuple[str, ...]]] = {
    **dict.fromkeys(("rm", "remove", "del"), ("delete", "revoke")),
    **dict.fromkeys(("set", "edit", "update", "modify"), ("change", "save")),
    **dict.fromkeys(("create", "new", "enroll", "enrol", "register"), ("add", "save", "create")),
    **dict.fromkeys(("get", "describe", "info", "status"), ("show", "list", "doctor")),
    **dict.fromkeys(("deploy", "provision", "rebuild", "install"), ("reimage",)),
    **dict.fromkeys(("job", "jobs", "task", "tasks"), ("operation",)),
    **dict.fromkeys(("explain", "debug"), ("why",)),
    "ls": ("list",),
    "unquarantine": ("release",),
}


class SuggestingGroup(click.Group):
    """Answers a mistyped command with the closest ones, and one of another program with ours."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            known = self.list_commands(ctx)
            close = [one for one in MEANT.get(args[0], ()) if one in known]
            close = close or difflib.get_close_matches(args[0], known, n=3)
            if not close:
                raise
            hint = f"{error.message} Did you mean {' or '.join(close)}?"
            raise click.UsageError(hint, ctx) from error


class LazyGroup(SuggestingGroup):
    """Its commands come from `table`, in the table's order."""

    def __init__(self, *args: Any, table: Mapping[str, Lazy], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.table = table

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self.table, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        lazy = self.table.get(cmd_name)
        if lazy is None:
            return super().get_command(ctx, cmd_name)
        module, attribute = lazy.place.split(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(
        self,
        ctx: click.Context,  # noqa: ARG002  click's signature
        formatter: click.HelpFormatter,
    ) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, lazy.help) for name, lazy in self.table.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        if incomplete.startswith("-"):
            return super().shell_complete(ctx, incomplete)
        return [
            CompletionItem(name, help=lazy.help)
            for name, lazy in self.table.items()
            if name.startswith(incomplete)
        ]
