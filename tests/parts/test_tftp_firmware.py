"""QEMU's firmwares netboot from our DHCP, TFTP and boot scripts, and come up from their disk.

A BIOS with iPXE in its NIC, which chains to our undionly.kpxe, and a UEFI whose own PXE
loads our snponly.efi; with our DHCP alone, and as a proxy beside another server.
"""

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from provisioner.core.bootplan import LocalDisk, Ramdisk
from provisioner.core.model import LocalBoot, Secret
from provisioner.netboot.dhcp import DhcpMode
from provisioner.netboot.scripts import BootUrls, render_boot_script

from .netboot_network import Network, network, our_dhcp, running, site_dhcp
from .processes import until

pytestmark = pytest.mark.lab

BOOT_LIMIT_S = 600
START_LIMIT_S = 60
LAST_WORD_LIMIT_S = 60
LISTENS = '{"listens": true}'
URLS = BootUrls(boot="http://10.77.0.1:8081", agent="https://10.77.0.1:8443")
OVMF = Path("/usr/share/OVMF")

_TFTP_PROGRAM = """
import json
from provisioner.netboot.bootfiles import boot_files
from provisioner.netboot.tftp import TftpServer
def tell(event):
    print(json.dumps({"file": event.file, "outcome": event.outcome}), flush=True)
server = TftpServer(("10.77.0.1", 69), boot_files(), on_event=tell)
print(json.dumps({"listens": True}), flush=True)
server.serve()
"""
# Answers the n-th request for a boot script with the n-th script, and then with the last.
# No script at all is a 404.
_HTTP_PROGRAM = """
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
scripts = sys.argv[1:]
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        print(json.dumps({"path": self.path}), flush=True)
        text = ""
        if self.path.startswith("/boot/ipxe?"):
            text = scripts.pop(0) if len(scripts) > 1 else scripts[0]
        body = text.encode()
        self.send_response(200 if text.startswith("#!ipxe") else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *arguments):
        pass
server = HTTPServer(("10.77.0.1", 8081), Handler)
print(json.dumps({"listens": True}), flush=True)
server.serve_forever()
"""


def script(method: LocalBoot) -> str:
    if method is LocalBoot.NOT_FOUND:
        return ""
    return render_boot_script(LocalDisk(method, ""), URLS)


@pytest.fixture
def net() -> Iterator[Network]:
    with network() as made:
        made.service.ip("tuntap", "add", "tap0", "mode", "tap")
        made.service.ip("link", "set", "tap0", "master", "br0", "up")
        yield made


@contextmanager
def booting(net: Network, firmware: list[str], disk: Path, scripts: list[str]) -> Iterator[Path]:
    """Run a guest with our TFTP and the scripts; give the file its serial console fills."""
    console = net.folder / "console"
    nic = ["-netdev", "tap,id=n0,ifname=tap0,script=no,downscript=no"]
    drive = ["-drive", f"if=none,id=d0,format=raw,file={disk}"]
    guest = net.service.command(
        *["qemu-system-x86_64", "-accel", "tcg,thread=multi", "-m", "256", "-display", "none"],
        *["-machine", "q35,graphics=off", "-monitor", "none", "-serial", f"file:{console}"],
        *["-smbios", "type=1,serial=A B&c", *firmware, *nic, *drive],
        *["-device", "virtio-blk-pci,drive=d0,bootindex=1"],
    )
    with ExitStack() as stack:
        for name, program, arguments in (
            ("tftp", _TFTP_PROGRAM, []),
            ("http", _HTTP_PROGRAM, scripts),
        ):
            command = net.service.python(program, *arguments)
            log = net.folder / f"{name}.log"
            stack.enter_context(running(command, log))
            # A firmware that is refused once goes on to its disk.
            until(lambda log=log: LISTENS in log.read_text(), START_LIMIT_S)  # type: ignore[misc] # bound now
        stack.enter_context(running(guest, net.folder / "qemu.log"))
        yield console


def wait_for(console: Path, text: str) -> None:
    deadline = time.monotonic() + BOOT_LIMIT_S
    while time.monotonic() < deadline:
        if console.exists() and text in console.read_text(errors="replace"):
            return
        time.sleep(0.2)
    raise AssertionError(f"never saw {text!r}:\n{console.read_text(errors='replace')[-3000:]}")


def bios() -> list[str]:
    return ["-device", "virtio-net-pci,netdev=n0,mac=52:54:00:77:00:01,bootindex=0"]


def uefi(net: Network) -> list[str]:
    variables = net.folder / "variables.fd"
    shutil.copy(OVMF / "OVMF_VARS_4M.fd", variables)
    code = f"if=pflash,format=raw,readonly=on,file={OVMF / 'OVMF_CODE_4M.fd'}"
    # Without a ROM in the NIC, as on most servers: the firmware's own PXE does it.
    nic = "virtio-net-pci,netdev=n0,mac=52:54:00:77:00:01,bootindex=0,romfile="
    return ["-drive", code, "-drive", f"if=pflash,format=raw,file={variables}", "-device", nic]


