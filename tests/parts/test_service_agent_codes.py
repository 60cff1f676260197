"""What an agent reports as its failure's code: what only the service can know, it cannot say."""

import pytest

from provisioner.agent import problems
from provisioner.core.disks import NoDiskMatches, SeveralDisksMatch
from provisioner.core.model import Phase
from provisioner.core.recovery import FAILURES, NOT_AN_AGENTS
from provisioner.errors import ProvisionerError, TrustError
from tests.parts.recovery_site import (
    fail,
    follow,
    request,
    running,
    what,
    with_a_profile_that_proves,
)
from tests.parts.service_site import Agent, Site


def agents_codes() -> set[str]:
    """Return the codes that our agent reports."""
    kinds = [one for one in vars(problems).values() if isinstance(one, type)]
    own = {one.code for one in kinds if issubclass(one, ProvisionerError)}
    return own | {TrustError.code, NoDiskMatches.code, SeveralDisksMatch.code}


def test_every_code_with_a_rule_of_its_own_is_an_agents_or_the_services() -> None:
    assert agents_codes().isdisjoint(NOT_AN_AGENTS)
    assert set(FAILURES) <= agents_codes() | NOT_AN_AGENTS


@pytest.mark.parametrize("code", sorted(NOT_AN_AGENTS))
def test_what_only_the_service_can_know_is_kept_as_what_an_agent_said(
    site: Site, code: str
) -> None:
    site.add_host()
    site.deploy("r1n1")
    site.perform()
    agent = Agent(site).until(Phase.PREPARING)
    agent.failed(code)
    error = agent.operation().error
    assert error is not None
    assert error["code"] == "agent"
    assert error["message"].startswith(f"the agent reported {code}: ")


@pytest.mark.parametrize("code", ["database_restored", "bmc_auth_failed", "ticket_contested"])
def test_no_agent_talks_its_host_out_of_what_follows(site: Site, code: str) -> None:
    """Half its disk is written: it is tried again, and taken back, and put aside."""
    with_a_profile_that_proves(site)
    running(site)
    first = fail(site, request(site, "tiny@2", attempts=2), code=code)
    assert what(first) == ("retry", "waiting")
    second = fail(site, follow(site, first), code=code)
    assert what(second) == ("rollback", "waiting")
    back = fail(site, follow(site, second), code=code)
    assert what(back) == ("quarantine", "done")
    assert not site.bmc().is_on
