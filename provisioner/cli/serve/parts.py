"""The parts of the service as child processes: what each runs, and with what.

Everything heavy is imported by `preload`, in the parent and before it forks, so that the
children share the memory of it.
"""

import errno
import gc
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import structlog

from provisioner import wiring
from provisioner.core.model import Firmware
from provisioner.errors import ConfigError
from provisioner.failpoints import Failpoints, Reach
from provisioner.setting_types import Address
from provisioner.settings import Settings
from provisioner.web.threads import BOOT_THREADS

from .registering import register
from .supervisor import Part

if TYPE_CHECKING:
    from flask import Flask

    from provisioner.netboot.dnsmasq import DhcpEvent
    from provisioner.netboot.tftp import TftpEvent

NAMES: Final = ("api", "boot", "tftp", "dhcp", "worker")
# dhcp asks it which hosts have Secure Boot on. tftp serves without it, and only loses the lines
# that it would write into timelines.
NEED_DATABASE: Final = frozenset({"api", "boot", "dhcp", "worker"})

# Worker processes and threads of each listener.
THREADS: Final = {"api": (1, 16), "boot": (2, BOOT_THREADS), "agent": (1, 16)}
BACKLOG: Final = 1024
# A service that was just killed may hold its addresses for a moment longer.
BIND_WAIT_S: Final = 5.0
BIND_LOOK_S: Final = 0.1
THREAD_STOP_LIMIT_S: Final = 2.0
# A host that lost its power takes nothing more and says nothing: Linux by itself would hold on to
# what it was sent for a quarter of an hour, and to the thread that sends it. Agents ask again.
PEER_SILENCE_S: Final = 120

log = structlog.get_logger(__name__)


def bind_listeners(settings: Settings, only: frozenset[str]) -> dict[str, socket.socket]:
    """Return the listening sockets of the HTTP parts, bound before anything starts.

    Raises one ConfigError that names every address that cannot be had.
    """
    wanted: dict[str, Address] = {}
    if "api" in only:
        wanted["api"] = settings.api.listen
    if "boot" in only:
        wanted |= {"boot": settings.boot.listen, "agent": settings.agent.listen}
    bound, problems = {}, []
    for name, address in wanted.items():
        try:
            bound[name] = _bind(address)
        except OSError as error:
            problems.append(f"  - {name}.listen: {address}: {error.strerror}")
    if problems:
        for sock in bound.values():
            sock.close()
        ports = " or ".join(f"sport = :{address.port}" for address in wanted.values())
        raise ConfigError(
            "listeners cannot be bound:\n" + "\n".join(problems),
            hint=f"`ss -ltnp '{ports}'` shows who has a port, `ip address` this machine's own",
        )
    return bound


def _bind(address: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    ends_at = time.monotonic() + BIND_WAIT_S
    while True:
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, PEER_SILENCE_S * 1000)
            sock.bind((address.host, address.port))
            sock.listen(BACKLOG)
        except OSError as error:
            sock.close()
            # A wrong address stays wrong; only a taken one may become free.
            if error.errno != errno.EADDRINUSE or time.monotonic() >= ends_at:
                raise
            time.sleep(BIND_LOOK_S)
        else:
            return sock


def prepare(settings: Settings, failpoints: Failpoints | None = None) -> None:
    """Bring the database up to date, and tell it which host this is; in a child, so that no
    connection is inherited."""
    reach = _reach(failpoints, "prepare")
    wiring.prepare(settings, reach)
    register(settings, reach)


def _reach(failpoints: Failpoints | None, part: str) -> Reach | None:
    return failpoints.of(part) if failpoints is not None else None


def preload(settings: Settings, only: frozenset[str]) -> None:
    """Import what the children share, and take it out of the collector's sight: a page
    that no collection writes to stays shared."""
    # Building the service imports what it is made of, and connects to nothing.
    wiring.build(settings).close()
    if only & {"api", "boot"}:
        import provisioner.web.agent
        import provisioner.web.boot

        from . import http  # noqa: F401  for the children
    if "api" in only:
        import provisioner.web.api  # noqa: F401  for the children
    gc.collect()
    gc.freeze()


def make_parts(
    settings: Settings,
    only: frozenset[str],
    listeners: dict[str, socket.socket],
    failpoints: Failpoints | None = None,
) -> list[Part]:
    """Return the parts to run, in the order in which they are started."""
    parts = []
    if "worker" in only:
        parts.append(Part("worker", lambda ready: _run_worker(settings, ready, failpoints)))
    for name, threads in THREADS.items():
        if name in listeners:
            parts.append(_http_part(name, settings, listeners[name], threads, failpoints))
    if "tftp" in only:
        parts.append(Part("tftp", lambda ready: _run_tftp(settings, ready), is_vital=False))
    if "dhcp" in only and settings.dhcp.mode != "off":
        # SIGTERM: it has a dnsmasq to end.
        run_dhcp = Part(
            "dhcp", lambda ready: _run_dhcp(settings, ready), signal.SIGTERM, is_vital=False
        )
        parts.append(run_dhcp)
    return parts


