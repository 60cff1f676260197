"""The operator API by real HTTP over a real database, through our own client."""

import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import httpx
import pytest

from provisioner.client import Client
from provisioner.core.model import Phase
from provisioner.errors import (
    BmcUnreachable,
    Conflict,
    NotFound,
    ProvisionerError,
    RequestError,
    TrustError,
    Unavailable,
)
from provisioner.service.tokens import ROLES
from provisioner.web.api import create_app
from provisioner.web.api.auth import MAY, Verb
from provisioner.web.api.operations import STREAMS_MAX
from tests.parts.fake_bmc import FakeBmc
from tests.parts.http_listener import listening
from tests.parts.service_site import (
    ACTOR,
    BMC_PASSWORD,
    PROFILE_SECRET,
    Agent,
    Site,
    mac,
    profile_document,
    tamper,
)

BMC = {"address": "127.0.1.1", "user": "admin", "password": BMC_PASSWORD}
SPEC = {
    "name": "r1n1",
    "macs": [mac(1)],
    "bmc": BMC,
    "profile": "web",
    "labels": {"rack": "r1"},
}


@pytest.fixture
def url(site: Site) -> Iterator[str]:
    stopping = threading.Event()
    with listening(create_app(site, stopping=stopping)) as url:
        yield url
        stopping.set()


def token_for(site: Site, role: str) -> str:
    return site.tokens.create(role, role, expires_in=None, actor=ACTOR).reveal()


@pytest.fixture
def client(site: Site, url: str) -> Iterator[Client]:
    with Client(url, token_for(site, "admin"), pause=lambda _: None) as client:
        yield client


def test_a_host_comes_in_and_its_password_never_goes_out(
    client: Client, url: str, site: Site
) -> None:
    client.add_host(SPEC)
    shown = client.host("r1n1")
    assert shown["bmc"] == {"address": "127.0.1.1", "port": 623, "user": "admin"}
    assert shown["labels"] == {"rack": "r1"}
    assert client.hosts()[0]["name"] == "r1n1"
    assert site.hosts.show("r1n1").bmc is not None
    headers = {"Authorization": f"Bearer {token_for(site, 'viewer')}"}
    for path in ("/hosts", "/hosts/r1n1", "/audit", "/hosts/r1n1/events"):
        answer = httpx.get(f"{url}/api/v1{path}", headers=headers, timeout=60)
        assert answer.is_success
        assert BMC_PASSWORD not in answer.text


def test_hosts_are_imported_all_or_none(client: Client) -> None:
    twin = {**SPEC, "name": "r1n2"}
    with pytest.raises(Conflict):
        client.import_hosts([SPEC, twin])
    assert client.hosts() == []
    same_bmc = {**SPEC, "name": "r1n2", "macs": [mac(2)]}
    with pytest.raises(Conflict, match="that of r1n1"):
        client.import_hosts([SPEC, same_bmc])
    assert client.hosts() == []
    other = {**same_bmc, "bmc": {**BMC, "address": "127.0.1.2"}}
    assert len(client.import_hosts([SPEC, other])) == 2


def test_hosts_are_listed_page_by_page(client: Client, site: Site, url: str) -> None:
    for number in range(1, 6):
        site.add_host(number)
    headers = {"Authorization": f"Bearer {token_for(site, 'viewer')}"}
    page = httpx.get(f"{url}/api/v1/hosts?limit=2&after=r1n2", headers=headers, timeout=60).json()
    assert [host["name"] for host in page["hosts"]] == ["r1n3", "r1n4"]
    assert page["next"] == "r1n4"
    assert len(client.hosts()) == 5


def test_flags_change_only_what_is_given(client: Client, site: Site) -> None:
    site.add_host()
    client.set_flags("r1n1", is_protected=True)
    shown = client.set_flags("r1n1", in_maintenance=True)
    assert shown["is_protected"] is True
    assert shown["in_maintenance"] is True
    with pytest.raises(Conflict) as caught:
        client.deploy(["r1n1"], "tiny@1")
    assert caught.value.host == "r1n1"
    assert caught.value.found == "it is in maintenance"


def test_a_change_keeps_the_rest(client: Client) -> None:
    client.add_host(SPEC)
    shown = client.change_host("r1n1", {"local_boot": "sanboot"})
    assert (shown["local_boot"], shown["profile"]) == ("sanboot", "web")
    client.delete_host("r1n1")
    with pytest.raises(NotFound):
        client.host("r1n1")


def test_power_reaches_the_bmc(client: Client, site: Site) -> None:
    site.add_host()
    assert client.power("r1n1", "status") == "on"
    assert client.power("r1n1", "off") is None
    assert client.power("r1n1", "status") == "off"


