"""The command `provisioner`: finds the command to run, and turns errors into messages and
exit codes. Imports no library but click, so that help comes at once."""

import sys
from typing import Final, NoReturn

import click

from provisioner.errors import ProvisionerError

from .lazy import Lazy, LazyGroup
from .messages import show_bug, show_error

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
    "audit": Lazy(f"{_CLI}.audit:audit", "Show and verify the audit log."),
    "token": Lazy(f"{_CLI}.token:token", "Create, list and revoke API tokens."),
    "ramdisk": Lazy(f"{_CLI}.ramdisk:ramdisk", "Build and show deploy ramdisks."),
    "dhcp-config": Lazy(f"{_CLI}.dhcp:dhcp_config", "Print what the site's own DHCP server needs."),
    "lab": Lazy(f"{_CLI}.lab:lab", "Run a rack of virtual hosts that behave like hardware."),
}


@click.group(
    cls=LazyGroup,
    table=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 2 request, 3 retry later, 4 operator, 5 trust, "
    "70 bug, 78 configuration.",
)
@click.version_option(package_name="provisioner", message="%(version)s")
def cli() -> None:
    """Rebuilds bare-metal servers from signed golden images, and never patches them."""


def main() -> NoReturn:
    """Run the command line and leave with an exit code that says who must act."""
    sys.exit(run())


def run(args: list[str] | None = None) -> int:
    """Run one command line; return its exit code."""
    try:
        code = cli.main(args, prog_name="provisioner", standalone_mode=False)
    except ProvisionerError as error:
        show_error(error)
        return error.exit_code
    except click.exceptions.Abort:
        click.echo("interrupted", err=True)
        return INTERRUPTED
    except click.ClickException as error:
        error.show()
        return USAGE
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough.
        sys.stdout = None  # nothing is left to flush
        return 0
    except Exception as error:  # noqa: BLE001  the top of the program: a bug of ours
        show_bug(error)
        return ProvisionerError.exit_code
    return code if isinstance(code, int) else 0
