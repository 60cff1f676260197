"""Keeps the simulated service's log out of the tests' output, and gives the setting back."""

from collections.abc import Iterator

import pytest
import structlog

from tests.sim.logs import be_quiet


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    before = structlog.get_config()
    be_quiet()
    yield
    structlog.configure(**before)
