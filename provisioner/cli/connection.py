"""Which service a command talks to: options, environment, or a context file.

A token comes from a file, the environment or a context, never from the arguments, which
every user of the machine can read.
"""

import functools
import os
import stat
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from provisioner.core.model import Secret
from provisioner.errors import ConfigError

from .given_files import read_text

if TYPE_CHECKING:
    from provisioner.client import Client

CLIENT_FILE: Final = "client.toml"
CONTEXTS_FILE: Final = "~/.config/provisioner/contexts.toml"
SYSTEM_FILE: Final = f"/etc/provisioner/{CLIENT_FILE}"
OBSERVES: Final = (
    "OBSERVE ONLY: the service's database is older than its hosts, and nothing is done; "
    "see `provisioner reconcile --plan`"
)
FILE_BYTES_MAX: Final = 65536
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Asked:
    """What the options said about the connection."""

    url: str | None
    token_file: str | None
    config: Path | None
    context: str | None


def connected(command: F) -> F:
    """Add the connection's options to a command, and hand it an open `client` first."""

    @functools.wraps(command)
    def run(
        *args: Any,
        url: str | None,
        token_file: str | None,
        config: Path | None,
        context: str | None,
        **kwargs: Any,
    ) -> Any:
        with open_client(Asked(url, token_file, config, context)) as client:
            try:
                return command(client, *args, **kwargs)
            finally:
                if client.only_observes:
                    click.echo(OBSERVES, err=True)

    options = [
        click.option("--url", envvar="PROVISIONER_URL", metavar="URL", help="The service's API."),
        click.option(
            "--token-file", metavar="FILE", help="File with the API token; - is standard input."
        ),
        click.option(
            "--config",
            envvar="PROVISIONER_CONFIG",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="provisioner.toml; the client.toml beside it is used.",
        ),
        click.option("--context", metavar="NAME", help=f"Section of {CONTEXTS_FILE}."),
    ]
    wrapped: Any = run
    for option in reversed(options):
        wrapped = option(wrapped)
    result: F = wrapped
    return result


def open_client(asked: Asked) -> "Client":
    """Return a client. Raises ConfigError when no service, or no token, is named anywhere."""
    from provisioner.client import Client

    url, token = _given(asked)
    if url is None or token is None:
        found = _from_files(asked)
        if url is not None and found[0] is not None and not _is_same(url, found[0]):
            raise ConfigError(
                f"there is no API token for {url}",
                expected="PROVISIONER_TOKEN or --token-file",
                found=f"one for {found[0]}, which nobody else is shown",
            )
        url, token = url or found[0], token or found[1]
    if url is None or token is None:
        raise ConfigError(
            "no service is named" if url is None else "no API token is named",
            expected=f"--config FILE, ./{CLIENT_FILE}, {SYSTEM_FILE}, {CONTEXTS_FILE}, "
            "or PROVISIONER_URL and PROVISIONER_TOKEN",
            hint="`provisioner init` wrote a client.toml beside provisioner.toml",
        )
    return Client(url, token)


def _is_same(url: str, other: str) -> bool:
    return url.rstrip("/").lower() == other.rstrip("/").lower()


def _given(asked: Asked) -> tuple[str | None, Secret | None]:
    if asked.token_file is not None:
        return asked.url, Secret(read_text(asked.token_file, FILE_BYTES_MAX).strip())
    token = os.environ.get("PROVISIONER_TOKEN")
    return asked.url, Secret(token) if token else None


def _from_files(asked: Asked) -> tuple[str | None, Secret | None]:
    if asked.context is not None:
        return _named_context(Path(CONTEXTS_FILE).expanduser(), asked.context)
    if asked.config is not None:
        place = asked.config if asked.config.is_dir() else asked.config.parent
        return _context(_read(place / CLIENT_FILE), place / CLIENT_FILE)
    for path in (Path(CLIENT_FILE), Path(SYSTEM_FILE)):
        if path.is_file():
            return _context(_read(path), path)
    contexts = Path(CONTEXTS_FILE).expanduser()
    return _named_context(contexts, None) if contexts.is_file() else (None, None)


def _named_context(path: Path, name: str | None) -> tuple[str | None, Secret | None]:
    """Return a section of the contexts file: `name`, or the one that `current` names."""
    content = _read(path)
    chosen = name or content.get("current")
    section = content.get(chosen) if isinstance(chosen, str) else None
    if not isinstance(section, dict):
        known = [key for key, value in content.items() if isinstance(value, dict)]
        raise ConfigError(f"{path} has no context {chosen}", expected=known, found=chosen)
    return _context(section, path)


def _context(section: dict[str, Any], path: Path) -> tuple[str | None, Secret | None]:
    url, token = section.get("url"), section.get("token")
    if not isinstance(url, str) or not isinstance(token, str):
        raise ConfigError(f"{path} is not a context", expected='url = "…" and token = "…"')
    return url, Secret(token)


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            about = os.fstat(file.fileno())
            if about.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise ConfigError(
                    f"{path} holds a token and others may read it",
                    found=f"mode {stat.S_IMODE(about.st_mode):04o}",
                    hint=f"chmod 600 {path}",
                )
            if about.st_uid not in (0, os.geteuid()):
                raise ConfigError(f"{path} belongs to another user", found=about.st_uid)
            return tomllib.loads(file.read(FILE_BYTES_MAX).decode())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
