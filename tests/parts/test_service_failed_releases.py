"""Which releases are remembered as failed on a host, and what that takes away. Over both
databases."""

import pytest

from provisioner.core.model import Phase
from provisioner.core.recovery import Cause
from tests.parts.recovery_site import chain, fail, follow, request, running, succeed, what
from tests.parts.service_site import Site


@pytest.fixture
def site(either_site: Site) -> Site:
    return either_site


def failures(site: Site) -> list[str]:
    """Return the codes of what is remembered of host r1n1."""
    with site.store.read() as tx:
        return [one.code for one in tx.failures_on(site.hosts.show("r1n1").id)]


@pytest.mark.parametrize(
    ("phase", "code"),
    [(Phase.NETBOOTING, ""), (Phase.PREPARING, "permission_refused")],
)
def test_a_failure_that_never_touched_the_disk_takes_no_way_back_away(
    site: Site, phase: Phase, code: str
) -> None:
    good = running(site)
    fail(site, request(site, "tiny@1", attempts=1), phase, code)
    assert site.hosts.show("r1n1").release == good.release
    assert not failures(site)
    failed = fail(site, request(site, "tiny@2", attempts=1))
    assert what(failed) == ("rollback", "waiting")
    assert succeed(site, follow(site, failed)).release == good.release


def test_a_way_back_that_never_touched_the_disk_may_be_taken_again(site: Site) -> None:
    running(site)
    back = follow(site, fail(site, request(site, "tiny@2", attempts=1)))
    assert what(fail(site, back, Phase.NETBOOTING)) == ("quarantine", "done")
    assert failures(site) == ["disk_failed"]
    site.hosts.set_flags("r1n1", release_quarantine=True, actor="a person")
    again = follow(site, fail(site, request(site, "tiny@2", attempts=1)))
    assert chain(again)[0] == Cause.ROLLBACK


def test_an_attempt_that_was_begun_counts_though_the_last_one_was_not(site: Site) -> None:
    running(site)
    second = follow(site, fail(site, request(site, "tiny@2", attempts=2)))
    fail(site, second, Phase.NETBOOTING)
    assert failures(site) == ["netbooting_timed_out"]


def test_a_release_that_does_not_fit_the_host_is_remembered_untouched(site: Site) -> None:
    running(site)
    fail(site, request(site, "tiny@2", attempts=1), Phase.PREPARING, "disk_too_small")
    assert failures(site) == ["disk_too_small"]
