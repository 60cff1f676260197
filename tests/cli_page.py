"""Writes docs/cli.md from the commands themselves: `python -m tests.cli_page`.

A test compares the page with the commands, so it lists every one as it is.
"""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click

from provisioner.cli.main import main

PAGE: Final = Path(__file__).parent.parent / "docs" / "cli.md"

INTRODUCTION: Final = """\
# The command line

Written from the commands by `python -m tests.cli_page`; a test compares them.

**Which service.** Commands that talk to a service find it, in this order, by `--url` and
`--token-file`; by the environment (`PROVISIONER_URL`, `PROVISIONER_TOKEN`); by the
`client.toml` beside `--config FILE` (or `PROVISIONER_CONFIG`); by `./client.toml`; by
`/etc/provisioner/client.toml`; by `~/.config/provisioner/contexts.toml`, a file with a section
for each service (`url`, `token`) and the name of the present one (`current = "lab"`), or the
one that `--context` names. These files must be readable by their owner only. A token is never
an argument: every user of a machine can read those.

**Passwords** of BMCs come from a file, standard input (`-`) or a prompt.

**Releases** are named `IMAGE@VERSION`, `IMAGE:CHANNEL` (where the channel points to now), or by
the start of a digest. Commands that make, check or remove bytes work at the service's machine,
with its `--config`; those that show releases and move channels use the API.

**Output.** Every read takes `-o table|wide|json|yaml|name`. `json` and `yaml` hold every key;
`name` prints what other commands take as an argument, one per line.

**Errors** go to standard error, with the host, what was expected, what was found and a hint.
The exit code says who must act:

| code | who, or what |
|---|---|
| 0 | done |
| 2 | the caller: the request cannot be carried out as it stands |
| 3 | nobody: try again later |
| 4 | the operator: a device or a host needs a look |
| 5 | security: something that must be proven was not |
| 70 | us: a bug |
| 78 | whoever installs: the configuration |
| 130 | you: interrupted; operations go on |

`reimage --wait` and `operation watch` end with the worst code of the operations they watched:
progress bars on a terminal, one line for each change elsewhere, both on standard error, and
the results as a table on standard output.

**Completion.** `eval "$(_PROVISIONER_COMPLETE=bash_source provisioner)"` for bash; `zsh_source`
and `fish_source` for the others.

## Commands
"""


def page() -> str:
    """Return the whole page."""
    return INTRODUCTION + "".join(_sections((), main))


def _sections(words: tuple[str, ...], command: click.Command) -> Iterator[str]:
    context = click.Context(command, info_name=" ".join(("provisioner", *words)))
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from _sections((*words, name), inner)
        return
    yield f"\n### `provisioner {' '.join(words)}`\n\n"
    usage = " ".join(command.collect_usage_pieces(context))
    yield f"`provisioner {' '.join(words)} {usage}`\n\n"
    yield f"{_text(command.help or '')}\n"
    options = [one for one in command.params if isinstance(one, click.Option) and not one.hidden]
    if options:
        yield "\n"
    for option in options:
        record = option.get_help_record(context)
        assert record is not None
        yield f"- `{record[0]}` {' '.join(record[1].split())}\n"


def _text(help_text: str) -> str:
    """Return a docstring as paragraphs, up to the mark after which click shows nothing.

    What click shall not fold (it begins with \\b) are examples, and become a block of code.
    """
    shown = inspect.cleandoc(help_text).partition("\f")[0]
    return "\n\n".join(_paragraph(part) for part in shown.split("\n\n"))


def _paragraph(text: str) -> str:
    if not text.startswith("\b\n"):
        return " ".join(text.split())
    lines = "\n".join(line.strip() for line in text.splitlines()[1:])
    return f"```sh\n{lines}\n```"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
