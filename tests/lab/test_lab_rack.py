"""The lab's hosts and BMCs do what hardware does, seen by ipmitool and by the firmware."""

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from provisioner.errors import Conflict, DeviceError, NotFound, RequestError
from provisioner.lab import Lab, LabHost
from provisioner.lab.model import read_description
from tests.parts.processes import until

pytestmark = pytest.mark.lab

SCRIPT_LIMIT = timedelta(minutes=5)
SETTLE_LIMIT_S = 60
# How long ipmitool waits for an answer, and how long for one that is not to come.
ANSWER_LIMIT_S = 10
SILENCE_S = 1
COMMANDS_MAX = 20
# What everybody on a machine sees of a process, and what its owner does.
SHOWN = ("cmdline", "environ")
DNSMASQ = """\
port=0
interface=br0
bind-interfaces
dhcp-range=10.77.0.100,10.77.0.200,255.255.255.0,1h
no-ping
leasefile-ro
log-facility={directory}/dnsmasq.log
dhcp-match=set:ipxe,175
dhcp-match=set:efi,option:client-arch,7
dhcp-option=encap:175,176,1b
dhcp-boot=tag:!ipxe,tag:efi,snponly.efi
dhcp-boot=tag:ipxe,http://10.77.0.1:8081/script.ipxe
enable-tftp
tftp-root=/usr/lib/ipxe
tftp-no-fail
user=root
"""
# Boot sectors, as bytes of 16-bit machine code: reset by the keyboard controller; power off by
# ACPI (the register's address is SeaBIOS's choice for this machine); write 8 KiB after 8 KiB
# from sector 64 on, by INT 13h function 43h, for ever, or until it fails and then power off.
RESETS = bytes.fromhex("b0fe e664 f4 ebfd")
POWERS_OFF = bytes.fromhex("ba0406 b80020 ef f4 ebfd")
WRITES_ON = bytes.fromhex(
    "31c0 8ed8 be147c b80043 cd13 6683061c7c10 ebf0 1000 1000 007c 0000 4000000000000000"
)
WRITES_UNTIL_ERROR = bytes.fromhex(
    "31c0 8ed8 be207c b80043 cd13 7208 668306287c10 ebee ba0406 b80020 ef f4ebfd"
    "1000 1000 007c 0000 4000000000000000"
)


def put_boot_sector(lab: Lab, host: str, code: bytes) -> None:
    """Wipe the first disk and have it start this code."""
    first = lab.host(host).disks[0]
    with open(first.path, "wb") as disk:
        disk.truncate(first.size_bytes)
        disk.write(code.ljust(510, b"\0") + b"\x55\xaa")


def ipmi(
    lab: Lab,
    host: str,
    *command: str,
    password: str | None = None,
    answer_limit_s: int = ANSWER_LIMIT_S,
) -> str:
    """Run ipmitool against a host's BMC and return its output; raises when it fails."""
    bmc = lab.host(host).bmc
    secret = lab.directory / "password"
    secret.touch(mode=0o600)
    secret.write_text(password or bmc.password)
    # Cipher 3 is named, because ipmitool else asks for a list that ipmi_sim does not have.
    done = lab.run(
        [
            *("ipmitool", "-f", str(secret), "-I", "lanplus", "-C", "3"),
            *("-N", str(answer_limit_s), "-R", "1"),
            *("-H", bmc.address, "-p", str(bmc.port), "-U", bmc.user, *command),
        ]
    )
    if done.returncode != 0:
        raise DeviceError(done.stderr.strip(), host=host)
    return done.stdout.strip()


def wait_for_power(lab: Lab, host: str, wanted: str) -> None:
    until(lambda: lab.status_of(host).power == wanted, SETTLE_LIMIT_S)


def wait_for_boots(lab: Lab, host: str, count: int) -> None:
    until(lambda: len(lab.boots(host)) >= count, SCRIPT_LIMIT.total_seconds())


