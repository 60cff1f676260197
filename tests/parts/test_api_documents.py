"""The pages about commands, routes and errors say what the program does."""

import re
from pathlib import Path

from provisioner.cli.watch import LATER_CODES, TRUST_CODES
from provisioner.errors import ProvisionerError, TrustError
from provisioner.web.api import create_app
from tests import cli_page
from tests.parts.service_site import Site
from tests.test_house_rules import error_codes

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_of_commands_is_that_of_the_commands() -> None:
    assert cli_page.PAGE.read_text() == cli_page.page(), "run python -m tests.cli_page"


def test_every_route_stands_on_its_page(site: Site) -> None:
    text = (DOCS / "api.md").read_text()
    for rule in create_app(site).url_map.iter_rules():
        path = re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule)
        for method in sorted((rule.methods or set()) - {"HEAD", "OPTIONS"}):
            assert f"`{method} {path}`" in text, f"docs/api.md lacks {method} {path}"


def test_an_operation_that_lacked_proof_ends_with_the_code_of_security() -> None:
    error_codes()  # imports every room, and so every class

    def below(kind: type[ProvisionerError]) -> set[str]:
        return {kind.code}.union(*(below(child) for child in kind.__subclasses__()))

    # What only the operator API says ends no operation.
    assert below(TrustError) - {"not_authenticated", "role_refused"} <= TRUST_CODES
    assert not TRUST_CODES & LATER_CODES
