"""What the agent tells the service in the end: of success, of failure, and of an odd order."""

import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

import provisioner.agent
from provisioner.agent.problems import ServiceRefused
from provisioner.errors import ProvisionerError
from provisioner.web.agent import AgentListener, create_app
from tests.parts.agent_rig import Rig, rig_with
from tests.parts.agent_service import deployment, make_image, make_release

PATH = re.compile(r"/agent/v[0-9]+/[a-z-]+")


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    image = make_image(tmp_path / "image", size_mib=8)
    with rig_with(tmp_path / "host", make_release(image), disk_mib=32) as rig:
        yield rig


def verification(rig: Rig, **changes: Any) -> dict[str, Any]:
    return deployment(rig.release, kind="verification", mode="verify", **changes)


def test_a_deployment_is_reported_as_done(rig: Rig) -> None:
    assert rig.carry_out() == "reboot"
    [told] = rig.service.told("done")
    assert (told["generation"], told["release"]) == (3, rig.release.manifest.digest)
    assert not rig.service.told("failed")


def test_a_comparison_is_reported_with_its_counts(rig: Rig) -> None:
    rig.service.hello = verification(rig, then="poweroff")
    assert rig.carry_out() == "poweroff"
    [told] = rig.service.told("compared")
    assert told["differing_chunks"] == told["compared_chunks"] > 0
    assert not rig.service.told("failed")


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"mode": "guess"}, "service_refused"),
        ({"disk_rule": {"colour": "red"}}, "request"),
        ({"now": "yesterday"}, "service_refused"),
        ({"heartbeat_s": None}, "service_refused"),
    ],
)
def test_an_order_that_is_not_understood_is_reported(
    rig: Rig, changes: dict[str, Any], code: str
) -> None:
    """The ticket is spent: nobody would learn of it otherwise before the deadline."""
    rig.service.hello = deployment(rig.release, **changes)
    with pytest.raises(ProvisionerError):
        rig.carry_out()
    [told] = rig.service.told("failed")
    assert (told["generation"], told["code"]) == (3, code)
    assert "token" not in str(told)
    rig.assert_untouched()


def test_a_failure_is_reported_once(rig: Rig) -> None:
    rig.service.hello["disk_rule"] = {"serial": "another"}
    with pytest.raises(ProvisionerError):
        rig.carry_out()
    assert [told["code"] for told in rig.service.told("failed")] == ["no_disk_matches"]


def test_an_agent_of_a_quarantined_host_stays_where_it_is(rig: Rig) -> None:
    rig.service.hello["disk_rule"] = {"serial": "another"}
    rig.service.after_failure = {"then": "stay"}
    assert rig.carry_out() == "stay"
    assert [told["code"] for told in rig.service.told("failed")] == ["no_disk_matches"]
    rig.assert_untouched()


@pytest.mark.parametrize("answer", [{"then": "reboot"}, {"then": "party"}, {"then": None}])
def test_any_other_answer_lets_an_agent_restart_its_host(rig: Rig, answer: dict[str, Any]) -> None:
    rig.service.hello["disk_rule"] = {"serial": "another"}
    rig.service.after_failure = answer
    with pytest.raises(ProvisionerError):
        rig.carry_out()


def test_a_comparison_that_the_service_does_not_take_fails(rig: Rig) -> None:
    """Nothing else would end the operation before its deadline."""
    rig.service.hello = verification(rig)
    rig.service.on_call = lambda name, _: 404 if name == "compared" else None
    assert rig.carry_out() == "reboot"
    [told] = rig.service.told("failed")
    assert (told["generation"], told["code"]) == (3, ServiceRefused.code)
    assert "/agent/v1/compared" in told["message"]


def test_a_deployment_that_the_service_does_not_take_has_not_failed(rig: Rig) -> None:
    """The disk is right, and the new system reports by itself."""
    rig.service.on_call = lambda name, _: 404 if name == "done" else None
    assert rig.carry_out() == "reboot"
    assert not rig.service.told("failed")


def paths_of_the_agent() -> set[str]:
    """Return every path of the service that a module of the agent names."""
    found: set[str] = set()
    for module in pkgutil.iter_modules(provisioner.agent.__path__, "provisioner.agent."):
        values = vars(importlib.import_module(module.name)).values()
        found |= {value for value in values if isinstance(value, str) and PATH.fullmatch(value)}
    return found


def test_the_real_listener_has_every_path_that_the_agent_asks_for() -> None:
    service = cast("AgentListener", SimpleNamespace(agents=None))
    routes = create_app(service).url_map.iter_rules()
    posted = {str(rule) for rule in routes if "POST" in (rule.methods or ())}
    names = {"hello", "authorise", "progress", "seed", "done", "compared", "failed"}
    assert paths_of_the_agent() == {f"/agent/v1/{name}" for name in names}
    assert paths_of_the_agent() <= posted