@pytest.fixture
def rack(lab_rack: Lab) -> Iterator[Lab]:
    """The shared rack with every host off, no boot flag and no fault."""
    for host in lab_rack.hosts:
        lab_rack.clear(host.name)
        lab_rack.power(host.name, "off")
        ipmi(lab_rack, host.name, "chassis", "bootdev", "none")
    yield lab_rack
    for host in lab_rack.hosts:
        lab_rack.power(host.name, "off")


@pytest.fixture
def script(rack: Lab) -> Iterator[Path]:
    """A network that boots hosts into the iPXE script in this file."""
    served, log = rack.directory / "served", rack.directory / "dnsmasq.log"
    served.mkdir(exist_ok=True)
    log.unlink(missing_ok=True)
    configuration = rack.directory / "dnsmasq.conf"
    configuration.write_text(DNSMASQ.format(directory=rack.directory))
    http = [*(sys.executable, "-m", "http.server", "8081", "--bind", "10.77.0.1")]
    commands = [
        ["/usr/sbin/dnsmasq", "--keep-in-foreground", f"--conf-file={configuration}"],
        [*http, "--directory", str(served)],
    ]
    servers = [
        subprocess.Popen([*rack.nsenter_argv(), *command], stderr=subprocess.DEVNULL)
        for command in commands
    ]
    # A host tries its network once, and then its disk.
    knock = ["bash", "-c", "true < /dev/tcp/10.77.0.1/8081"]
    until(lambda: rack.run(knock).returncode == 0, SETTLE_LIMIT_S)
    until(lambda: log.exists() and "started" in log.read_text(), SETTLE_LIMIT_S)
    yield served / "script.ipxe"
    for server in servers:
        server.kill()
        server.wait()


def test_power_commands_by_ipmi_are_done_and_told_truly(rack: Lab) -> None:
    assert ipmi(rack, "lab-1", "chassis", "power", "status") == "Chassis Power is off"
    ipmi(rack, "lab-1", "chassis", "power", "on")
    assert ipmi(rack, "lab-1", "chassis", "power", "status") == "Chassis Power is on"
    assert rack.status_of("lab-1").power == "on"
    assert rack.status_of("lab-2").power == "off"
    ipmi(rack, "lab-1", "chassis", "power", "on")
    ipmi(rack, "lab-1", "chassis", "power", "off")
    ipmi(rack, "lab-1", "chassis", "power", "off")
    assert ipmi(rack, "lab-1", "chassis", "power", "status") == "Chassis Power is off"
    with pytest.raises(DeviceError):
        ipmi(rack, "lab-1", "chassis", "power", "reset")


def test_a_chassis_command_is_answered_well_within_half_a_second(rack: Lab) -> None:
    """The best of many, because a busy machine delays ipmitool itself."""
    seconds = list[float]()
    while len(seconds) < COMMANDS_MAX and min(seconds, default=0.5) >= 0.5:
        started = time.monotonic()
        ipmi(rack, "lab-1", "chassis", "power", ("on", "off")[len(seconds) % 2])
        seconds.append(time.monotonic() - started)
    assert min(seconds) < 0.5


def test_wrong_password_is_refused(rack: Lab) -> None:
    with pytest.raises(DeviceError):
        ipmi(
            *(rack, "lab-1", "chassis", "power", "status"),
            password="wrong",
            answer_limit_s=SILENCE_S,
        )


def test_bios_one_time_network_boot_is_honoured_once(rack: Lab, script: Path) -> None:
    """The script runs, its `exit` leads to the disk, and the restart from there to the disk."""
    script.write_text("#!ipxe\necho lab-${net0/mac}-${serial}-ran\nexit\n")
    put_boot_sector(rack, "lab-1", RESETS)
    before = len(rack.boots("lab-1"))
    said_before = len(rack.console("lab-1"))
    ipmi(rack, "lab-1", "chassis", "bootdev", "pxe")
    assert rack.status_of("lab-1").next_boot == "network (once)"
    ipmi(rack, "lab-1", "chassis", "power", "on")
    wait_for_boots(rack, "lab-1", before + 3)
    assert "lab-52:54:00:77:00:01-SN-lab-1-ran" in rack.console("lab-1")[said_before:]
    boots = [(boot.cause, boot.first, boot.flag) for boot in rack.boots("lab-1")[before:]]
    assert boots[:3] == [
        ("power-on", "network", "once"),
        ("guest-reset", "disk", None),
        ("guest-reset", "disk", None),
    ]
    assert rack.status_of("lab-1").next_boot is None


