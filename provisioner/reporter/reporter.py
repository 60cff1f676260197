"""Reports home from a freshly deployed host: which release runs, on which disk, how healthy.

Runs after cloud-init's last stage, and reports until its system is proven: each report says
that it still runs, and how. One file, and the standard library only: it is copied to hosts
as it is. It changes nothing on the host but its own configuration, which it removes when its
one-time nonce is spent.
"""

import fcntl
import glob
import hashlib
import json
import os
import re
import socket
import ssl
import struct
import sys
import time

CONFIG = "/etc/provisioner/reporter.json"
RELEASE = "/usr/lib/provisioner/release.json"
PATH = "/report/v1/phone-home"
PROVEN = 200  # or refused for good: nothing more is to be said
ASKED_AGAIN = 202  # accepted, and its health is looked at
SPENT = 410  # the deployment has ended: it was proven before, or given up
ANSWER_BYTES_MAX = 64 * 1024
TIMEOUT_S = 15.0
FIRST_PAUSE_S = 0.5
PAUSE_MAX_S = 30.0
# While it is being proven: three times that without a report, and it counts as gone.
REPORT_EVERY_S = 10.0
# A host that nobody listens to for a day is not being deployed any more. It tries again at
# its next start.
PATIENCE_S = 24 * 3600.0
UNITS_MAX = 100
SIOCGIFADDR = 0x8915
# X509_V_FLAG_NO_CHECK_TIME of OpenSSL's x509_vfy.h, which the ssl module does not name.
NO_CHECK_TIME = 0x200000


def main() -> int:
    """Report until the system is proven, or nobody waits for it any more. Return 0 then, and
    1 when patience ran out."""
    with open(CONFIG, encoding="utf-8") as file:
        config = json.load(file)
    # What the first boot made is on the disk before anyone counts on it: a power cut right
    # after success has left a host with an empty ssh key, and cloud-init makes none again.
    os.sync()
    ends_at = time.monotonic() + PATIENCE_S
    pause_s, pause_max_s = FIRST_PAUSE_S, PAUSE_MAX_S
    while True:
        try:
            body = {"nonce": config["nonce"], **report_from("/")}
            status = send(config["url"], body, config["ca_pem"])
            if status in (PROVEN, SPENT):
                # The nonce is of no use any more, and the file has no other one.
                os.unlink(CONFIG)
                return 0
            if status == ASKED_AGAIN:
                ends_at = time.monotonic() + PATIENCE_S
                if pause_max_s != REPORT_EVERY_S:
                    # The first reports follow soon, for a soak may be short.
                    pause_s, pause_max_s = FIRST_PAUSE_S, REPORT_EVERY_S
            why = f"the service answered {status}"
        except (OSError, ValueError) as error:
            why = str(error) or type(error).__name__
        print(f"not proven yet: {why}; reports again in {pause_s:.1f} s", flush=True)  # noqa: T201 - the journal
        if time.monotonic() + pause_s > ends_at:
            return 1
        time.sleep(pause_s)
        pause_s = min(pause_s * 2, pause_max_s)


def report_from(root: str) -> dict[str, object]:
    """Return what this host is, read below root; what is missing there is None or empty."""
    machine_id = _text(f"{root}/etc/machine-id")
    return {
        "release_id": release_id(root),
        "root_disk": root_disk(root),
        "boot_id": _text(f"{root}/proc/sys/kernel/random/boot_id"),
        "machine_id_digest": hashlib.sha256((machine_id or "").encode()).hexdigest(),
        "ssh_host_keys": [
            _text(path) for path in sorted(glob.glob(f"{root}/etc/ssh/ssh_host_*_key.pub"))
        ],
        "kernel": os.uname().release,
        "os_release": os_release(root),
        "failed_units": failed_units(),
        "addresses": addresses(),
    }


def release_id(root: str) -> object:
    """Return the id that the running root names itself by: the proof of which release runs."""
    try:
        value = json.loads(_text(f"{root}{RELEASE}") or "{}")
    except ValueError:
        return None
    return value.get("release_id") if isinstance(value, dict) else None


def os_release(root: str) -> dict[str, str]:
    """Return ID, VERSION_ID and PRETTY_NAME of /etc/os-release."""
    text = _text(f"{root}/etc/os-release") or ""
    pairs = re.findall(r"^(ID|VERSION_ID|PRETTY_NAME)=[\"']?(.*?)[\"']?$", text, re.MULTILINE)
    return dict(pairs)


