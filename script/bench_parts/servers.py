"""Runs the reference's own servers, nginx and dnsmasq, inside the lab's network."""

import contextlib
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from provisioner.errors import Unavailable
from provisioner.lab.lab import Lab
from provisioner.lab.model import BRIDGE, BRIDGE_ADDRESS

READY_LIMIT_S: Final = 20.0
STOP_LIMIT_S: Final = 10.0

_NGINX: Final = """
daemon off;
user root;
worker_processes 2;
pid {folder}/nginx.pid;
error_log {folder}/nginx.err warn;
events {{ worker_connections 1024; }}
http {{
    log_format times '$msec $status $body_bytes_sent $request_time $uri';
    access_log {log};
    sendfile on;
    tcp_nopush on;
    keepalive_requests 1000000;
    open_file_cache max=10000;
    default_type application/octet-stream;
    client_body_temp_path {folder}/nginx-body;
    proxy_temp_path {folder}/nginx-proxy;
    fastcgi_temp_path {folder}/nginx-fastcgi;
    uwsgi_temp_path {folder}/nginx-uwsgi;
    scgi_temp_path {folder}/nginx-scgi;
    server {{
        listen {address}:{port} backlog=1024;
        root {root};
    }}
}}
"""


def nginx(
    lab: Lab, folder: Path, root: Path, port: int, *, log: Path | None = None
) -> contextlib.AbstractContextManager[None]:
    """Serve `root` on the lab's bridge, with the settings nginx is fast with."""
    config = folder / "nginx.conf"
    config.write_text(
        _NGINX.format(
            folder=folder,
            root=root,
            port=port,
            address=BRIDGE_ADDRESS,
            log=f"{log} times" if log else "off",
        )
    )
    return running(lab, ["nginx", "-c", str(config), "-p", str(folder)], folder / "nginx", port)


def dnsmasq(lab: Lab, folder: Path, boot_file: str) -> contextlib.AbstractContextManager[None]:
    """Give out addresses and one boot script, with what makes iPXE wait for nothing."""
    config = folder / "dnsmasq.conf"
    lines = [
        *("port=0", "no-resolv", "no-hosts", f"interface={BRIDGE}", "except-interface=lo"),
        *("bind-interfaces", f"dhcp-leasefile={folder / 'leases'}"),
        *(f"pid-file={folder / 'dnsmasq.pid'}", "log-facility=-", "user=root"),
        *("dhcp-range=10.77.0.100,10.77.0.250,255.255.255.0,1h", "dhcp-authoritative"),
        *("no-ping", "dhcp-option=option:router", "dhcp-option=option:dns-server"),
        *("dhcp-match=set:ipxe,175", f"dhcp-boot=tag:ipxe,{boot_file},,{BRIDGE_ADDRESS}"),
        "dhcp-option=tag:ipxe,encap:175,176,1b",
    ]
    config.write_text("\n".join(lines) + "\n")
    command = ["dnsmasq", "--keep-in-foreground", f"--conf-file={config}"]
    return running(lab, command, folder / "dnsmasq", None)


@contextlib.contextmanager
def running(lab: Lab, command: Sequence[str], log: Path, port: int | None) -> Iterator[None]:
    """Run a server in the lab's network while the block runs, once its TCP port answers."""
    with log.with_suffix(".log").open("ab") as file:
        process = subprocess.Popen(
            [*lab.nsenter_argv(), *command], stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )
    try:
        if port is not None:
            wait_for_port(lab, process, port)
        yield
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process that we started, and return when it has ended."""
    process.terminate()
    try:
        process.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_for_port(lab: Lab, process: subprocess.Popen[bytes], port: int) -> None:
    """Return when the port of the bridge's address is listened on."""
    deadline = time.monotonic() + READY_LIMIT_S
    while True:
        said = lab.run(["ss", "-Hltn", f"sport = :{port}"]).stdout
        if said.strip():
            return
        if process.poll() is not None or time.monotonic() > deadline:
            raise Unavailable(f"nothing listens on port {port} of the lab", found=process.args)
        time.sleep(0.05)
