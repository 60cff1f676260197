"""`provisioner doctor`: looks at this machine and says, line by line, what to do."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click

from provisioner.errors import ConfigError, ProvisionerError
from provisioner.service.observing import HINT, WHY

from .messages import clean
from .output import output_option, show
from .site import config_option

if TYPE_CHECKING:
    import ssl

    from provisioner.client import Client
    from provisioner.settings import Settings

FREE_GIB_MIN: Final = 2
FREE_GIB_WANTED: Final = 20
ANSWER_LIMIT_S: Final = 3.0
# Fewer than the API has processes for BMCs, so that an operator's own command finds one free.
BMCS_AT_ONCE: Final = 6
_GIB: Final = 1024**3

OK, WARN, FAIL = "ok", "warn", "fail"
_COLOURS: Final = {OK: "green", WARN: "yellow", FAIL: "red"}


class Finding(NamedTuple):
    """One line: `what` was looked at, what was found, and what to do unless it is ok."""

    result: str
    what: str
    found: str
    todo: str = ""


Check = Callable[["Settings"], Iterator[Finding]]


@click.command()
@config_option
@click.option(
    "--bmcs",
    is_flag=True,
    help="Ask every host's BMC for its power, and who may log in; six at a time.",
)
@output_option
def doctor(config: Path | None, bmcs: bool, output: str) -> int:
    """Check this machine and say what to do.

    The exit code is 0 when nothing fails, 78 otherwise.
    """
    findings = _examine(config, bmcs=bmcs)
    if output in ("json", "yaml", "name"):
        found = list(findings)
        show([one._asdict() for one in found], ["what", "result"], output)
    else:
        found = [_told(one) for one in findings]
    return ConfigError.exit_code if any(one.result == FAIL for one in found) else 0


def _told(one: Finding) -> Finding:
    """Print a finding at once: a silent BMC takes its time, and others wait behind it."""
    mark = click.style(f"{one.result:<5}", fg=_COLOURS[one.result])
    click.echo(f"{mark} {clean(one.what)}: {clean(one.found)}")
    if one.todo and one.result != OK:
        click.echo(f"      → {clean(one.todo)}")
    return one


def _examine(config: Path | None, *, bmcs: bool) -> Iterator[Finding]:
    from provisioner.settings import find_settings

    yield _python()
    yield from _lab_programs()
    try:
        settings = find_settings(config)
    except ProvisionerError as error:
        yield Finding(FAIL, "configuration", error.message, error.hint or "correct the file")
        return
    yield Finding(OK, "configuration", f"{settings.path}, with its keys")
    for check in (
        _boot_files,
        _dhcp,
        _space,
        _ramdisk,
        _database,
        _clock,
        _own_host,
        _pinned_trust,
        _listeners,
    ):
        yield from check(settings)
    if bmcs:
        yield from _bmcs(settings)


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding(OK, "python", version)


def _lab_programs() -> Iterator[Finding]:
    """What only the lab and image builds need: their absence is no failure."""
    wanted = {
        "qemu-system-x86_64": ("qemu-system-x86", "the lab"),
        "ipmi_sim": ("openipmi", "the lab"),
        "mmdebstrap": ("mmdebstrap", "image build and ramdisk build"),
    }
    for program, (package, purpose) in wanted.items():
        place = shutil.which(program)
        if place:
            yield Finding(OK, program, place)
        else:
            todo = f"apt-get install {package}"
            yield Finding(WARN, program, f"not installed; needed for {purpose}", todo)


def _boot_files(settings: "Settings") -> Iterator[Finding]:
    from provisioner.netboot.bootfiles import SIGNED_HINT, boot_files, missing_signed_files

    del settings
    try:
        files = boot_files()
    except ConfigError as error:
        yield Finding(FAIL, "boot loaders", error.message, error.hint or "")
    else:
        yield Finding(OK, "boot loaders", ", ".join(sorted(files)))
    if missing := missing_signed_files():
        found = f"not netbooted, for want of {' and '.join(map(str, missing))}"
        yield Finding(WARN, "hosts with Secure Boot on", found, SIGNED_HINT)


def _dhcp(settings: "Settings") -> Iterator[Finding]:
    dhcp = settings.dhcp
    if dhcp.mode == "off":
        todo = "your own DHCP server needs what `provisioner dhcp-config` prints"
        yield Finding(OK, "dhcp", f"off; {todo}")
        return
    if not shutil.which("dnsmasq"):
        yield Finding(FAIL, "dhcp", "dnsmasq is missing", "apt-get install dnsmasq-base")
        return
    if not Path("/sys/class/net", dhcp.interface).exists():
        todo = "name another dhcp.interface, or bring it up; `ip link` lists them"
        yield Finding(FAIL, "dhcp", f"there is no interface {dhcp.interface}", todo)
        return
    yield Finding(OK, "dhcp", f"{dhcp.mode} on {dhcp.interface}")


def _space(settings: "Settings") -> Iterator[Finding]:
    free = shutil.disk_usage(settings.data_dir).free // _GIB
    result = FAIL if free < FREE_GIB_MIN else WARN if free < FREE_GIB_WANTED else OK
    todo = "make room, or move service.data_dir: releases and ramdisks are kept there"
    yield Finding(result, "disk space", f"{free} GiB free in {settings.data_dir}", todo)


def _ramdisk(settings: "Settings") -> Iterator[Finding]:
    from provisioner.service.ramdisks import Ramdisks

    digest = Ramdisks(settings.data_dir / "ramdisks", settings.ramdisk.digest).newest_or_none()
    if digest is None:
        yield Finding(FAIL, "ramdisk", "there is none", "provisioner ramdisk build")
    else:
        yield Finding(OK, "ramdisk", digest[:12])


def _database(settings: "Settings") -> Iterator[Finding]:
    from provisioner import wiring

    if (place := _missing_database(settings)) is not None:
        yield Finding(WARN, "database", f"{place} is not there yet", "provisioner serve")
        return
    try:
        with wiring.engine_of(settings).connect() as connection:
            name = connection.dialect.name
    except Exception as error:  # noqa: BLE001  whatever a driver raises is the finding
        # The driver's text may hold the URL, and that a password: its first line does not.
        found = f"not reachable ({type(error).__name__})"
        yield Finding(FAIL, "database", found, "check database.url, and that it is running")
    else:
        yield Finding(OK, "database", f"{name}, reachable")
        if _only_observes(settings):
            yield Finding(WARN, "database", WHY, HINT)


def _only_observes(settings: "Settings") -> bool:
    """Whether the database was restored; False when it is too old to say so."""
    from provisioner import wiring

    try:
        service = wiring.build(settings)
        try:
            with service.store.read() as tx:
                return tx.is_observing()
        finally:
            service.close()
    except Exception:  # noqa: BLE001  whatever a driver raises
        return False


def _clock(settings: "Settings") -> Iterator[Finding]:
    """Whether this machine's clock agrees with the one that services share."""
    from provisioner import wiring
    from provisioner.service.chance import utc_now
    from provisioner.service.clock_watch import ClockWatch

    if settings.database.url.startswith("sqlite"):
        return
    try:
        service = wiring.build(settings)
        try:
            ahead = ClockWatch(service.store, utc_now).ahead()
        finally:
            service.close()
    except Exception:  # noqa: BLE001  whatever a driver raises, which is told elsewhere
        return
    yield clock_finding(ahead)


