"""The labels that a host had when its deployment was requested go into its seed, whatever is
done to the host while its disk is written."""

import pytest
import yaml

from provisioner.core.model import HostState, Phase
from provisioner.errors import RequestError
from tests.parts.recovery_site import (
    chain,
    fail,
    follow,
    request,
    succeed,
    what,
    with_a_profile_that_proves,
)
from tests.parts.service_site import ACTOR, Agent, Site, profile_document, tamper


def with_rack(site: Site, **labels: str) -> Agent:
    """Return an agent that writes for a profile that uses the label `rack`."""
    document = {**profile_document(), "cloud_config": {"x": "${label.rack}"}}
    site.profiles.save("web", document, actor=ACTOR)
    site.add_host(labels=labels)
    site.deploy("r1n1")
    site.perform()
    return Agent(site).until(Phase.WRITING)


@pytest.mark.parametrize("changed", [{"rack": "r2"}, {"row": "1"}], ids=["changed", "removed"])
def test_a_label_edited_while_the_disk_is_written_does_not_reach_the_seed(
    site: Site, changed: dict[str, str]
) -> None:
    agent = with_rack(site, rack="r1")
    site.hosts.change("r1n1", labels=changed, actor=ACTOR)
    assert yaml.safe_load(agent.seed()["user-data"]) == {"x": "r1"}


def test_a_seed_that_cannot_be_rendered_was_not_taken(site: Site) -> None:
    """As with an operation of an earlier version, which pinned no labels."""
    agent = with_rack(site, rack="r1")
    tamper(site, "UPDATE operations SET pins = json_remove(pins, '$.labels')")
    site.hosts.change("r1n1", labels={"row": "1"}, actor=ACTOR)
    for _ in range(2):
        with pytest.raises(RequestError, match=r"label\.rack"):
            agent.seed()
    assert "seed.taken" not in [row.action for row in site.audit.rows()]
    site.hosts.change("r1n1", labels={"rack": "r3"}, actor=ACTOR)
    assert yaml.safe_load(agent.seed()["user-data"]) == {"x": "r3"}


def test_attempts_and_the_way_back_take_the_labels_of_their_requests(site: Site) -> None:
    """Whatever is done to the host's labels meanwhile: nothing new comes in."""
    with_a_profile_that_proves(site)
    document = site.profiles.show("web").document
    site.profiles.save("web", {**document, "cloud_config": {"x": "${label.rack}"}}, actor=ACTOR)
    site.add_host(labels={"rack": "r1"})
    succeed(site, request(site, "tiny@1"))
    site.hosts.change("r1n1", labels={"rack": "r2"}, actor=ACTOR)
    failed = fail(site, request(site, "tiny@2"))
    site.hosts.change("r1n1", labels={"row": "1"}, actor=ACTOR)
    retry = follow(site, failed)
    assert retry.pins["labels"] == {"rack": "r2"}
    back = follow(site, fail(site, follow(site, fail(site, retry))))
    assert (chain(back)[0], back.pins["labels"]) == ("rollback", {"rack": "r1"})
    assert succeed(site, back).state is HostState.ACTIVE


def test_a_label_that_no_request_pinned_and_that_is_gone_stops_the_attempts(site: Site) -> None:
    """As of operations that an earlier version made."""
    with_a_profile_that_proves(site)
    document = site.profiles.show("web").document
    site.add_host(labels={"rack": "r1"})
    succeed(site, request(site, "tiny@1"))
    site.profiles.save("web", {**document, "cloud_config": {"x": "${label.rack}"}}, actor=ACTOR)
    failed = fail(site, request(site, "tiny@2"))
    tamper(site, "UPDATE operations SET pins = json_remove(pins, '$.labels')")
    site.hosts.change("r1n1", labels={"row": "1"}, actor=ACTOR)
    site.clock.pass_(60)
    site.recovery.take_due()
    assert what(site.at(failed)) == ("rollback", "waiting")
    assert succeed(site, follow(site, failed)).state is HostState.ACTIVE
