"""A whole service whose releases lie in a bucket: publish, deploy, serve, give up."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from provisioner import keys, wiring
from provisioner.core.batches import frames_in
from provisioner.core.manifest import Manifest
from provisioner.errors import NotFound
from provisioner.imaging.garbage import collect
from provisioner.settings import CONFIG_FILE, load
from provisioner.setup import Plan, initialise
from provisioner.wiring import Service
from tests.parts.http_listener import listening
from tests.parts.s3_server import make_bucket, s3_server
from tests.parts.test_imaging_archive import FACTS, make_disk

ACTOR = "token:admin"


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    folder = tmp_path / "installation"
    initialise(folder, Plan())
    with s3_server(tmp_path) as endpoint:
        make_bucket(endpoint, "releases")
        with (folder / CONFIG_FILE).open("a") as file:
            file.write(
                f'\n[releases]\nstore = "s3://releases/site-1"\ns3_endpoint = "{endpoint}"\n'
            )
        credentials = folder / keys.FOLDER / keys.S3_CREDENTIALS
        credentials.write_text('access_key = "AK"\nsecret_key = "not-shown"\n')
        credentials.chmod(0o600)
        settings = load(folder / CONFIG_FILE)
        wiring.prepare(settings)
        service = wiring.build(settings)
        try:
            yield service
        finally:
            service.close()


@pytest.fixture
def published(service: Service, tmp_path: Path) -> Manifest:
    disk = make_disk(tmp_path / "disk.raw", b"the system" * 10_000)
    publisher = wiring.publisher(service.settings, service, actor=ACTOR)
    return publisher.publish(disk, FACTS)


def test_hosts_get_from_the_service_what_lies_in_the_bucket(
    service: Service, published: Manifest
) -> None:
    assert not (service.settings.data_dir / "releases").exists()
    indexes = [index for index, _ in published.stored_chunks()]
    digest = published.chunks[indexes[0]]
    assert digest is not None
    with listening(wiring.boot_app(service)) as url, httpx.Client(timeout=60) as client:
        release = f"{url}/releases/{published.digest}"
        assert client.get(f"{release}/manifest.json").content == published.to_bytes()
        assert client.get(f"{release}/manifest.sig").json()["format"] == 1
        frame = client.get(f"{url}/chunks/{digest[:2]}/{digest}").content
        assert frame == service.archive.blobs.read(f"chunks/{digest[:2]}/{digest}", 1 << 20)
        spec = ",".join(map(str, indexes))
        body = client.get(f"{release}/chunks/{spec}").content
        assert next(bytes(one) for one in frames_in(memoryview(body))) == frame
        for path in (f"/releases/{'0' * 64}/manifest.json", f"/chunks/00/{'0' * 64}"):
            assert client.get(f"{url}{path}").status_code == 404


def test_what_is_revoked_and_given_up_leaves_the_bucket(
    service: Service, published: Manifest
) -> None:
    service.releases.promote("tiny@1", "canary", actor=ACTOR)
    assert service.releases.signers("tiny:canary") == service.releases.signers(published.digest)
    service.releases.revoke("tiny@1", "it was a trial", actor=ACTOR)
    assert service.releases.remove_unused(actor=ACTOR) == []  # the channel, and the grace
    assert collect(service.archive, service.releases.kept).releases == ()
    assert collect(service.archive, set).releases == (published.digest,)
    with pytest.raises(NotFound):
        service.archive.load(published.digest)
