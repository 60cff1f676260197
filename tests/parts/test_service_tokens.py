"""Agent tokens, seeds and nonces: random or derived, kept as hashes, good for one operation, and
dead soon after nobody uses them."""

from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import pairwise
from typing import Any

import httpx
import pytest

from provisioner.core.bootplan import Ramdisk
from provisioner.core.model import Phase
from provisioner.errors import Gone, ProvisionerError, TrustError
from provisioner.service.agent_access import SERVICE_AWAY_MAX, TokenLifetime
from provisioner.service.agents import TokenRefused
from provisioner.service.chance import digest_of
from provisioner.web.agent import create_app
from tests.parts.http_listener import listening
from tests.parts.service_site import (
    ACTOR,
    PROFILE_SECRET,
    Agent,
    Site,
    inventory,
    mac,
    state_of,
    tamper,
)
from tests.parts.test_service_tickets import line_with

LIFETIME = TokenLifetime(timedelta(minutes=3)).lifetime
CALLS = ("authorise", "progress", "seed", "failed", "done")


def token_of(agent: Agent) -> timedelta:
    """Return how long the agent's token lives on."""
    with agent.site.store.read() as tx:
        token = tx.agent_token(digest_of(agent.token))
    assert token is not None
    return token.expires_at - agent.site.clock()


# --- the agent's token --------------------------------------------------------------------------


def test_a_token_that_is_not_used_dies_soon(site: Site, agent: Agent) -> None:
    agent.until(Phase.WRITING)
    site.clock.pass_((LIFETIME - timedelta(seconds=1)).total_seconds())
    agent.progress()
    site.clock.pass_(LIFETIME.total_seconds())
    for call in CALLS:
        with pytest.raises(TokenRefused, match="not valid"):
            getattr(agent, call)()


def test_a_token_in_use_lives_as_long_as_its_operation(site: Site, agent: Agent) -> None:
    agent.until(Phase.WRITING)
    for _ in range(100):
        site.clock.pass_(60)
        agent.progress()
        assert timedelta() < token_of(agent) <= LIFETIME
    agent.seed()
    agent.done()
    with pytest.raises(ProvisionerError):
        agent.progress()


def test_a_token_outlives_a_service_that_restarts(site: Site, agent: Agent) -> None:
    """The agent goes on for ten minutes without an answer, and is then taken for dead."""
    agent.until(Phase.WRITING)
    site.clock.pass_(SERVICE_AWAY_MAX.total_seconds())
    agent.progress()
    assert agent.authorise()["permitted"] is True


def test_a_token_is_not_written_anew_with_every_heartbeat(site: Site, agent: Agent) -> None:
    agent.until(Phase.WRITING)
    left = []
    for _ in range(10):
        site.clock.pass_(3)
        agent.progress()
        left.append(token_of(agent))
    assert all(before - after == timedelta(seconds=3) for before, after in pairwise(left))


def test_every_session_gets_another_token_of_which_the_hash_is_kept(site: Site) -> None:
    seen = set()
    for number in (1, 2):
        site.add_host(number)
        site.deploy(f"r1n{number}")
        site.perform()
        agent = Agent(site, number).boots()
        agent.hello()
        assert len(agent.token) >= 43
        seen.add(agent.token)
        assert agent.token not in site.texts()
    assert len(seen) == 2


ENDINGS: dict[str, Callable[[Site, Agent], object]] = {
    "cancelled": lambda site, agent: site.operations.cancel(agent.operation().id, actor=ACTOR),
    "revoked": lambda site, _: site.releases.revoke("tiny@1", "bad", actor=ACTOR),
    "timed out": lambda site, _: site.pass_(timedelta(minutes=4)),
}


