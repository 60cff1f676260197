"""The service is killed at every commit and every external effect, in the middle of a
deployment, of one that fails before its first write, of a cancel, and of one that fails after
its first write and goes back to the last good release; and goes on.

Whichever point it is: all operations end as they should, the BMC's own log shows each effect
once, the audit chain holds, and nothing is left in the queue. A few points of each kind are in
every run; `script/soak` takes them all.
"""

import re
from collections.abc import Iterator
from typing import Final

import pytest

from tests.parts.killed_anywhere import SCENARIOS, Scenario, reached, running_racks, sweep
from tests.parts.rack import Rack

# What is on the way to the ramdisk, the same in each scenario, and what only a request has.
AS_IN_A_DEPLOYMENT: Final = re.compile(r"^boot |power_o(n|ff)")
AS_IN_A_REQUEST: Final = re.compile(r"^api ")


@pytest.fixture(scope="module")
def racks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Rack]]:
    with running_racks(tmp_path_factory.mktemp("swept")) as racks:
        yield racks


def points_of_each_kind(scenario: Scenario, counted: dict[str, int]) -> list[str]:
    """Return the first of each kind in a deployment; the last of each, where they are on the
    way back, in the others."""
    if not scenario.restarts and not scenario.goes_back:
        return [f"{point} 1" for point in sorted(counted)]
    known = AS_IN_A_REQUEST if scenario.goes_back else AS_IN_A_DEPLOYMENT
    kinds = [point for point in sorted(counted) if not known.search(point)]
    return [f"{point} {counted[point]}" for point in kinds]


@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_at_a_point_of_each_kind_it_goes_on(racks: list[Rack], name: str) -> None:
    scenario = SCENARIOS[name]
    sweep(racks, scenario, points_of_each_kind(scenario, reached(racks[0], scenario)))


@pytest.mark.soak
@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_at_every_point_it_goes_on(racks: list[Rack], name: str) -> None:
    counted = reached(racks[0], SCENARIOS[name])
    points = [
        f"{point} {hit}" for point, hits in sorted(counted.items()) for hit in range(1, hits + 1)
    ]
    sweep(racks, SCENARIOS[name], points)