def _http_part(
    name: str,
    settings: Settings,
    sock: socket.socket,
    numbers: tuple[int, int],
    failpoints: Failpoints | None,
) -> Part:
    apps: dict[str, Callable[[wiring.Service], Flask]] = {
        "api": wiring.api_app,
        "boot": wiring.boot_app,
        "agent": wiring.agent_app,
    }

    def run(ready: Callable[[], None]) -> None:
        from .http import HttpServer, run_http

        tls = None
        if name == "agent":
            tls = (settings.keys.agent_tls_pem, settings.keys.agent_tls_key)

        def make_app() -> "Flask":
            return apps[name](wiring.build(settings, _reach(failpoints, name)))

        run_http(HttpServer(name, make_app, *numbers, tls), sock, ready)

    return Part(name, run)


def _run_worker(
    settings: Settings, ready: Callable[[], None], failpoints: Failpoints | None
) -> None:
    reach = _reach(failpoints, "worker")
    with _stop_event() as stop, _open(settings, reach) as service:
        worker = wiring.worker(settings, service, reach)
        ready()
        worker.run(stop)


def _run_tftp(settings: Settings, ready: Callable[[], None]) -> None:
    from provisioner.netboot.bootfiles import SIGNED_HINT, boot_files, missing_signed_files
    from provisioner.netboot.network_lines import tftp_line
    from provisioner.netboot.relay import BootRelay
    from provisioner.netboot.tftp import TftpServer
    from provisioner.service.chance import utc_now

    from .network_lines import network_lines

    def tell(event: "TftpEvent") -> None:
        lines.add(tftp_line(event, utc_now()))
        log.info(
            "tftp",
            client=event.client,
            file=event.file,
            outcome=str(event.outcome),
            sent_bytes=event.sent_bytes,
            seconds=round(event.seconds, 3),
        )

    if missing := missing_signed_files():
        names = [str(file) for file in missing]
        log.warning("hosts with Secure Boot on cannot netboot", missing=names, hint=SIGNED_HINT)
    listen = settings.tftp.listen
    server = TftpServer(
        (listen.host, listen.port),
        boot_files(),
        on_event=tell,
        source=BootRelay(settings.boot.url, settings.data_dir / "ramdisks"),
    )
    signal.signal(signal.SIGTERM, lambda *_: server.stop())
    with _open(settings) as service, network_lines(settings, service) as lines:
        ready()
        server.serve()


def _run_dhcp(settings: Settings, ready: Callable[[], None]) -> None:
    from provisioner.netboot.advertise import RouterAdvertiser
    from provisioner.netboot.dhcp import dnsmasq_config
    from provisioner.netboot.dnsmasq import Dnsmasq
    from provisioner.netboot.network_lines import dhcp_line
    from provisioner.netboot.shim_hosts import ShimHosts
    from provisioner.service.chance import utc_now

    from .network import dhcp_mode, netboot_config
    from .network_lines import network_lines

    def tell(event: "DhcpEvent") -> None:
        if (line := dhcp_line(event, utc_now())) is not None:
            lines.add(line)
        log.info("dhcp", kind=event.kind, mac=event.mac, address=event.address, text=event.text)

    network = netboot_config(settings)
    text = dnsmasq_config(network, dhcp_mode(settings))
    folder = settings.data_dir / "dhcp"
    folder.mkdir(mode=0o755, exist_ok=True)
    path = folder / "dnsmasq.conf"
    path.write_text(text, encoding="utf-8")
    dnsmasq = Dnsmasq(path, on_event=tell)
    signal.signal(signal.SIGTERM, lambda *_: dnsmasq.stop())
    advertiser, stop = RouterAdvertiser(settings.dhcp.interface), threading.Event()
    with _open(settings) as service, network_lines(settings, service) as lines:

        def secure_macs() -> Sequence[str]:
            with service.store.read() as tx:
                return tx.macs_of_firmware(Firmware.SECURE_BOOT)

        shim_hosts = ShimHosts(network.hosts_file, secure_macs, on_change=dnsmasq.restart)
        shim_hosts.look()
        threads = [
            threading.Thread(target=advertiser.run, name="advertiser", daemon=True),
            threading.Thread(target=shim_hosts.run, args=(stop,), name="shim-hosts", daemon=True),
        ]
        for thread in threads:
            thread.start()
        try:
            dnsmasq.run(on_start=ready)
        finally:
            stop.set()
            advertiser.stop()
            for thread in threads:
                thread.join(THREAD_STOP_LIMIT_S)


@contextmanager
def _open(settings: Settings, reach: Reach | None = None) -> Iterator[wiring.Service]:
    service = wiring.build(settings, reach)
    try:
        yield service
    finally:
        service.close()


@contextmanager
def _stop_event() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM sets."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    yield stop