def bios_disk(net: Network) -> Path:
    """A disk whose boot sector writes DISK-BOOTED to the serial port, and halts."""
    # cli; xor ax,ax; mov ds,ax; mov si,text / lodsb; test al,al; jz halt; mov bl,al /
    # wait for the port: mov dx,3fd; in al,dx; test al,20; jz / mov dl,f8; mov al,bl; out
    code = "fa31c08ed8be257cac84c07411 88c3bafd03eca82074fbb2f888d8ee ebea f4ebfd"
    program = bytes.fromhex(code.replace(" ", ""))
    text = b"\r\nDISK-BOOTED\r\n\0"
    image = program.ljust(0x25, b"\x90") + text
    disk = net.folder / "disk.img"
    disk.write_bytes((image.ljust(510, b"\0") + b"\x55\xaa").ljust(1 << 20, b"\0"))
    return disk


def uefi_disk(net: Network) -> Path:
    """A disk with the program that UEFI starts from one; it says DISK-BOOTED."""
    config, program = net.folder / "grub.cfg", net.folder / "BOOTX64.EFI"
    config.write_text("serial\nterminal_output serial\necho DISK-BOOTED\nsleep 600\n")
    modules = ["serial", "terminal", "echo", "sleep"]
    command = ["grub-mkimage", "-O", "x86_64-efi", "-p", "/", "-c", str(config)]
    subprocess.run([*command, "-o", str(program), *modules], check=True, capture_output=True)
    disk = net.folder / "disk.img"
    with disk.open("wb") as file:
        file.truncate(4 << 20)
    for tool in (
        ["mkfs.vfat", str(disk)],
        ["mmd", "-i", str(disk), "::EFI", "::EFI/BOOT"],
        ["mcopy", "-i", str(disk), str(program), "::EFI/BOOT/"],
    ):
        subprocess.run(tool, check=True, capture_output=True)
    return disk


def heard(net: Network) -> str:
    """Return what the TFTP and HTTP servers reported."""
    return (net.folder / "tftp.log").read_text() + (net.folder / "http.log").read_text()


def wait_to_hear(net: Network, said: str) -> None:
    """The host goes on with what it received before we have read its last word."""
    until(lambda: said in heard(net), LAST_WORD_LIMIT_S)


@pytest.mark.parametrize("method", [LocalBoot.EXIT, LocalBoot.SANBOOT, LocalBoot.NOT_FOUND])
def test_field_03_a_bios_comes_up_from_its_disk_in_each_way(
    net: Network, method: LocalBoot
) -> None:
    with our_dhcp(net, DhcpMode.FULL), booting(net, bios(), bios_disk(net), [script(method)]) as c:
        wait_for(c, "DISK-BOOTED")
    said = heard(net)
    assert "/boot/ipxe?mac=52-54-00-77-00-01&uuid=" in said
    assert "&serial=A%20B" in said
    assert "&platform=pcbios" in said


def test_a_bios_runs_our_ipxe_from_our_tftp(net: Network) -> None:
    chain = "#!ipxe\nchain tftp://10.77.0.1/undionly.kpxe\n"
    scripts = [chain, script(LocalBoot.EXIT)]
    with our_dhcp(net, DhcpMode.FULL), booting(net, bios(), bios_disk(net), scripts) as console:
        wait_for(console, "DISK-BOOTED")
        wait_to_hear(net, '{"file": "undionly.kpxe", "outcome": "served"}')
    assert heard(net).count("/boot/ipxe?mac=52-54-00-77-00-01") == 2


@pytest.mark.parametrize("mode", [DhcpMode.FULL, DhcpMode.PROXY])
def test_field_17_a_uefi_netboots_and_comes_up_from_its_disk(net: Network, mode: DhcpMode) -> None:
    with ExitStack() as stack:
        if mode is DhcpMode.PROXY:
            stack.enter_context(site_dhcp(net))
        stack.enter_context(our_dhcp(net, mode))
        scripts = [script(LocalBoot.SANBOOT)]
        console = stack.enter_context(booting(net, uefi(net), uefi_disk(net), scripts))
        wait_for(console, "DISK-BOOTED")
        wait_to_hear(net, '{"file": "snponly.efi", "outcome": "served"}')
        wait_to_hear(net, '{"file": "disk.efi", "outcome": "served"}')
    assert "&platform=efi" in heard(net)


def test_a_uefi_goes_on_to_its_next_entry_after_exit(net: Network) -> None:
    """An exit that succeeded would end at the boot manager's menu instead."""
    scripts = [script(LocalBoot.EXIT)]
    with our_dhcp(net, DhcpMode.FULL), booting(net, uefi(net), uefi_disk(net), scripts) as console:
        wait_for(console, "PXE over IPv6")
        assert 'failed to start Boot0002 "UEFI PXEv4' in console.read_text(errors="replace")


def test_a_bios_whose_ramdisk_cannot_be_fetched_comes_up_from_its_disk(net: Network) -> None:
    plan = Ramdisk(digest="ab" * 32, ticket=Secret("tk_1"), local_boot=LocalBoot.SANBOOT)
    scripts = [render_boot_script(plan, URLS)]
    with our_dhcp(net, DhcpMode.FULL), booting(net, bios(), bios_disk(net), scripts) as console:
        wait_for(console, "DISK-BOOTED")
    assert heard(net).count("/vmlinuz") == 5