def test_uefi_one_time_network_boot_is_honoured_once(rack: Lab, script: Path) -> None:
    script.write_text("#!ipxe\necho lab-${net0/mac}-${serial}-ran\necho\nreboot\n")
    before = len(rack.boots("lab-2"))
    said_before = len(rack.console("lab-2"))
    ipmi(rack, "lab-2", "chassis", "bootdev", "pxe", "options=efiboot")
    ipmi(rack, "lab-2", "chassis", "power", "on")
    wait_for_boots(rack, "lab-2", before + 2)
    assert "lab-52:54:00:77:00:02-SN-lab-2-ran" in rack.console("lab-2")[said_before:]
    boots = [(boot.cause, boot.first, boot.flag) for boot in rack.boots("lab-2")[before:]]
    assert boots[:2] == [("power-on", "network", "once"), ("guest-reset", "disk", None)]
    assert rack.status_of("lab-2").next_boot is None


def test_a_guest_that_powers_off_is_off(rack: Lab) -> None:
    put_boot_sector(rack, "lab-1", POWERS_OFF)
    before = len(rack.boots("lab-1"))
    ipmi(rack, "lab-1", "chassis", "power", "on")
    wait_for_power(rack, "lab-1", "off")
    assert ipmi(rack, "lab-1", "chassis", "power", "status") == "Chassis Power is off"
    assert len(rack.boots("lab-1")) == before + 1


def test_fault_power_cut_in_the_middle_of_a_write(rack: Lab) -> None:
    """What was written before the cut is there, and little after it: on a busy machine the host
    goes on for a while before its cable is pulled."""
    cut_at, mib = 8 * 1024 * 1024, 1024 * 1024
    put_boot_sector(rack, "lab-1", WRITES_ON)
    rack.fault("lab-1", "power-cut-at-byte", cut_at)
    rack.power("lab-1", "on")
    wait_for_power(rack, "lab-1", "off")
    assert rack.status_of("lab-1").faults == {}
    with open(rack.host("lab-1").disks[0].path, "rb") as disk:
        disk.seek(cut_at - 8192)
        assert disk.read(8) == WRITES_ON[:8]
        disk.seek(cut_at + 512 * mib)
        assert disk.read(8192) == bytes(8192)


def test_fault_disk_error_stops_a_write_there(rack: Lab) -> None:
    bad_byte = 2 * 1024 * 1024
    put_boot_sector(rack, "lab-1", WRITES_UNTIL_ERROR)
    rack.fault("lab-1", "disk-error-at-byte", bad_byte)
    rack.power("lab-1", "on")
    wait_for_power(rack, "lab-1", "off")
    with open(rack.host("lab-1").disks[0].path, "rb") as disk:
        disk.seek(bad_byte - 8192)
        assert disk.read(8) == WRITES_UNTIL_ERROR[:8]
        disk.seek(bad_byte)
        assert disk.read(8192) == bytes(8192)


def test_persistent_boot_device_stays_until_it_is_cleared(rack: Lab) -> None:
    ipmi(rack, "lab-1", "chassis", "bootdev", "pxe", "options=persistent")
    before = len(rack.boots("lab-1"))
    for _ in range(2):
        rack.power("lab-1", "on")
        rack.power("lab-1", "off")
    ipmi(rack, "lab-1", "chassis", "bootdev", "none")
    rack.power("lab-1", "on")
    boots = [(boot.first, boot.flag) for boot in rack.boots("lab-1")[before:]]
    assert boots == [("network", "persistent"), ("network", "persistent"), ("disk", None)]