@pytest.mark.parametrize("end", ENDINGS.values(), ids=ENDINGS)
def test_a_token_is_revoked_when_its_operation_ends(
    site: Site, agent: Agent, end: Callable[[Site, Agent], object]
) -> None:
    agent.until(Phase.PREPARING)
    end(site, agent)
    assert agent.operation().is_final
    with site.store.read() as tx:
        assert tx.agent_token(digest_of(agent.token)) is None
    for call in CALLS:
        with pytest.raises(TokenRefused):
            getattr(agent, call)()


def test_a_last_report_may_be_repeated_but_renews_nothing(site: Site, agent: Agent) -> None:
    agent.until(Phase.PREPARING)
    agent.failed()
    for _ in range(5):
        site.clock.pass_(120)
        agent.failed()
    site.clock.pass_((LIFETIME - timedelta(minutes=10)).total_seconds())
    with pytest.raises(TokenRefused):
        agent.failed()


def test_a_token_speaks_for_its_own_operation_only(site: Site, agent: Agent) -> None:
    agent.until(Phase.PREPARING)
    old = agent.token
    agent.failed()
    site.clock.pass_(1)
    site.deploy("r1n1")
    site.perform()
    agent.until(Phase.WRITING)
    agent.token = old
    for call in CALLS:
        with pytest.raises(TokenRefused):
            getattr(agent, call)()


# --- the seed, over HTTP --------------------------------------------------------------------------


@pytest.fixture
def url(site: Site) -> Iterator[str]:
    with listening(create_app(site)) as url:
        yield url


def begun(url: str, site: Site) -> Callable[..., httpx.Response]:
    """Go as far as WRITING over HTTP; return what makes further calls."""
    site.add_host()
    site.deploy("r1n1")
    site.perform()
    body = {"ticket": Agent(site).boots().ticket, "inventory": inventory()}
    told = httpx.post(f"{url}/agent/v1/hello", json=body, timeout=60).json()

    def say(call: str, **more: Any) -> httpx.Response:
        return httpx.post(
            f"{url}/agent/v1/{call}",
            json={"generation": told["generation"], **more},
            headers={"Authorization": f"Bearer {told['token']}"},
            timeout=60,
        )

    disk = {"name": "vda", "serial": "LAB-r1n1-0", "wwn": None, "size_bytes": 8 * 1024**3}
    assert say("authorise", release=told["release"], disk=disk).is_success
    return say


def test_field_20_the_seed_leaves_once_and_a_second_request_is_seen(url: str, site: Site) -> None:
    """Any machine could read another's configuration, with its credentials."""
    say = begun(url, site)
    for call in ("seed", "progress", "authorise"):
        assert httpx.post(f"{url}/agent/v1/{call}", json={"generation": 1}).status_code == 401
    first, second = say("seed"), say("seed")
    assert PROFILE_SECRET in first.json()["user-data"]
    assert (second.status_code, second.json()["code"]) == (410, "gone")
    assert PROFILE_SECRET not in second.text
    assert line_with(site, "seed asked for a second time, refused").source == "agent"
    actions = [row.action for row in site.audit.rows() if row.action.startswith("seed.")]
    assert actions == ["seed.taken", "seed.refused"]
    assert first.headers["Cache-Control"] == "no-store"


def test_a_seed_whose_answer_was_lost_ends_the_deployment(url: str, site: Site) -> None:
    """The agent is told 410, writes no partition table, and says so: nothing boots half."""
    say = begun(url, site)
    say("seed")
    assert say("seed").status_code == 410
    gone = {"code": "seed_gone", "message": "the seed did not arrive"}
    assert say("failed", **gone).is_success
    (operation,) = site.operations.list("r1n1")
    assert (operation.phase, (operation.error or {})["code"]) == (Phase.FAILED, "seed_gone")
    assert say("seed").status_code == 403


# --- from where it is used ----------------------------------------------------------------------

OWN, ELSEWHERE = "127.0.0.5", "127.0.0.6"


