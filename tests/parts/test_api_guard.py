"""What the guard keeps waiting, and the breaker, as operators see them: API and command line."""

import threading
from collections.abc import Iterator

import pytest

from provisioner.client import Client
from provisioner.core.model import Phase
from provisioner.core.own_host import OwnHost
from provisioner.errors import Conflict, ProvisionerError, RequestError
from provisioner.web.api import create_app
from tests.parts.command_line import Cli, commands_of
from tests.parts.http_listener import listening
from tests.parts.service_site import ACTOR, Agent, Site, mac

BREAKER = pytest.mark.rules(in_flight_max=1, breaker_hosts_max=1)


@pytest.fixture
def client(site: Site) -> Iterator[Client]:
    token = site.tokens.create("admin", "admin", expires_in=None, actor=ACTOR)
    stopping = threading.Event()
    with (
        listening(create_app(site, stopping=stopping)) as url,
        Client(url, token, pause=lambda _: None) as client,
    ):
        yield client
        stopping.set()


@pytest.fixture
def cli(site: Site) -> Iterator[Cli]:
    with commands_of(site) as cli:
        yield cli


def fail_one(site: Site) -> None:
    site.add_host(1)
    site.deploy("r1n1")
    site.perform()
    Agent(site).until(Phase.PREPARING).failed()


@BREAKER
def test_an_open_breaker_is_shown_and_closed_by_the_api(client: Client, site: Site) -> None:
    assert client.breaker()["is_open"] is False
    fail_one(site)
    shown = client.breaker()
    assert (shown["is_open"], shown["closed_at"]) == (True, None)
    site.add_host(2)
    (queued,) = client.deploy(["r1n2"], "tiny@1")
    assert "provisioner breaker close" in queued["waits"]
    assert client.operation(queued["id"])["waits"] == queued["waits"]
    with pytest.raises(RequestError):
        client.close_breaker("")
    closed = client.close_breaker("looked at it")
    assert (closed["is_open"], closed["closed_reason"]) == (False, "looked at it")
    assert closed["closed_by"] == "token:admin"
    with pytest.raises(Conflict):
        client.close_breaker("again")
    assert client.operation(queued["id"])["waits"] is None
    site.worker.start_queued()
    assert client.operation(queued["id"])["started_at"] is not None


@BREAKER
def test_the_breaker_on_the_command_line(cli: Cli, site: Site) -> None:
    assert "is open:" in cli("breaker", "show").stdout
    assert "closed" in cli("breaker", "close", "--reason", "x", exit_code=2).stderr
    fail_one(site)
    assert "on so many hosts: 1" in cli("breaker", "show").stdout
    assert "--reason" in cli("breaker", "close", exit_code=2).stderr
    done = cli("breaker", "close", "--reason", "a bad switch")
    assert "on so many hosts: 1" in done.stdout
    assert site.breakers.show().closed_reason == "a bad switch"


@BREAKER
def test_operation_show_says_what_an_operation_waits_for(cli: Cli, site: Site) -> None:
    for number in (1, 2):
        site.add_host(number)
        site.deploy(f"r1n{number}")
        site.clock.pass_(1)
    waiting = site.operations.list("r1n2")[0]
    assert "deployments_in_flight_max 1" in cli("operation", "show", waiting.id).stdout
    assert "in flight" in cli("operation", "list", "-o", "wide").stdout
    assert "waits: " in cli("host", "events", "r1n2").stdout


def test_public_the_services_own_host_is_refused_over_http(client: Client, site: Site) -> None:
    site.add_host(1)
    site.transitions.guard.own = OwnHost(macs=frozenset({mac(1)}))
    with pytest.raises(ProvisionerError) as caught:
        client.deploy(["r1n1"], "tiny@1")
    assert (caught.value.code, caught.value.host) == ("own_host", "r1n1")
    assert client.operations() == []
