"""Runs commands of `provisioner` against a whole service behind a real API."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from click.testing import CliRunner, Result
from flask import request

from provisioner.cli.main import main
from provisioner.web.api import create_app
from tests.parts.http_listener import listening
from tests.parts.service_site import ACTOR, Site


@dataclass
class Cli:
    """Runs command lines against one service. `asked` are the paths of all requests so far,
    in order."""

    url: str
    token: str
    asked: list[str] = field(default_factory=list)

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
    app, asked = create_app(site), list[str]()

    @app.before_request
    def note() -> None:
        asked.append(request.path)

    with listening(app) as url:
        yield Cli(url, token.reveal(), asked)