def clock_finding(ahead: timedelta) -> Finding:
    """Return what is said of a clock that is so far ahead of the database's."""
    from provisioner.core.fleet import CLOCKS_APART
    from provisioner.service import clock_watch

    if abs(ahead) <= CLOCKS_APART:
        return Finding(OK, "clock", "as the database's")
    return Finding(FAIL, "clock", clock_watch.told(ahead), clock_watch.HINT)


def _own_host(settings: "Settings") -> Iterator[Finding]:
    """Which enrolled host this is, if any: that one is never a target."""
    from provisioner import wiring
    from provisioner.own_identity import own_host

    if _missing_database(settings) is not None:
        return
    own = own_host(settings.service.own_hosts)
    try:
        service = wiring.build(settings)
        try:
            found = service.hosts.own(own)
        finally:
            service.close()
    except Exception:  # noqa: BLE001  whatever a driver raises, which is told elsewhere
        return
    what, todo = "the service's own host", "name it in service.own_hosts, if it is enrolled"
    unknown = sorted(own.names - found.keys())
    if unknown:
        yield Finding(WARN, what, f"no host is named {', '.join(unknown)}", "correct the name")
    for name, why in found.items():
        yield Finding(OK, what, f"{name} is never a target: {why}")
    if not found and own.uuid is None:
        yield Finding(WARN, what, "not among the enrolled, and its UUID cannot be read here", todo)


def _missing_database(settings: "Settings") -> Path | None:
    """Return the database's file when it has one that is not there yet."""
    if not settings.database.url.startswith("sqlite:///"):
        return None
    place = Path(settings.database.url.removeprefix("sqlite:///"))
    return None if place.exists() else place


