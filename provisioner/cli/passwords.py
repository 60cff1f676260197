"""The options that say where a BMC is, and its password: from a file, standard input or a prompt,
never from the arguments, which every user of the machine can read."""

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from provisioner.errors import RequestError

from .given_files import read_text

F = TypeVar("F", bound=Callable[..., Any])
PASSWORD_CHARACTERS_MAX = 128
IPMI_PORT = 623


def read_password(file: str | None, what: str) -> str:
    """Return the first line of `file` (- is standard input), or what is typed at a prompt.

    Raises RequestError when there is nothing to read, or nobody to ask.
    """
    if file is not None:
        password = read_text(file, PASSWORD_CHARACTERS_MAX + 2, only_line=True).rstrip("\r\n")
    elif sys.stdin.isatty():
        password = str(click.prompt(f"Password of {what}", hide_input=True))
    else:
        raise RequestError(
            f"no password of {what} was given",
            hint="--bmc-password-file FILE, or - for standard input",
        )
    if not password or len(password) > PASSWORD_CHARACTERS_MAX:
        raise RequestError(
            f"the password of {what} is not usable",
            expected=f"1 to {PASSWORD_CHARACTERS_MAX} characters on the first line",
        )
    return password


def bmc_options(command: F) -> F:
    """Add `--bmc`, `--bmc-user` and `--bmc-password-file`, which `bmc_of` takes."""
    options = (
        click.option("--bmc", metavar="ADDRESS[:PORT]", help="Where its BMC answers IPMI."),
        click.option("--bmc-user", metavar="USER", help="Whom the BMC knows."),
        click.option(
            "--bmc-password-file",
            metavar="FILE",
            help="File with the BMC's password; - is standard input. Default: a prompt.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def bmc_of(
    address: str | None,
    user: str | None,
    password_file: str | None,
    host: str,
    known: Callable[[], dict[str, Any] | None] = lambda: None,
) -> dict[str, Any] | None:
    """Return the BMC as the API takes it, from the options; None when none was given. Credentials
    without an address are for the one that is `known`, which is asked only then."""
    if address is not None:
        place, port = _split(address, host)
    elif user is None and password_file is None:
        return None
    elif (there := known()) is not None:
        place, port, user = there["address"], there["port"], user or there["user"]
    else:
        raise RequestError(
            "BMC credentials without a BMC", host=host, expected="--bmc ADDRESS[:PORT]"
        )
    if user is None:
        raise RequestError("a BMC needs a user", host=host, expected="--bmc-user NAME")
    password = read_password(password_file, f"the BMC {place}")
    return {"address": place, "port": port, "user": user, "password": password}


def _split(text: str, host: str) -> tuple[str, int]:
    from provisioner.setting_types import Wrong, listen

    if text.count(":") > 1 and not text.startswith("["):
        return text, IPMI_PORT  # an IPv6 address alone
    try:
        parsed = listen(text if ":" in text.rsplit("]", 1)[-1] else f"{text}:{IPMI_PORT}")
    except Wrong as wrong:
        raise RequestError(
            "that is not a BMC's address",
            host=host,
            expected="an IP address, and a port where it is not 623",
            found=text,
        ) from wrong
    return parsed.host, parsed.port
