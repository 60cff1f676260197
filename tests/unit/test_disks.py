"""The choice of the one disk to write."""

from dataclasses import replace
from typing import Any

import pytest

from provisioner.core.disks import (
    Disk,
    DiskRule,
    NoDiskMatches,
    SeveralDisksMatch,
    choose_disk,
)
from provisioner.errors import RequestError

VDA = Disk("vda", "S-0", "naa.5000c500a1b2c3d4", 10_000, False, "virtio", "pci-0000:00:04.0", "m")
SDB = Disk("sdb", "S-1", None, 20_000, True, "sata", "pci-0000:00:1f.2-ata-2", "n")


@pytest.mark.parametrize(
    "rule",
    [
        {"serial": "S-0"},
        {"wwn": "0x5000C500A1B2C3D4"},
        {"size_max_bytes": 10_000},
        {"rotational": False},
        {"bus": "virtio"},
        {"by_path": "pci-0000:00:04.0"},
        {"model": "m"},
        {"serial": "S-0", "size_min_bytes": 10_000, "size_max_bytes": 10_000},
    ],
)
def test_each_key_of_a_rule_finds_the_one_disk(rule: dict[str, Any]) -> None:
    """Every key chooses by itself, and sizes include their limits."""
    assert choose_disk(DiskRule.parse(rule), [SDB, VDA]) is VDA


@pytest.mark.parametrize("key", ["serial", "wwn", "by_path", "model", "bus"])
def test_a_disk_that_lacks_what_the_rule_asks_is_not_it(key: str) -> None:
    """Unknown is never equal, and one wrong key outweighs all the right ones."""
    rule = DiskRule.parse({"size_min_bytes": 1, key: "usb" if key == "bus" else "other"})
    with pytest.raises(NoDiskMatches) as caught:
        choose_disk(rule, [VDA, SDB])
    assert caught.value.found == [VDA.as_dict(), SDB.as_dict()]
    assert caught.value.expected == rule.as_dict()


def test_two_that_match_are_refused_by_name() -> None:
    """The error lists the disks that fit, and only those."""
    usb = replace(VDA, name="sdz", bus="usb")
    with pytest.raises(SeveralDisksMatch) as caught:
        choose_disk(DiskRule.parse({"serial": "S-0"}), [VDA, SDB, usb])
    assert [disk["name"] for disk in caught.value.found] == ["vda", "sdz"]  # type: ignore[attr-defined]  # `found` is any JSON


def test_no_disk_at_all_is_no_match() -> None:
    """A host without a disk gets the same clear error."""
    with pytest.raises(NoDiskMatches):
        choose_disk(DiskRule.parse({"size_min_bytes": 1}), [])


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        "vda",
        {},
        {"serial": None},
        {"serial": ""},
        {"serial": "  "},
        {"serial": 7},
        {"serial": "x" * 257},
        {"name": "vda"},
        {"size_min_bytes": "1G"},
        {"size_min_bytes": True},
        {"size_min_bytes": -1},
        {"size_min_bytes": 2, "size_max_bytes": 1},
        {"rotational": 0},
        {"bus": "floppy"},
    ],
)
def test_a_rule_that_is_not_understood_is_refused(value: object) -> None:
    """An empty rule selects nothing, and a typing mistake never widens a rule."""
    with pytest.raises(RequestError):
        DiskRule.parse(value)


def test_disks_and_rules_survive_json() -> None:
    """What was written as JSON is read as the same value."""
    assert Disk.from_dict(VDA.as_dict()) == VDA
    assert Disk.from_dict({**SDB.as_dict(), "colour": "red"}) == SDB
    rule = DiskRule.parse({"serial": "S-0", "rotational": False})
    assert DiskRule.parse(rule.as_dict()) == rule


@pytest.mark.parametrize(
    "change", [{"name": None}, {"bus": "floppy"}, {"size_bytes": "1"}, {"rotational": None}]
)
def test_a_disk_that_is_not_understood_is_refused(change: dict[str, Any]) -> None:
    """An inventory comes from the network; its shape is checked."""
    with pytest.raises(RequestError):
        Disk.from_dict({**VDA.as_dict(), **change})
