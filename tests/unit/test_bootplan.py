"""The rule of booting: a host boots its own disk, unless one live ticket is exactly its own."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import product

import pytest

from provisioner.core.bootplan import (
    BootRequest,
    Inspect,
    KnownHost,
    Loader,
    LocalDisk,
    Ramdisk,
    TicketOffer,
    boot_request,
    plan_boot,
)
from provisioner.core.model import Firmware, HostId, LocalBoot, OperationId, Secret, Ticket
from provisioner.errors import RequestError

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
MAC = "52:54:00:77:00:01"
ASKING = BootRequest(mac=MAC)
HOST = KnownHost(id=HostId("host_1"), name="r1n7", macs=(MAC,), local_boot=LocalBoot.SANBOOT)
TICKET = Ticket(
    digest="aa",
    operation_id=OperationId("op_1"),
    host_id=HOST.id,
    generation=3,
    expires_at=NOW + timedelta(minutes=5),
)
OFFER = TicketOffer(ticket=TICKET, value=Secret("tk_1"), ramdisk="cd" * 32)

REFUSED = {
    "none": (None, "no boot ticket"),
    "expired": (
        replace(OFFER, ticket=replace(TICKET, expires_at=NOW)),
        "the boot ticket has expired",
    ),
    "consumed": (
        replace(OFFER, ticket=replace(TICKET, consumed_at=NOW)),
        "the boot ticket is consumed",
    ),
    "another's": (
        replace(OFFER, ticket=replace(TICKET, host_id=HostId("host_2"))),
        "the boot ticket is another host's",
    ),
}


def test_a_live_ticket_boots_the_ramdisk_it_was_issued_for() -> None:
    plan = plan_boot(ASKING, HOST, OFFER, now=NOW, discovery=False)
    assert plan == Ramdisk(OFFER.ramdisk, OFFER.value, local_boot=LocalBoot.SANBOOT)


@pytest.mark.parametrize("discovery", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_a_ticket_that_is_not_live_boots_the_local_disk(case: str, discovery: bool) -> None:
    offer, reason = REFUSED[case]
    plan = plan_boot(ASKING, HOST, offer, now=NOW, discovery=discovery)
    assert plan == LocalDisk(LocalBoot.SANBOOT, reason)


def test_an_unknown_host_boots_its_disk_and_is_inspected_only_with_discovery() -> None:
    for offer in (None, OFFER):
        plan = plan_boot(ASKING, None, offer, now=NOW, discovery=False)
        assert isinstance(plan, LocalDisk)
        assert plan_boot(ASKING, None, offer, now=NOW, discovery=True) == Inspect(MAC)


def test_a_host_found_for_another_mac_boots_its_disk() -> None:
    stranger = BootRequest(mac="52:54:00:00:00:99", uuid="same", serial="same")
    plan = plan_boot(stranger, HOST, OFFER, now=NOW, discovery=True)
    assert isinstance(plan, LocalDisk)


def test_only_one_of_all_combinations_boots_a_ramdisk() -> None:
    offers = [OFFER, *(offer for offer, _ in REFUSED.values())]
    requests = [ASKING, BootRequest(mac="52:54:00:00:00:99")]
    plans = [
        plan_boot(asking, known, offer, now=NOW, discovery=discovery)
        for asking, known, offer, discovery in product(
            requests, [HOST, None], offers, [True, False]
        )
    ]
    assert sum(isinstance(plan, Ramdisk) for plan in plans) == 2  # with and without discovery


def test_an_inspection_gets_the_ticket_that_the_edge_issued() -> None:
    assert Inspect(MAC).with_ticket(OFFER) == Ramdisk(OFFER.ramdisk, OFFER.value)


def test_a_plan_does_not_show_its_ticket() -> None:
    assert "tk_1" not in repr(plan_boot(ASKING, HOST, OFFER, now=NOW, discovery=False))


def test_a_request_is_read_as_ipxe_writes_it() -> None:
    query = {"mac": "52-54-00-77-00-01", "uuid": "4c4c", "serial": "A b", "platform": "efi"}
    assert boot_request(query) == BootRequest(MAC, "4c4c", "A b", Firmware.UEFI)
    assert boot_request({"mac": MAC.upper()}) == ASKING


def test_grub_asks_for_a_uefi_and_is_answered_alike() -> None:
    asking = boot_request({"mac": MAC, "uuid": "4c4c", "address": "10.77.0.100"}, Loader.GRUB)
    assert asking == BootRequest(MAC, "4c4c", None, Firmware.UEFI, Loader.GRUB)
    assert plan_boot(asking, HOST, OFFER, now=NOW, discovery=False) == plan_boot(
        ASKING, HOST, OFFER, now=NOW, discovery=False
    )


def test_what_makes_no_sense_in_a_request_is_dropped() -> None:
    query = {"mac": MAC, "uuid": "", "serial": "a\nb", "platform": "amiga"}
    assert boot_request(query) == ASKING
    assert boot_request({"mac": MAC, "serial": "x" * 4096}).serial == "x" * 128


@pytest.mark.parametrize("mac", ["", "${netX/mac}", "525400770001", MAC + "\n", MAC + ":00"])
def test_a_request_without_a_mac_is_refused(mac: str) -> None:
    with pytest.raises(RequestError):
        boot_request({"mac": mac})
