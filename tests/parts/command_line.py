"""Runs commands of `provisioner` against a whole service behind a real API."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from click.testing import CliRunner, Result

from provisioner.cli.main import main
from provisioner.web.api import create_app
from tests.parts.http_listener import listening
from tests.parts.service_site import ACTOR, Site


@dataclass
class Cli:
    """Runs command lines against one service."""

    url: str
    token: str

    def __call__(self, *arguments: str, exit_code: int = 0, stdin: str | None = None) -> Result:
        environment = {"PROVISIONER_URL": self.url, "PROVISIONER_TOKEN": self.token}
        done = CliRunner().invoke(main, arguments, input=stdin, env=environment)
        assert done.exit_code == exit_code, f"{done.stdout}{done.stderr}{done.exception}"
        return done

    def json(self, *arguments: str) -> Any:
        return json.loads(self(*arguments, "-o", "json").stdout)


@contextmanager
def commands_of(site: Site) -> Iterator[Cli]:
    """Yield the commands as an admin of the site runs them."""
    token = site.tokens.create("admin", "admin", expires_in=None, actor=ACTOR)
    with listening(create_app(site)) as url:
        yield Cli(url, token.reveal())
