"""A hello whose answer was lost: the same ramdisk is answered anew, and nobody else."""

from typing import Any

import pytest

from provisioner.core.model import Phase
from provisioner.errors import RequestError
from provisioner.service.agents import TicketRefused, TokenRefused
from provisioner.service.identity import TicketContested
from tests.parts.service_site import ACTOR, GATEWAY, Agent, Site, inventory

SESSION, OTHER = "5e" * 32, "07" * 32


def hello(agent: Agent, session: str | None, attempt: int = 1) -> dict[str, Any]:
    """Say hello in a session; the agent keeps what it is told."""
    body: dict[str, Any] = {"ticket": agent.ticket, "inventory": agent.inventory}
    body |= {"attempt": attempt} | ({"session": session} if session is not None else {})
    told = agent.site.agents.hello(body, GATEWAY)
    agent.token, agent.generation = told["token"], told["generation"]
    agent.release = told["release"]
    return told


@pytest.fixture
def ramdisk(agent: Agent) -> Agent:
    """The agent, which has its ticket and has said hello to no effect."""
    agent.boots()
    hello(agent, SESSION)
    return agent


def test_the_same_session_is_answered_anew_with_another_token(ramdisk: Agent) -> None:
    lost = ramdisk.token
    again = hello(ramdisk, SESSION, 2)
    assert again["token"] != lost
    assert again["operation"] == ramdisk.operation().id
    assert ramdisk.authorise()["permitted"] is True
    ramdisk.seed()
    ramdisk.done()
    ramdisk.token = lost
    with pytest.raises(TokenRefused):
        ramdisk.progress()


def test_an_answer_may_be_lost_several_times(ramdisk: Agent) -> None:
    for attempt in range(2, 6):
        hello(ramdisk, SESSION, attempt)
    assert ramdisk.authorise()["permitted"] is True


@pytest.mark.parametrize("session", [OTHER, None])
def test_another_session_with_the_ticket_ends_it_for_both(
    site: Site, ramdisk: Agent, session: str | None
) -> None:
    token = ramdisk.token
    with pytest.raises(TicketContested):
        hello(ramdisk, session, 2)
    assert ramdisk.operation().phase is Phase.FAILED
    ramdisk.token = token
    with pytest.raises(TokenRefused):
        ramdisk.authorise()
    assert "ticket_contested" in {row.action for row in site.audit.rows()}


def test_a_ticket_used_without_a_session_is_never_answered_again(agent: Agent) -> None:
    agent.boots()
    hello(agent, None)
    with pytest.raises(TicketContested):
        hello(agent, SESSION, 2)
    with pytest.raises(TicketRefused, match="used already"):
        hello(agent, None, 2)


def test_nothing_is_answered_again_once_writing_was_permitted(ramdisk: Agent) -> None:
    ramdisk.authorise()
    with pytest.raises(TicketRefused, match="used already"):
        hello(ramdisk, SESSION, 2)
    assert ramdisk.progress() == {"go_on": True}


def test_a_try_that_was_overtaken_takes_no_token_away(ramdisk: Agent) -> None:
    """The service was slow; what it reads last is what was sent first."""
    hello(ramdisk, SESSION, 3)
    token = ramdisk.token
    for attempt in (2, 3):
        with pytest.raises(TicketRefused):
            hello(ramdisk, SESSION, attempt)
    ramdisk.token = token
    assert ramdisk.authorise()["permitted"] is True


def test_the_session_alone_does_not_make_it_the_host(ramdisk: Agent) -> None:
    ramdisk.inventory = inventory(2)
    with pytest.raises(TicketContested) as caught:
        hello(ramdisk, SESSION, 2)
    assert "another host" in str(caught.value.found)
    assert ramdisk.operation().phase is Phase.FAILED


def test_a_session_does_not_make_its_inventory_fit_what_it_was_told(ramdisk: Agent) -> None:
    """The answer to the hello names the disk that is wanted: too late to have it."""
    found = dict(ramdisk.inventory)
    ramdisk.inventory = {**found, "disks": [{**found["disks"][0], "serial": "AS-WANTED"}]}
    with pytest.raises(TicketContested) as caught:
        hello(ramdisk, SESSION, 2)
    assert "another inventory" in str(caught.value.found)
    assert ramdisk.operation().phase is Phase.FAILED


def test_a_cancelled_operation_is_not_opened_again(site: Site, ramdisk: Agent) -> None:
    site.operations.cancel(ramdisk.operation().id, actor=ACTOR)
    with pytest.raises(TicketRefused):
        hello(ramdisk, SESSION, 2)
    assert ramdisk.operation().phase is Phase.CANCELLED


def test_a_session_of_an_earlier_operation_opens_no_later_one(site: Site, ramdisk: Agent) -> None:
    old_ticket = ramdisk.ticket
    ramdisk.failed()
    site.deploy("r1n1")
    site.perform()
    ramdisk.boots()
    hello(ramdisk, OTHER)
    ramdisk.ticket = old_ticket
    with pytest.raises(TicketRefused):
        hello(ramdisk, SESSION, 2)


def test_only_the_hash_of_a_session_is_kept(site: Site, ramdisk: Agent) -> None:
    hello(ramdisk, SESSION, 2)
    assert SESSION not in site.texts()
    assert SESSION not in str(ramdisk.operation())


@pytest.mark.parametrize(
    "wrong",
    [{"session": ""}, {"session": "a" * 63}, {"session": 5}, {"attempt": 0}, {"attempt": "1"}],
    ids=str,
)
def test_a_session_that_is_none_is_refused(agent: Agent, wrong: dict[str, Any]) -> None:
    agent.boots()
    body = {"ticket": agent.ticket, "inventory": agent.inventory, **wrong}
    with pytest.raises(RequestError):
        agent.site.agents.hello(body, GATEWAY)
    assert hello(agent, SESSION)["host"] == "r1n1"