def test_a_reset_that_comes_twice_starts_the_host_once(rack: Lab) -> None:
    rack.power("lab-1", "on")
    before = len(rack.boots("lab-1"))
    ipmi(rack, "lab-1", "chassis", "bootdev", "pxe")
    ipmi(rack, "lab-1", "chassis", "power", "reset")
    ipmi(rack, "lab-1", "chassis", "power", "reset")
    assert [(boot.cause, boot.first) for boot in rack.boots("lab-1")[before:]] == [
        ("reset", "network")
    ]


def test_power_cycle_comes_back_on(rack: Lab) -> None:
    ipmi(rack, "lab-1", "chassis", "power", "on")
    before = len(rack.boots("lab-1"))
    ipmi(rack, "lab-1", "chassis", "power", "cycle")
    wait_for_boots(rack, "lab-1", before + 1)
    wait_for_power(rack, "lab-1", "on")
    assert rack.boots("lab-1")[before].cause == "power-on", "it was off meanwhile"


def test_soft_off_presses_the_power_button(rack: Lab) -> None:
    rack.power("lab-1", "on")
    before = rack.status_of("lab-1").soft_offs
    ipmi(rack, "lab-1", "chassis", "power", "soft")
    until(lambda: rack.status_of("lab-1").soft_offs > before, SETTLE_LIMIT_S)
    rack.fault("lab-1", "soft-off-ignored")
    ipmi(rack, "lab-1", "chassis", "power", "soft")
    assert rack.status_of("lab-1").soft_offs == before + 1


def test_fault_bmc_silent(rack: Lab) -> None:
    rack.fault("lab-1", "bmc-silent")
    with pytest.raises(DeviceError):
        ipmi(rack, "lab-1", "chassis", "power", "on", answer_limit_s=SILENCE_S)
    assert ipmi(rack, "lab-2", "chassis", "power", "status") == "Chassis Power is off"
    rack.clear("lab-1", "bmc-silent")
    assert ipmi(rack, "lab-1", "chassis", "power", "status") == "Chassis Power is off"


@pytest.mark.parametrize(
    ("fault", "value", "options", "kept"),
    [
        ("bmc-forgets-boot", None, "persistent", None),
        ("bmc-forgets-boot", "once", "efiboot", None),
        ("bmc-forgets-boot", "once", "persistent", "network (persistent)"),
        ("bmc-needs-efi-bit", None, "", None),
        ("bmc-needs-efi-bit", None, "efiboot", "network (once)"),
    ],
)
def test_faults_of_the_boot_device(
    rack: Lab, fault: str, value: str | None, options: str, kept: str | None
) -> None:
    rack.fault("lab-1", fault, value)
    command = ["chassis", "bootdev", "pxe", *([f"options={options}"] if options else [])]
    assert ipmi(rack, "lab-1", *command) == "Set Boot Device to pxe"
    assert rack.status_of("lab-1").next_boot == kept


def test_faults_of_power(rack: Lab) -> None:
    rack.fault("lab-1", "bmc-lies-power", "on")
    assert ipmi(rack, "lab-1", "chassis", "power", "status") == "Chassis Power is on"
    assert rack.status_of("lab-1").power == "off"
    rack.clear("lab-1")
    rack.fault("lab-1", "bmc-ignores-power")
    ipmi(rack, "lab-1", "chassis", "power", "on")
    assert ipmi(rack, "lab-1", "chassis", "power", "status") == "Chassis Power is off"
    rack.clear("lab-1")
    rack.fault("lab-1", "bmc-slow", 0.5)
    started = time.monotonic()
    ipmi(rack, "lab-1", "chassis", "power", "status")
    assert time.monotonic() - started > 0.5


def test_faults_of_disks_are_there_from_the_next_start(rack: Lab) -> None:
    rack.fault("lab-1", "second-disk", 100)
    rack.fault("lab-1", "small-disk")
    rack.power("lab-1", "on")
    mib = 1024 * 1024
    assert rack.boots("lab-1")[-1].disks == {"LAB-lab-1-0": 64 * mib, "LAB-lab-1-1": 100 * mib}
    rack.clear("lab-1")
    rack.fault("lab-1", "no-disk")
    rack.power("lab-1", "reset")
    wait_for_power(rack, "lab-1", "on")
    rack.power("lab-1", "off")
    rack.power("lab-1", "on")
    assert rack.boots("lab-1")[-1].disks == {}


