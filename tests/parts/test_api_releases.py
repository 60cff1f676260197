"""Releases and channels in the operator API: shown, promoted, revoked, compared with disks."""

from collections.abc import Callable, Iterator

import httpx
import pytest

from provisioner.client import Client
from provisioner.core.manifest import FILES
from provisioner.errors import Conflict, NotFound, RequestError, TrustError
from provisioner.web.api import create_app
from tests.parts.http_listener import listening
from tests.parts.service_site import ACTOR, Site


@pytest.fixture
def url(site: Site) -> Iterator[str]:
    with listening(create_app(site)) as url:
        yield url


def token_for(site: Site, role: str) -> str:
    return site.tokens.create(role, role, expires_in=None, actor=ACTOR).reveal()


@pytest.fixture
def client(site: Site, url: str) -> Iterator[Client]:
    with Client(url, token_for(site, "publisher"), pause=lambda _: None) as client:
        yield client


@pytest.fixture
def operator(site: Site, url: str) -> Iterator[Client]:
    with Client(url, token_for(site, "operator"), pause=lambda _: None) as client:
        yield client


def test_a_release_tells_where_it_came_from_and_who_vouches(client: Client, site: Site) -> None:
    shown = client.release("tiny@1")
    manifest = site.releases.manifest("tiny@1")
    assert shown["builder"] == manifest.builder
    assert shown["recipe_digest"] == manifest.recipe_digest
    assert shown["packages"] == dict(manifest.packages)
    assert shown["signed_by"] == list(site.releases.signers("tiny@1"))
    assert (shown["tests"], shown["channels"], shown["revoked_at"]) == ([], [], None)


def test_a_channel_is_moved_and_names_its_release(client: Client, site: Site) -> None:
    moved = client.promote("tiny@1", "canary")
    assert (moved["name"], moved["release_name"]) == ("tiny:canary", "tiny@1")
    assert client.promote("tiny:canary", "beta")["release_name"] == "tiny@1"
    assert {one["name"] for one in client.channels()} == {"tiny:canary", "tiny:beta"}
    assert sorted(client.release("tiny:beta")["channels"]) == ["beta", "canary"]
    assert client.releases()[1]["channels"] == []
    client.promote("tiny@2", "canary")
    assert client.release("tiny:canary")["name"] == "tiny@2"
    assert site.audit.rows()[-1].actor == "token:publisher"


@pytest.mark.parametrize("channel", ["Stable", "a b", "-x", "x" * 40])
def test_a_channel_has_a_usable_name(client: Client, channel: str) -> None:
    with pytest.raises(RequestError, match="not a channel"):
        client.promote("tiny@1", channel)
    assert client.channels() == []


def test_a_channel_belongs_to_one_image(site: Site, url: str) -> None:
    headers = {"Authorization": f"Bearer {token_for(site, 'admin')}"}
    answer = httpx.put(
        f"{url}/api/v1/channels/other/beta", json={"release": "tiny@1"}, headers=headers, timeout=60
    )
    assert (answer.status_code, answer.json()["found"]) == (404, "tiny@1")


def test_a_revoked_release_says_why_and_is_not_deployed(
    client: Client, operator: Client, site: Site
) -> None:
    site.add_host()
    queued = operator.deploy(["r1n1"], "tiny@1")
    shown = client.revoke_release("tiny@1", "CVE-2026-1 in libtiny")
    assert shown["revoked_reason"] == "CVE-2026-1 in libtiny"
    assert client.operation(queued[0]["id"])["is_final"]
    with pytest.raises(TrustError) as caught:
        operator.deploy(["r1n1"], "tiny@1")
    assert caught.value.code == "release_revoked"
    with pytest.raises(TrustError):
        client.promote("tiny@1", "beta")
    again = client.revoke_release("tiny@1", "another reason")
    assert again["revoked_at"] == shown["revoked_at"]


def test_a_release_is_revoked_for_a_reason(client: Client) -> None:
    with pytest.raises(RequestError):
        client.revoke_release("tiny@1", "")
    assert client.release("tiny@1")["revoked_at"] is None


@pytest.mark.parametrize("role", ["viewer", "operator"])
@pytest.mark.parametrize(
    "change",
    [
        lambda client: client.promote("tiny@1", "beta"),
        lambda client: client.revoke_release("tiny@1", "no"),
    ],
)
def test_only_a_publisher_promotes_and_revokes(
    site: Site, url: str, role: str, change: Callable[[Client], object]
) -> None:
    with Client(url, token_for(site, role)) as client:
        with pytest.raises(TrustError) as caught:
            change(client)
        assert caught.value.code == "role_refused"
        assert client.channels() == []


def test_a_publisher_does_not_operate(client: Client, site: Site) -> None:
    site.add_host()
    with pytest.raises(TrustError):
        client.verify(["r1n1"], "tiny@1")


def test_tests_are_shown_with_the_release(client: Client, site: Site) -> None:
    for is_healthy in (False, True):
        site.releases.record_test(
            "tiny@1",
            profile="lab",
            firmware=["bios"],
            is_healthy=is_healthy,
            detail={"hosts": {}},
            actor=ACTOR,
        )
    tests = client.release_tests("tiny@1")
    assert [one["is_healthy"] for one in tests] == [True, False]
    assert client.release("tiny@1")["tests"] == tests
    assert client.release_tests("tiny@2") == []


def test_what_lies_beside_a_release_is_sent(client: Client, site: Site) -> None:
    log = b"".join(client.release_part("tiny@1", "log")).decode()
    assert log == site.archive.log(site.releases.show("tiny@1").digest)
    manifest = site.releases.manifest("tiny@1")
    if FILES in manifest.attachments:
        sent = b"".join(client.release_part("tiny@1", "files"))
        assert sent == site.archive.attachment(manifest, FILES)
    with pytest.raises(NotFound):
        list(client.release_part("tiny@9", "log"))


def test_disks_are_compared_with_a_release_and_nothing_is_written(
    operator: Client, site: Site
) -> None:
    site.add_host()
    queued = operator.verify(["r1n1"], "tiny@1")
    assert (queued[0]["kind"], queued[0]["release_name"]) == ("verification", "tiny@1")
    with pytest.raises(Conflict):
        operator.verify(["r1n1"], "tiny@1")
    with pytest.raises(RequestError):
        operator.verify([], "tiny@1")


def test_without_a_release_a_disk_is_compared_with_what_the_host_runs(
    operator: Client, site: Site
) -> None:
    site.add_host()
    with pytest.raises(RequestError):
        operator.verify(["r1n1"])
    assert operator.operations() == []


def test_everything_is_written_where_that_is_asked_for(operator: Client, site: Site) -> None:
    site.add_host()
    queued = operator.deploy(["r1n1"], "tiny@1", full=True)
    assert queued[0]["options"] == {"soft_shutdown": True, "full": True}


def test_a_moved_channel_is_moved_once_for_each_key(site: Site, url: str) -> None:
    headers = {
        "Authorization": f"Bearer {token_for(site, 'publisher')}",
        "Idempotency-Key": "move",
    }
    place = f"{url}/api/v1/channels/tiny/beta"
    first = httpx.put(place, json={"release": "tiny@1"}, headers=headers, timeout=60)
    site.releases.promote("tiny@2", "beta", actor=ACTOR)
    again = httpx.put(place, json={"release": "tiny@1"}, headers=headers, timeout=60)
    assert again.json() == first.json()
    assert site.releases.show("tiny:beta").name == "tiny@2"