def test_a_silent_bmc_is_its_own_error_at_the_other_end(client: Client, site: Site) -> None:
    site.add_host()
    site.pool.bmcs["127.0.1.1"] = FakeBmc(is_silent=True)
    with pytest.raises(BmcUnreachable) as caught:
        client.power("r1n1", "status")
    assert caught.value.exit_code == 3


def test_a_deployment_is_requested_watched_and_cancelled(client: Client, site: Site) -> None:
    site.add_host(1)
    site.add_host(2)
    queued = client.deploy(["r1n1", "r1n2"], "tiny@1")
    assert [one["host"] for one in queued] == ["r1n1", "r1n2"]
    assert queued[0]["release_name"] == "tiny@1"
    ids = [one["id"] for one in queued]
    assert [one["id"] for one in client.operations_by_id(ids)] == ids
    assert client.host("r1n1")["operation"]["phase"] == "queued"
    assert client.cancel(ids[0])["phase"] == "cancelled"
    assert [one["id"] for one in client.operations(only_open=True)] == [ids[1]]
    assert [one["id"] for one in client.operations(host="r1n1")] == [ids[0]]
    with pytest.raises(Conflict, match="has already ended"):
        client.cancel(ids[0])


@pytest.mark.parametrize("hosts", [[], ["r1n1", "r1n9"], ["r1n1", "r1n1"]])
def test_a_wrong_selection_selects_nothing(client: Client, site: Site, hosts: list[str]) -> None:
    site.add_host()
    with pytest.raises(RequestError):
        client.deploy(hosts, "tiny@1")
    assert client.operations() == []


def test_no_route_takes_an_empty_name(client: Client) -> None:
    with pytest.raises(RequestError, match="that is not a name"):
        client.delete_host("")


def test_an_idempotency_key_carries_a_change_out_once(site: Site, url: str) -> None:
    site.add_host()
    headers = {
        "Authorization": f"Bearer {token_for(site, 'operator')}",
        "Idempotency-Key": "once",
    }
    body = {"hosts": ["r1n1"], "release": "tiny@1"}
    first = httpx.post(f"{url}/api/v1/deployments", json=body, headers=headers, timeout=60)
    again = httpx.post(f"{url}/api/v1/deployments", json=body, headers=headers, timeout=60)
    assert (first.status_code, again.status_code) == (202, 202)
    assert again.json() == first.json()
    assert again.headers["Idempotency-Replayed"] == "true"
    assert len(site.operations.list()) == 1
    other = httpx.post(
        f"{url}/api/v1/deployments", json={**body, "release": "tiny@2"}, headers=headers, timeout=60
    )
    assert other.status_code == 400
    without = {"Authorization": headers["Authorization"]}
    busy = httpx.post(f"{url}/api/v1/deployments", json=body, headers=without, timeout=60)
    assert (busy.status_code, busy.json()["code"]) == (409, "conflict")


@pytest.mark.parametrize("path", ["deployments", "verifications", "hosts/r1n1/inspect"])
def test_what_was_started_is_not_started_again_when_its_reply_was_not_kept(
    site: Site, url: str, path: str
) -> None:
    """Its sender got a 503 or nothing, and asks again: while it goes on, and when it is over."""
    site.add_host()
    body = {"hosts": ["r1n1"], "release": "tiny@1"} if "inspect" not in path else None
    headers = {"Authorization": f"Bearer {token_for(site, 'operator')}", "Idempotency-Key": "k"}

    def post(body: dict[str, Any] | None) -> httpx.Response:
        tamper(site, "DELETE FROM replies")
        return httpx.post(f"{url}/api/v1/{path}", json=body, headers=headers)

    def id_in(answer: httpx.Response) -> str:
        assert answer.status_code == 202, answer.text
        found = answer.json()
        return str(found["operations"][0]["id"] if "operations" in found else found["id"])

    first = id_in(post(body))
    assert id_in(post(body)) == first
    if body is not None:
        other = post({**body, "release": "tiny@2"})
        assert (other.status_code, other.json()["code"]) == (400, "request")
    site.operations.cancel(first, actor=ACTOR)
    assert id_in(post(body)) == first
    assert [one.id for one in site.operations.list("r1n1")] == [first]


def test_a_key_belongs_to_its_caller(site: Site, url: str) -> None:
    """Otherwise a viewer could read an operator's replies by guessing keys."""
    site.add_host()
    body = {"hosts": ["r1n1"], "release": "tiny@1"}
    for role, wanted in (("operator", 202), ("viewer", 403)):
        headers = {
            "Authorization": f"Bearer {token_for(site, role)}",
            "Idempotency-Key": "shared",
        }
        answer = httpx.post(f"{url}/api/v1/deployments", json=body, headers=headers, timeout=60)
        assert answer.status_code == wanted


