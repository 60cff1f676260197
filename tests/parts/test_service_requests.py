"""What people and programs ask for: taken whole, or refused whole and with a reason."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from provisioner.core.model import Firmware, Phase, Secret
from provisioner.errors import Conflict, NotFound, ProvisionerError, RequestError
from provisioner.service.hosts import HostSpec
from provisioner.service.requests import HOSTS_PER_REQUEST_MAX
from provisioner.service.selections import Asked, select_hosts
from provisioner.service.tokens import NotAuthenticated
from tests.parts.service_site import ACTOR, Site, mac, profile_document


def ask(site: Site, *hosts: str, release: str = "tiny@1", **options: Any) -> None:
    site.operations.request_deployment(hosts, release, options=options, actor=ACTOR)


# --- deployments --------------------------------------------------------------------------


def test_field_07_an_empty_selection_selects_nothing(site: Site) -> None:
    site.add_host()
    with pytest.raises(RequestError, match="empty selection selects nothing"):
        ask(site)
    assert site.operations.list() == []


REFUSED: dict[str, tuple[Callable[[Site], object], type[ProvisionerError], str]] = {
    "a host twice": (lambda site: ask(site, "r1n1", "r1n1"), RequestError, "twice"),
    "unknown host": (lambda site: ask(site, "r1n1", "r9n9"), NotFound, "r9n9"),
    "unknown release": (lambda site: ask(site, "r1n1", release="tiny@9"), NotFound, "tiny@9"),
    "no such digest": (lambda site: ask(site, "r1n1", release="0" * 64), NotFound, "no release"),
    "short digest": (lambda site: ask(site, "r1n1", release="ab"), RequestError, "too short"),
    "too many": (
        lambda site: ask(site, *(f"h{n}" for n in range(HOSTS_PER_REQUEST_MAX + 1))),
        RequestError,
        "too many",
    ),
    "unknown option": (lambda site: ask(site, "r1n1", wipe=True), RequestError, "wipe"),
    "odd option": (lambda site: ask(site, "r1n1", soft_shutdown=1), RequestError, "soft_shutdown"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_request_that_cannot_be_met_queues_nothing(site: Site, case: str) -> None:
    site.add_host()
    request, kind, words = REFUSED[case]
    before = site.texts()
    with pytest.raises(kind, match=words):
        request(site)
    assert site.operations.list() == []
    assert site.texts() == before


def test_one_bad_host_spoils_the_whole_request(site: Site) -> None:
    site.add_host(1)
    site.add_host(2)
    site.hosts.set_flags("r1n2", is_protected=True, actor=ACTOR)
    with pytest.raises(Conflict, match="protected") as caught:
        ask(site, "r1n1", "r1n2")
    assert caught.value.host == "r1n2"
    assert site.operations.list() == []
    assert site.hosts.show("r1n1").generation == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bmc": None}, "no BMC"),
        ({"profile": None}, "no profile"),
    ],
    ids=str,
)
def test_a_host_that_lacks_something_says_what(
    site: Site, changes: dict[str, Any], words: str
) -> None:
    site.add_host(**changes)
    with pytest.raises(Conflict, match=words) as caught:
        ask(site, "r1n1")
    assert "provisioner host change r1n1" in (caught.value.hint or "")


def test_a_release_for_other_firmware_is_refused(site: Site) -> None:
    site.add_host(firmware=Firmware.UEFI)
    with pytest.raises(Conflict, match="does not boot on uefi") as caught:
        ask(site, "r1n1", release="tiny@2")
    assert (caught.value.expected, caught.value.found) == (["bios"], "uefi")
    ask(site, "r1n1", release="tiny@1")


def test_a_host_with_secure_boot_takes_only_a_release_that_is_signed_for_it(site: Site) -> None:
    site.add_host(firmware=Firmware.SECURE_BOOT)
    with pytest.raises(Conflict, match="does not boot on secure-boot") as caught:
        ask(site, "r1n1", release="tiny@1")
    assert caught.value.expected == ["bios", "uefi"]


def test_a_profile_that_needs_a_label_asks_for_it_before_anything_is_written(site: Site) -> None:
    document = {**profile_document(), "cloud_config": {"x": "${label.rack}"}}
    site.profiles.save("web", document, actor=ACTOR)
    site.add_host(1)
    site.add_host(2, labels={"rack": "r1"})
    with pytest.raises(RequestError, match=r"label\.rack") as caught:
        ask(site, "r1n1")
    assert caught.value.host == "r1n1"
    ask(site, "r1n2")


def test_a_release_may_be_named_in_three_ways(site: Site) -> None:
    site.add_host()
    digest = site.releases.show("tiny@2").digest
    assert site.releases.show(digest) == site.releases.show(digest[:8])
    operation = site.deploy("r1n1", release=digest[:12])
    assert operation.release == digest
    assert operation.pins["release_name"] == "tiny@2"


def test_a_misspelt_name_is_met_with_the_right_one(site: Site) -> None:
    site.add_host()
    with pytest.raises(NotFound) as caught:
        ask(site, "r1nl")
    assert caught.value.hint == "did you mean r1n1?"


@pytest.mark.parametrize("flags", [{"in_maintenance": True}], ids=str)
def test_hands_off_means_no_inspection_either(site: Site, flags: dict[str, bool]) -> None:
    site.add_host()
    site.hosts.set_flags("r1n1", actor=ACTOR, **flags)
    with pytest.raises(Conflict, match="maintenance"):
        site.operations.request_inspection("r1n1", actor=ACTOR)


# --- hosts --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        {"name": ""},
        {"name": "R1N1"},
        {"name": "r1n1."},
        {"name": "-a"},
        {"name": "a" * 64},
        {"macs": ()},
        {"macs": ("52:54:00:77:00",)},
        {"macs": ("53:54:00:77:00:01",)},
        {"macs": (mac(1), mac(1).upper())},
        {"macs": tuple(mac(n) for n in range(17))},
        {"profile": "nowhere"},
    ],
    ids=lambda spec: str(spec)[:40],
)
def test_a_host_that_cannot_be_one_is_not_enrolled(site: Site, spec: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        site.hosts.add(HostSpec(**{"name": "r1n1", "macs": (mac(1),), **spec}), actor=ACTOR)
    assert site.hosts.list() == []


def test_an_import_is_taken_whole_or_not_at_all(site: Site) -> None:
    good = [HostSpec(f"r1n{n}", (mac(n),)) for n in (1, 2, 3)]
    with pytest.raises(Conflict):
        site.hosts.add_many([*good, HostSpec("r1n4", (mac(2),))], actor=ACTOR)
    assert site.hosts.list() == []
    with pytest.raises(RequestError):
        site.hosts.add_many([], actor=ACTOR)
    assert len(site.hosts.add_many(good, actor=ACTOR)) == 3


def test_flags_change_only_what_was_named(site: Site) -> None:
    site.add_host()
    site.hosts.set_flags("r1n1", is_protected=True, actor=ACTOR)
    host = site.hosts.set_flags("r1n1", in_maintenance=True, actor=ACTOR)
    assert (host.is_protected, host.in_maintenance) == (True, True)
    rows = len(site.audit.rows())
    site.hosts.set_flags("r1n1", is_protected=True, actor=ACTOR)
    assert len(site.audit.rows()) == rows  # nothing changed, so there is nothing to record
    with pytest.raises(Conflict, match="not deleted"):
        site.hosts.delete("r1n1", actor=ACTOR)


def test_power_by_hand_is_a_closed_list_of_verbs(site: Site) -> None:
    site.add_host()
    assert site.hosts.power("r1n1", "status", actor=ACTOR) == "on"
    for action in ("soft-off", "on", "reset", "off"):
        site.hosts.power("r1n1", action, actor=ACTOR)
    assert site.bmc().changes() == ["soft_off", "power_on", "reset", "power_off"]
    for action in ("cycle", "raw 0x06 0x01", ""):
        with pytest.raises(RequestError):
            site.hosts.power("r1n1", action, actor=ACTOR)
    assert [row.action for row in site.audit.rows()][-1] == "host.power.off"


def test_new_bmc_credentials_are_recorded_but_not_shown(site: Site) -> None:
    host = site.add_host()
    assert host.bmc is not None
    other = type(host.bmc)(host.bmc.address, 623, "admin", Secret("canary-second"))
    site.hosts.change("r1n1", bmc=other, actor=ACTOR)
    assert site.audit.rows()[-1].detail == {"bmc_credentials": "replaced"}
    assert "canary-second" not in site.texts()
    assert site.hosts.show("r1n1").bmc == other


def test_a_deleted_host_is_gone_and_its_name_is_free(site: Site) -> None:
    site.add_host()
    site.hosts.delete("r1n1", actor=ACTOR)
    with pytest.raises(NotFound):
        site.hosts.show("r1n1")
    site.add_host()
    assert site.audit.verify() > 2


# --- profiles and tokens ------------------------------------------------------------------


def test_a_profile_in_use_is_not_deleted(site: Site) -> None:
    site.add_host()
    with pytest.raises(Conflict, match="in use") as caught:
        site.profiles.delete("web", actor=ACTOR)
    assert caught.value.found == ["r1n1"]
    site.hosts.delete("r1n1", actor=ACTOR)
    site.profiles.delete("web", actor=ACTOR)
    with pytest.raises(NotFound):
        site.profiles.show("web")


def test_a_profile_saved_again_is_no_new_revision(site: Site) -> None:
    rows = len(site.audit.rows())
    first = site.profiles.show("web")
    assert site.profiles.save("web", profile_document(), actor=ACTOR) == first
    assert len(site.audit.rows()) == rows


def test_a_place_that_stands_for_nothing_is_refused_when_saving(site: Site) -> None:
    document = {**profile_document(), "network": {"x": "${vars.misspelt}"}}
    with pytest.raises(RequestError, match=r"vars\.misspelt"):
        site.profiles.save("web", document, actor=ACTOR)


def test_a_token_works_until_it_expires_or_is_revoked(site: Site) -> None:
    lasting = site.tokens.create("a", "viewer", expires_in=None, actor=ACTOR)
    short = site.tokens.create("b", "admin", expires_in=timedelta(hours=1), actor=ACTOR)
    assert site.tokens.authenticate(lasting.reveal()).role == "viewer"
    assert site.tokens.authenticate(short.reveal()).name == "b"
    site.clock.pass_(3600)
    with pytest.raises(NotAuthenticated, match="expired"):
        site.tokens.authenticate(short.reveal())
    site.tokens.revoke("a", actor=ACTOR)
    with pytest.raises(NotAuthenticated):
        site.tokens.authenticate(lasting.reveal())
    with pytest.raises(NotFound):
        site.tokens.revoke("a", actor=ACTOR)
    with pytest.raises(RequestError):
        site.tokens.create("c", "root", expires_in=None, actor=ACTOR)
    for token in (lasting, short):
        assert token.reveal() not in site.texts()


@pytest.mark.parametrize("bearer", ["", "x", "pt_", "pt_" + "A" * 43])
def test_a_wrong_token_is_nobody(site: Site, bearer: str) -> None:
    with pytest.raises(NotAuthenticated) as caught:
        site.tokens.authenticate(bearer)
    assert caught.value.status == 401


def test_operations_are_listed_by_host_and_openness(site: Site) -> None:
    site.add_host(1)
    site.add_host(2)
    first = site.deploy("r1n1")
    second = site.deploy("r1n2")
    site.operations.cancel(first.id, actor=ACTOR)
    assert [found.id for found in site.operations.list("r1n1")] == [first.id]
    assert [found.id for found in site.operations.list(only_open=True)] == [second.id]
    assert site.phase(second) is Phase.NETBOOTING
    with pytest.raises(NotFound):
        site.operations.show("op_none")


def test_one_request_that_two_services_carry_out_at_once_selects_once(site: Site) -> None:
    """Neither has seen what the other is about to save."""
    host, asked = site.add_host(), Asked("rq_1", "d")
    with site.store.begin() as tx:
        pins = select_hosts(tx, [host], actor=ACTOR, now=site.clock(), asked=asked)
    assert (pins["request"], pins["asked"]) == ("rq_1", "d")
    with pytest.raises(Conflict, match="already"), site.store.begin() as tx:
        select_hosts(tx, [host], actor=ACTOR, now=site.clock(), asked=asked)


def test_a_request_whose_operations_are_gone_is_not_made_again(site: Site) -> None:
    site.add_host()
    asked = Asked("rq_1", "d")
    (first,) = site.operations.request_deployment(
        ["r1n1"], "tiny@1", options={}, actor=ACTOR, asked=asked
    )
    site.operations.cancel(first.id, actor=ACTOR)
    site.hosts.delete("r1n1", actor=ACTOR)
    site.add_host()
    with pytest.raises(Conflict, match="not known any more"):
        site.operations.request_deployment(["r1n1"], "tiny@1", options={}, actor=ACTOR, asked=asked)
    assert site.operations.list("r1n1") == []
