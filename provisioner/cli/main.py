"""The command `provisioner`: finds the command to run, and turns errors into messages and
exit codes. Imports no library but click, so that help comes at once."""

import sys
from collections.abc import Callable, Sequence
from typing import Any, Final

import click

from provisioner.errors import ProvisionerError

from .lazy import Lazy, LazyGroup
from .messages import colour, show_bug, show_error

USAGE: Final = 2
INTERRUPTED: Final = 130

_CLI = "provisioner.cli"
COMMANDS: Final[dict[str, Lazy]] = {
    "init": Lazy(f"{_CLI}.init:init", "Write a configuration with strong keys into a folder."),
    "serve": Lazy(f"{_CLI}.serve.cli:serve_command", "Run the service."),
    "doctor": Lazy(f"{_CLI}.doctor:doctor", "Check this machine and say what to do."),
    "host": Lazy(f"{_CLI}.host:host", "Enrol, show and change hosts."),
    "profile": Lazy(f"{_CLI}.profile:profile", "Save and show profiles."),
    "image": Lazy(f"{_CLI}.image:image", "Build, import and show releases of images."),
    "reimage": Lazy(f"{_CLI}.reimage:reimage", "Rebuild the named hosts from a release."),
    "operation": Lazy(f"{_CLI}.operation:operation", "Show, watch and cancel operations."),
    "why": Lazy(f"{_CLI}.why:why", "Say where a host's boot stands, why, and what to do."),
    "breaker": Lazy(f"{_CLI}.breaker:breaker", "Show and close the breaker, which stops starts."),
    "reconcile": Lazy(f"{_CLI}.reconcile:reconcile", "Go on after a database was restored."),
    "audit": Lazy(f"{_CLI}.audit:audit", "Show and verify the audit log."),
    "service": Lazy(f"{_CLI}.service:service", "Show and forget services on this database."),
    "token": Lazy(f"{_CLI}.token:token", "Create, list and revoke API tokens."),
    "ramdisk": Lazy(f"{_CLI}.ramdisk:ramdisk", "Build and show deploy ramdisks."),
    "dhcp-config": Lazy(f"{_CLI}.dhcp:dhcp_config", "Print what the site's own DHCP server needs."),
    "lab": Lazy(f"{_CLI}.lab:lab", "Run a rack of virtual hosts that behave like hardware."),
}


class Program(LazyGroup):
    """The whole command line: its errors end in messages and exit codes."""

    def main(  # type: ignore[override]  # click's overloads say what standalone_mode returns
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        *,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        extra.setdefault("color", colour())

        def run() -> Any:
            return super(Program, self).main(args, prog_name, standalone_mode=False, **extra)

        if not standalone_mode:
            return run()
        sys.exit(_exit_code(run))


def _exit_code(run: Callable[[], Any]) -> int:
    """Run the command line; return the exit code, which says who must act."""
    try:
        code = run()
    except ProvisionerError as error:
        show_error(error)
        return error.exit_code
    except (click.exceptions.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return INTERRUPTED
    except click.ClickException as error:
        error.show()
        return USAGE
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough; nothing is left to flush.
        sys.stdout = None
        return 0
    except Exception as error:  # noqa: BLE001  the top of the program: a bug of ours
        show_bug(error)
        return ProvisionerError.exit_code
    return code if isinstance(code, int) else 0


@click.group(
    cls=Program,
    table=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 2 request, 3 retry later, 4 operator, 5 trust, "
    "70 bug, 78 configuration.",
)
@click.version_option(package_name="provisioner", message="%(version)s", help="Show the version.")
def main() -> None:
    """Rebuilds bare-metal servers from signed golden images, and never patches them."""