def _pinned_trust(settings: "Settings") -> Iterator[Finding]:
    """Whether hosts believe what the configuration says today: they have it from the ramdisk."""
    from provisioner import wiring
    from provisioner.core.trust import TrustPolicy
    from provisioner.service.ramdisks import Ramdisks

    what, todo = "trust in releases", "provisioner ramdisk build"
    ramdisks = Ramdisks(settings.data_dir / "ramdisks", settings.ramdisk.digest)
    digest = ramdisks.newest_or_none()
    if digest is None:
        return
    pinned = ramdisks.describe(digest).get("release_trust")
    if pinned is None:
        found = f"the ramdisk {digest[:12]} does not say what it pins"
        yield Finding(WARN, what, found, todo)
        return
    try:
        policy = TrustPolicy.parse(json.dumps(pinned).encode())
    except ProvisionerError as error:
        yield Finding(WARN, what, f"the ramdisk {digest[:12]}: {error.message}", todo)
        return
    minimums = _minimum_versions(settings)
    known = policy.minimum_versions if minimums is None else minimums
    differing = policy.differences(wiring.trust_policy(settings, known))
    if differing:
        found = f"the ramdisk {digest[:12]} pins other {', '.join(differing)} than today's"
        yield Finding(WARN, what, found, f"{todo}; a setting that changed needs a restart, too")
    else:
        yield Finding(OK, what, "the ramdisk pins what the configuration says")


def _minimum_versions(settings: "Settings") -> dict[str, str] | None:
    """Return them by image; None when the database cannot be asked, which is told elsewhere."""
    from provisioner import wiring

    if _missing_database(settings) is not None:
        return None
    try:
        service = wiring.build(settings)
        try:
            return service.releases.minimum_versions()
        finally:
            service.close()
    except Exception:  # noqa: BLE001  whatever a driver raises
        return None


def _listeners(settings: "Settings") -> Iterator[Finding]:
    import httpx

    places = {
        "boot listener": (settings.boot.url, True),
        "agent listener": (settings.agent.url, str(settings.keys.agent_tls_pem)),
        "api": (f"http://{settings.api.listen}", True),
    }
    for what, (url, trust) in places.items():
        try:
            verify = _trusting(trust) if isinstance(trust, str) else True
            answer = httpx.get(
                f"{url}/healthz", timeout=ANSWER_LIMIT_S, verify=verify, trust_env=False
            )
            result, found = (
                (OK if answer.is_success else FAIL),
                f"{url} answers {answer.status_code}",
            )
        except httpx.HTTPError as error:
            result, found = WARN, f"{url} does not answer ({type(error).__name__})"
        yield Finding(result, what, found, "is it running? provisioner serve")


def _trusting(certificate: str) -> "ssl.SSLContext":
    import ssl

    return ssl.create_default_context(cafile=certificate)


def _bmcs(settings: "Settings") -> Iterator[Finding]:
    """Ask every BMC, a few at a time, and tell them in the order of their hosts."""
    from concurrent.futures import ThreadPoolExecutor

    from provisioner.client import Client

    with Client(f"http://{settings.api.listen}", settings.keys.admin_token) as client:
        try:
            hosts = client.hosts()
        except ProvisionerError as error:
            yield Finding(FAIL, "bmcs", error.message, error.hint or "")
            return
        asking = ThreadPoolExecutor(BMCS_AT_ONCE)
        try:
            for findings in asking.map(lambda host: _bmc(client, host), hosts):
                yield from findings
        finally:
            asking.shutdown(cancel_futures=True)


def _bmc(client: "Client", host: dict[str, Any]) -> list[Finding]:
    """Return what one BMC says of its power, and how it lets people in."""
    what, name = f"bmc of {host['name']}", host["name"]
    change = f"provisioner host change {name} --bmc ADDRESS --bmc-user USER"
    if host["bmc"] is None:
        return [Finding(WARN, what, "none", change)]
    try:
        state = client.power(name, "status")
    except ProvisionerError as error:
        return [Finding(FAIL, what, error.message, error.hint or change)]
    found = [Finding(OK, what, f"power is {state}")]
    try:
        weak = client.check_bmc(name)
    except ProvisionerError as error:
        return [*found, Finding(WARN, what, error.message, error.hint or "try again")]
    return [*found, *(Finding(WARN, what, one["message"], one["hint"]) for one in weak)]