def test_a_stream_tells_every_change_and_ends(client: Client, site: Site) -> None:
    site.add_host()
    operation = site.deploy("r1n1")
    phases = []
    for shown in client.follow(operation.id):
        phases.append(shown["phase"])
        if len(phases) == 1:
            site.operations.cancel(operation.id, actor=ACTOR)
    assert phases == ["netbooting", "cancelled"]


def test_streams_are_bounded(client: Client, site: Site) -> None:
    site.add_host()
    operation = site.deploy("r1n1")
    open_streams = [client.follow(operation.id) for _ in range(STREAMS_MAX)]
    for stream in open_streams:
        next(stream)
    with pytest.raises(Unavailable, match="streams are open already"):
        next(client.follow(operation.id))
    for stream in open_streams:
        stream.close()  # type: ignore[attr-defined]  # they are generators


def test_progress_and_evidence_are_shown(client: Client, site: Site) -> None:
    site.add_host()
    operation = site.deploy("r1n1")
    site.perform()
    agent = Agent(site).until(Phase.WRITING)
    agent.progress(done_bytes=3, total_bytes=10)
    shown = client.operation(operation.id)
    assert shown["phase"] == "writing"
    assert shown["progress"] == {"done_bytes": 3, "total_bytes": 10}
    assert shown["evidence"]["disk"]["serial"] == "LAB-r1n1-0"
    assert set(shown["phase_seconds"]) == {"queued", "netbooting", "preparing"}


def test_releases_and_profiles_are_shown_and_saved(client: Client, site: Site) -> None:
    assert [release["name"] for release in client.releases()] == ["tiny@1", "tiny@2"]
    digest = client.release("tiny@1")["digest"]
    assert client.release(digest[:8])["name"] == "tiny@1"
    document = client.profile("web")["document"]
    saved = client.save_profile("other", document)
    assert saved["document"] == document
    assert {one["name"] for one in client.profiles()} == {"web", "other"}
    client.delete_profile("other")
    with pytest.raises(RequestError, match="unknown key"):
        client.save_profile("other", {**document, "dsk": {}})
    site.add_host()
    with pytest.raises(Conflict, match="in use"):
        client.delete_profile("web")


def test_a_profile_that_does_not_open_is_listed_without_what_it_says(
    client: Client, site: Site
) -> None:
    document = client.profile("web")["document"]
    client.save_profile("other", document)
    tamper(site, "UPDATE profile_revisions SET sealed = X'0102' WHERE name = 'web'")
    listed = {one["name"]: one["document"] for one in client.profiles()}
    assert listed == {"other": document, "web": None}
    with pytest.raises(TrustError, match="profile web does not open") as caught:
        client.profile("web")
    assert caught.value.code == "profile_unreadable"
    assert client.save_profile("web", document)["document"] == document
    assert client.profile("web")["document"] == document


def test_the_audit_log_names_the_caller(client: Client) -> None:
    client.add_host(SPEC)
    rows = client.audit()
    assert rows[-1]["actor"] == "token:admin"
    assert (rows[-1]["action"], rows[-1]["subject"]) == ("host.added", "r1n1")
    assert client.verify_audit() == len(rows)
    assert client.audit(after=rows[-1]["number"]) == []


# --- who may do what ----------------------------------------------------------------------