def calling(url: str, source: str, path: str, token: str = "", **body: Any) -> httpx.Response:
    """Call the agent listener from an address, as whoever has that address does."""
    with httpx.Client(transport=httpx.HTTPTransport(local_address=source)) as client:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return client.post(f"{url}/agent/v1/{path}", json=body, headers=headers)


def told_hello(url: str, site: Site) -> dict[str, Any]:
    """Let host r1n1 say hello from its own address."""
    site.add_host()
    site.deploy("r1n1")
    site.perform()
    plan = site.ask(source=OWN)
    assert isinstance(plan, Ramdisk), plan
    ticket = plan.ticket.reveal()
    answer = calling(url, OWN, "hello", ticket=ticket, inventory=inventory())
    assert answer.is_success, answer.text
    return dict(answer.json())


@pytest.mark.parametrize("call", [*CALLS, "compared"])
def test_public_a_stolen_token_is_refused_where_our_dhcp_gives_the_address(
    url: str, site: Site, call: str
) -> None:
    site.leases[mac(1)] = frozenset({OWN})
    told = told_hello(url, site)
    disk = {"name": "vda", "serial": "LAB-r1n1-0", "wwn": None, "size_bytes": 8 * 1024**3}
    counts = dict.fromkeys(("written_bytes", "fetched_bytes", "compared_chunks"), 1)
    counts |= {"differing_chunks": 0, "differing_bytes": 0, "generation": told["generation"]}
    said = {"release": told["release"], "disk": disk, "seconds": {}, "code": "x", "message": "m"}
    before = state_of(site)
    refused = calling(url, ELSEWHERE, call, told["token"], **counts, **said)
    assert (refused.status_code, refused.json()["code"]) == (403, "token_refused")
    assert state_of(site) == before
    line = line_with(site, "agent token refused")
    assert ELSEWHERE in line.text
    assert line.host_id == site.hosts.show("r1n1").id
    own = calling(url, OWN, "authorise", told["token"], **counts, **said)
    assert own.json()["permitted"] is True


def test_where_others_give_out_addresses_a_token_may_move(url: str, site: Site) -> None:
    told = told_hello(url, site)
    said = {"generation": told["generation"], "done_bytes": 1}
    assert calling(url, ELSEWHERE, "progress", told["token"], **said).is_success


# --- the reporter's nonce -------------------------------------------------------------------------


def test_a_nonce_dies_with_its_deployment(site: Site, agent: Agent) -> None:
    agent.until(Phase.PROVING)
    assert agent.phone_home() == {"accepted": True, "ask_again": True}
    tamper(site, "UPDATE operations SET phase = 'succeeded'")
    before = agent.operation()
    with pytest.raises(Gone) as caught:
        agent.phone_home(release_id="another")
    assert caught.value.status == 410
    assert agent.operation() == before
    assert "refused" in line_with(site, "a nonce came back").text


@pytest.mark.parametrize("phase", [Phase.BOOTING, Phase.PROVING])
def test_a_nonce_of_a_failed_deployment_revives_nothing(
    site: Site, agent: Agent, phase: Phase
) -> None:
    agent.until(phase)
    site.pass_(timedelta(hours=1))
    assert agent.operation().phase is Phase.FAILED
    with pytest.raises(Gone):
        agent.phone_home()
    assert agent.operation().phase is Phase.FAILED


def test_a_nonce_is_of_one_operation_and_generation(site: Site, agent: Agent) -> None:
    agent.until(Phase.BOOTING)
    operation = agent.operation()
    for generation in (operation.generation - 1, operation.generation + 1):
        nonce = site.derived.nonce(operation.id, generation).reveal()
        with pytest.raises(TrustError):
            agent.phone_home(nonce=nonce)
    for secret in (agent.token, agent.ticket, f"{operation.id}.{agent.token}"):
        with pytest.raises(TrustError):
            agent.phone_home(nonce=secret)
    assert agent.phone_home() == {"accepted": True, "ask_again": True}