def root_disk(root: str) -> dict[str, str | None]:
    """Return name, serial and WWN of the disk that holds the root file system."""
    number = _root_device(root)
    place = os.path.realpath(f"{root}/sys/dev/block/{number}") if number else ""
    # A mapped device lies on others; the first is as good as any to tell which disk it is.
    while place and (below := sorted(glob.glob(f"{place}/slaves/*"))):
        place = os.path.realpath(below[0])
    if place and os.path.exists(f"{place}/partition"):
        place = os.path.dirname(place)
    if not place or not os.path.isdir(place):
        return {"name": None, "serial": None, "wwn": None}
    serial = _text(f"{place}/serial") or _text(f"{place}/device/serial")
    wwn = _text(f"{place}/wwid") or _text(f"{place}/device/wwid")
    return {
        "name": os.path.basename(place),
        "serial": serial or _vital_product_data(place),
        "wwn": wwn if wwn and wwn.startswith(("naa.", "eui.", "uuid.")) else None,
    }


def _root_device(root: str) -> str | None:
    """Return `major:minor` of what is mounted at /, as the kernel lists it."""
    for line in (_text(f"{root}/proc/self/mountinfo") or "").splitlines():
        fields, _, rest = line.partition(" - ")
        words = fields.split()
        if len(words) < 5 or words[4] != "/":
            continue
        if not words[2].startswith("0:"):
            return words[2]
        # btrfs and the like show a number of their own; their source is the device.
        source = rest.split()[1] if len(rest.split()) > 1 else ""
        if source.startswith("/dev/") and os.path.exists(source):
            device = os.stat(source).st_rdev
            return f"{os.major(device)}:{os.minor(device)}"
    return None


def _vital_product_data(place: str) -> str | None:
    """Return a SCSI disk's serial: page 0x80, behind 4 bytes of header."""
    try:
        with open(f"{place}/device/vpd_pg80", "rb") as file:
            return file.read(260)[4:].decode("ascii", "replace").replace("\0", "").strip() or None
    except OSError:
        return None


def failed_units() -> list[str]:
    """Return the names of the units that systemd calls failed."""
    command = "systemctl list-units --state=failed --plain --no-legend 2> /dev/null"
    with os.popen(command) as pipe:
        return [line.split()[0] for line in pipe if line.split()][:UNITS_MAX]


def addresses() -> list[str]:
    """Return the IPv4 addresses of all interfaces but the loopback."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue
            found.append(socket.inet_ntoa(answer[20:24]))
    return [address for address in found if not address.startswith("127.")]


def send(url: str, body: dict[str, object], ca_pem: str) -> int:
    """Post the report over TLS to the holder of the pinned certificate; return the status.

    Raises OSError or ValueError when there was no answer. Not http.client: importing it
    takes as long as all the rest on a slow host.
    """
    match = re.fullmatch(r"https://([^/:\[\]]+)(?::(\d+))?(/[!-~]*)?", url)
    if match is None:
        raise ValueError(f"not an https URL: {url!r}")
    host, port, prefix = match[1], int(match[2] or 443), (match[3] or "").rstrip("/")
    data = json.dumps(body).encode()
    head = (
        f"POST {prefix}{PATH} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=ca_pem)
    # The certificate itself is pinned, and this host's clock may not be right yet.
    context.verify_flags |= NO_CHECK_TIME
    with (
        socket.create_connection((host, port), timeout=TIMEOUT_S) as plain,
        context.wrap_socket(plain) as connection,
    ):
        connection.sendall(head.encode("ascii") + data)
        return _status(connection)


def _status(connection: socket.socket) -> int:
    answer = b""
    while b"\r\n" not in answer and len(answer) < ANSWER_BYTES_MAX:
        more = connection.recv(ANSWER_BYTES_MAX)
        if not more:
            break
        answer += more
    match = re.match(rb"HTTP/1\.[01] (\d{3})[ \r]", answer)
    if match is None:
        raise ValueError(f"not an HTTP answer: {answer[:40]!r}")
    return int(match[1])


def _text(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(1 << 20).strip() or None
    except OSError:
        return None


if __name__ == "__main__":
    sys.exit(main())
