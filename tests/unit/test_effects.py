"""Effects are wishes that survive the outbox; what is not one is refused."""

import json
from itertools import product

import pytest

from provisioner.core.effects import (
    Effect,
    PowerOff,
    PowerOn,
    ReturnToDisk,
    SetNextBoot,
    from_json,
    to_json,
)
from provisioner.core.model import BootDevice

EVERY: list[Effect] = [
    PowerOff(soft=True),
    PowerOff(soft=False),
    PowerOn(),
    ReturnToDisk(),
    *(SetNextBoot(device, rung) for device, rung in product(BootDevice, range(3))),
]


@pytest.mark.parametrize("effect", EVERY, ids=str)
def test_an_effect_comes_out_of_the_outbox_as_it_went_in(effect: Effect) -> None:
    text = json.dumps(to_json(effect))
    again = from_json(json.loads(text))
    assert again == effect
    assert type(again) is type(effect)


def test_a_boot_device_comes_back_as_itself_and_not_as_text() -> None:
    again = from_json({"effect": "SetNextBoot", "device": "disk", "rung": 1})
    assert isinstance(again, SetNextBoot)
    assert again.device is BootDevice.DISK


def test_an_effect_that_we_do_not_know_is_refused() -> None:
    with pytest.raises(KeyError):
        from_json({"effect": "RawCommand", "bytes": "06 01"})


@pytest.mark.parametrize(
    "text",
    [
        {"effect": "PowerOn", "soft": True},
        {"effect": "PowerOff"},
        {"effect": "SetNextBoot", "device": "floppy"},
    ],
    ids=str,
)
def test_an_effect_with_other_fields_is_refused(text: dict[str, object]) -> None:
    with pytest.raises((TypeError, ValueError)):
        from_json(text)


def test_no_effect_is_a_toggle() -> None:
    """Whatever is wished for may be wished for twice."""
    names = {type(effect).__name__.lower() for effect in EVERY}
    assert not [name for name in names if "cycle" in name or "toggle" in name or "reset" in name]