def test_fault_network_first_and_link_down(rack: Lab) -> None:
    rack.fault("lab-1", "network-first")
    rack.power("lab-1", "on")
    assert (rack.boots("lab-1")[-1].first, rack.boots("lab-1")[-1].flag) == ("network", None)
    assert "LOWER_UP" in rack.run(["ip", "link", "show", "tap1"]).stdout
    rack.fault("lab-1", "link-down")
    assert "LOWER_UP" not in rack.run(["ip", "link", "show", "tap1"]).stdout
    rack.clear("lab-1", "link-down")
    assert "LOWER_UP" in rack.run(["ip", "link", "show", "tap1"]).stdout


def test_unknown_host_and_fault_are_named(rack: Lab) -> None:
    with pytest.raises(NotFound, match="no such host"):
        rack.power("lab-9", "on")
    with pytest.raises(RequestError, match="no such fault"):
        rack.fault("lab-1", "gremlins")
    with pytest.raises(RequestError, match="cannot be reset"):
        rack.power("lab-1", "reset")


def test_down_leaves_no_process_and_no_secret(lab_directory: Path) -> None:
    lab = Lab.up(lab_directory, [LabHost("bios", disks_mib=(64,))])
    assert stat.S_IMODE((lab_directory / "lab.json").stat().st_mode) == 0o600
    lab.power("lab-1", "on")
    network = _network_of(lab)
    # unshare, holder, ipmi_sim and QEMU; of what they had started at first nothing stays.
    until(lambda: len(_processes_in(network)) == 4, SETTLE_LIMIT_S)
    with pytest.raises(Conflict, match="already up"):
        Lab.up(lab_directory, [LabHost("bios")])
    password = lab.host("lab-1").bmc.password.encode()
    lab.down()
    lab.down()
    assert _processes_in(network) == []
    left = [path for path in lab_directory.rglob("*") if path.is_file()]
    assert lab.console_path("lab-1") in left
    assert not [path for path in left if path.suffix == ".raw"]
    assert not [path for path in left if password in path.read_bytes()]
    with pytest.raises(NotFound):
        Lab.open(lab_directory)


def test_when_the_holder_dies_nothing_is_left_behind(lab_directory: Path) -> None:
    lab = Lab.up(lab_directory, [LabHost("bios", disks_mib=(64,))])
    lab.power("lab-1", "on")
    network = _network_of(lab)
    holder = read_description(lab_directory).holder
    assert holder is not None
    os.kill(holder.pid, signal.SIGKILL)
    until(lambda: not _processes_in(network), SETTLE_LIMIT_S)
    found = Lab.open(lab_directory)
    assert not found.is_up
    with pytest.raises(NotFound, match="has died"):
        found.status()
    found.down()
    assert not (lab_directory / "lab.json").exists()
    with Lab.up(lab_directory, [LabHost("bios", disks_mib=(64,))]) as again:
        assert again.is_up


def test_no_password_stands_in_a_process_list(rack: Lab) -> None:
    assert _processes_in(_network_of(rack))
    passwords = [host.bmc.password.encode() for host in rack.hosts]
    for pid in _processes_in(_network_of(rack)):
        try:
            said = b"".join(Path(f"/proc/{pid}/{name}").read_bytes() for name in SHOWN)
        except OSError:
            continue  # it ended while we looked
        assert not any(password in said for password in passwords)


def _network_of(lab: Lab) -> int:
    """Return the number of the lab's network namespace."""
    target = next(word for word in lab.nsenter_argv() if word.startswith("--target="))
    return os.stat(f"/proc/{target.partition('=')[2]}/ns/net").st_ino


def _processes_in(network: int) -> list[int]:
    """Return the processes that are in this network namespace."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.stat(entry / "ns/net").st_ino == network:
                found.append(int(entry.name))
        except OSError:
            continue  # it ended while we looked
    return found