def test_tokens_are_shown_once_expire_and_are_revoked(client: Client, site: Site, url: str) -> None:
    secret = client.create_token("ci", "viewer", expires_in_s=3600)
    assert secret.reveal() not in str(client.tokens())
    with Client(url, secret) as ci:
        assert ci.hosts() == []
        client.revoke_token("ci")
        with pytest.raises(TrustError) as caught:
            ci.hosts()
        assert (caught.value.code, caught.value.exit_code) == ("not_authenticated", 5)
    late = client.create_token("late", "viewer", expires_in_s=3600)
    site.clock.pass_(timedelta(hours=2).total_seconds())
    with Client(url, late) as ci, pytest.raises(TrustError, match="has expired"):
        ci.hosts()


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer wrong", "Basic YTpi"])
def test_without_a_good_token_nothing_is_told(url: str, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    answer = httpx.get(f"{url}/api/v1/hosts", headers=headers, timeout=60)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    assert answer.headers["Content-Type"] == "application/problem+json"


def test_every_route_says_what_its_caller_must_be_allowed(site: Site) -> None:
    """A route without a verb is refused to everyone; this one finds it sooner."""
    app = create_app(site)
    for rule in app.url_map.iter_rules():
        verb = getattr(app.view_functions[rule.endpoint], "needs", None)
        assert verb is not None, rule.rule
        methods = (rule.methods or set()) - {"HEAD", "OPTIONS"}
        if verb in (Verb.READ, Verb.PUBLIC):
            assert methods == {"GET"}, rule.rule
    assert set(MAY) == set(ROLES)


@pytest.mark.parametrize(
    ("role", "may"),
    [("viewer", []), ("operator", ["host"]), ("publisher", []), ("admin", ["host", "token"])],
)
def test_a_role_may_do_what_it_may(site: Site, url: str, role: str, may: list[str]) -> None:
    with Client(url, token_for(site, role)) as client:
        assert client.hosts() == []
        for name, change in (
            ("host", lambda: client.add_host(SPEC)),
            ("token", lambda: client.create_token("more", "viewer")),
        ):
            if name in may:
                change()
                continue
            with pytest.raises(TrustError) as caught:
                change()
            assert (caught.value.code, caught.value.status) == ("role_refused", 403)


@pytest.mark.parametrize("role", ["viewer", "publisher", "operator"])
def test_what_a_profile_holds_is_for_those_who_may_use_it(site: Site, url: str, role: str) -> None:
    may = role == "operator"
    site.profiles.save("web", profile_document(), actor=ACTOR)
    headers = {"Authorization": f"Bearer {token_for(site, role)}"}
    for path in ("/profiles", "/profiles/web"):
        answer = httpx.get(f"{url}/api/v1{path}", headers=headers, timeout=60)
        assert answer.status_code == (200 if may else 403)
        assert (PROFILE_SECRET in answer.text) == may


# --- refusals -----------------------------------------------------------------------------


def test_a_body_that_does_not_fit_names_the_field_and_not_its_value(site: Site, url: str) -> None:
    headers = {"Authorization": f"Bearer {token_for(site, 'admin')}"}
    bmc = {"address": "not an address", "user": "admin", "password": BMC_PASSWORD, "raw": 1}
    answer = httpx.post(
        f"{url}/api/v1/hosts",
        json={"name": "x", "macs": [], "bmc": bmc},
        headers=headers,
        timeout=60,
    )
    assert answer.status_code == 400
    problem = answer.json()
    for field in ("macs", "bmc.address", "bmc.raw"):
        assert field in problem["detail"]
    assert BMC_PASSWORD not in answer.text


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("POST", "/api/v1/hosts", b"{", 400),
        ("POST", "/api/v1/hosts", b"[]", 400),
        ("POST", "/api/v1/hosts", b"[" * 100_000, 400),
        ("GET", "/api/v1/hosts?limit=0", b"", 400),
        ("GET", "/api/v1/hosts?lmit=5", b"", 400),
        ("GET", "/api/v1/nothing", b"", 404),
        ("DELETE", "/api/v1/hosts", b"", 405),
        ("POST", "/api/v1/hosts/import", b" " * (8 * 1024 * 1024 + 1), 413),
    ],
)
def test_every_refusal_is_a_problem(
    site: Site, url: str, method: str, path: str, content: bytes, status: int
) -> None:
    headers = {
        "Authorization": f"Bearer {token_for(site, 'admin')}",
        "Content-Type": "application/json",
    }
    answer = httpx.request(method, url + path, content=content, headers=headers, timeout=60)
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.json()["status"] == status


def test_a_dead_service_is_worth_another_try() -> None:
    paused: list[float] = []
    with (
        Client("http://127.0.0.1:1", "t", pause=paused.append) as client,
        pytest.raises(Unavailable, match="does not answer") as caught,
    ):
        client.hosts()
    assert caught.value.exit_code == 3
    assert len(paused) == 2
    with (
        Client("http://127.0.0.1:1", "t", pause=paused.append) as client,
        pytest.raises(Unavailable),
    ):
        client.delete_host("r1n1")
    assert len(paused) == 2, "a change is sent once"


def test_something_else_at_the_url_is_said_so(site: Site) -> None:
    del site
    from flask import Flask

    with (
        listening(Flask("other", static_folder=None)) as url,
        Client(url, "t") as client,
        pytest.raises(ProvisionerError),
    ):
        client.hosts()


# --- what needs no token ------------------------------------------------------------------


def test_the_api_describes_itself(url: str) -> None:
    spec = httpx.get(f"{url}/openapi.json", timeout=60).json()
    assert spec["openapi"].startswith("3")
    assert "/api/v1/deployments" in spec["paths"]
    assert spec["security"] == [{"token": []}]
    assert "/openapi.json" in httpx.get(url, timeout=60).text


def test_metrics_count_and_measure(client: Client, site: Site, url: str) -> None:
    site.add_host(1)
    site.add_host(2)
    site.deploy("r1n1")
    client.hosts()
    text = httpx.get(f"{url}/metrics", timeout=60).text
    assert 'provisioner_operations{phase="netbooting"} 1.0' in text
    assert 'provisioner_hosts{state="enrolled"} 2.0' in text
    assert 'route="/api/v1/hosts",status="200"' in text
    assert httpx.get(f"{url}/healthz", timeout=60).json() == {"status": "ok"}
