"""Every boot script and DHCP configuration beside its golden file, and no way out of a value.

`PROVISIONER_WRITE_GOLDEN=1 pytest tests/parts/test_boot_scripts.py` rewrites the files.
"""

import os
import re
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import UndefinedError

from provisioner.core.bootplan import LocalDisk, Ramdisk
from provisioner.core.model import LocalBoot, Secret
from provisioner.errors import ConfigError
from provisioner.netboot.dhcp import (
    DhcpMode,
    DhcpServer,
    NetbootConfig,
    UefiLoader,
    dhcp_snippet,
    dnsmasq_config,
)
from provisioner.netboot.grub import first_config
from provisioner.netboot.quoting import renderer
from provisioner.netboot.scripts import (
    BootUrls,
    answer_boot,
    render_boot_script,
    render_grub_config,
)
from provisioner.netboot.shim_hosts import hosts_file_text

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
URLS = BootUrls(boot="http://10.77.0.1:8081", agent="https://10.77.0.1:8443")
PLAIN = Ramdisk(digest="ab" * 32, ticket=Secret("tk_GqQ-0_1"))
NETWORK = NetbootConfig(
    boot_url="http://10.77.0.1:8081",
    tftp_address="10.77.0.1",
    interface="br0",
    subnet="10.77.0.0/24",
    range_start="10.77.0.100",
    range_end="10.77.0.200",
    gateway="10.77.0.1",
    dns=("10.77.0.1", "9.9.9.9"),
)
ISOLATED = replace(NETWORK, gateway=None, dns=())
ALL_SHIM = replace(NETWORK, uefi_loader=UefiLoader.SHIM)

CASES = {
    "ipxe/local_by_itself.ipxe": render_boot_script(LocalDisk(LocalBoot.AUTO, ""), URLS),
    "ipxe/local_by_exit.ipxe": render_boot_script(LocalDisk(LocalBoot.EXIT, ""), URLS),
    "ipxe/local_by_sanboot.ipxe": render_boot_script(LocalDisk(LocalBoot.SANBOOT, ""), URLS),
    "ipxe/local_by_404.ipxe": render_boot_script(LocalDisk(LocalBoot.NOT_FOUND, ""), URLS),
    "ipxe/ramdisk.ipxe": render_boot_script(PLAIN, URLS),
    "ipxe/ramdisk_then_sanboot.ipxe": render_boot_script(
        replace(PLAIN, local_boot=LocalBoot.SANBOOT), URLS
    ),
    "ipxe/ramdisk_with_arguments.ipxe": render_boot_script(
        replace(PLAIN, console=("tty0", "ttyS1,57600n8"), arguments=("pci=nomsi", "nomodeset")),
        URLS,
    ),
    "grub/first.cfg": first_config(),
    "grub/local_by_itself.cfg": render_grub_config(LocalDisk(LocalBoot.AUTO, ""), URLS),
    "grub/local_by_exit.cfg": render_grub_config(LocalDisk(LocalBoot.EXIT, ""), URLS),
    "grub/ramdisk.cfg": render_grub_config(PLAIN, URLS),
    "grub/ramdisk_then_exit.cfg": render_grub_config(
        replace(PLAIN, local_boot=LocalBoot.EXIT), URLS
    ),
    "grub/ramdisk_with_arguments.cfg": render_grub_config(
        replace(PLAIN, console=("tty0", "ttyS1,57600n8"), arguments=("pci=nomsi", "nomodeset")),
        URLS,
    ),
    "dhcp/dnsmasq_full.conf": dnsmasq_config(NETWORK, DhcpMode.FULL),
    "dhcp/dnsmasq_full_isolated.conf": dnsmasq_config(ISOLATED, DhcpMode.FULL),
    "dhcp/dnsmasq_proxy.conf": dnsmasq_config(NETWORK, DhcpMode.PROXY),
    "dhcp/snippet_dnsmasq.conf": dhcp_snippet(NETWORK, DhcpServer.DNSMASQ),
    "dhcp/snippet_kea.json": dhcp_snippet(NETWORK, DhcpServer.KEA),
    "dhcp/snippet_kea_isolated.json": dhcp_snippet(ISOLATED, DhcpServer.KEA),
    "dhcp/snippet_isc.conf": dhcp_snippet(NETWORK, DhcpServer.ISC),
    "dhcp/dnsmasq_full_shim.conf": dnsmasq_config(ALL_SHIM, DhcpMode.FULL),
    "dhcp/snippet_dnsmasq_shim.conf": dhcp_snippet(ALL_SHIM, DhcpServer.DNSMASQ),
    "dhcp/snippet_kea_shim.json": dhcp_snippet(ALL_SHIM, DhcpServer.KEA),
    "dhcp/snippet_isc_shim.conf": dhcp_snippet(ALL_SHIM, DhcpServer.ISC),
}


@pytest.mark.parametrize("name", CASES)
def test_generated_text_equals_its_golden_file(name: str) -> None:
    file = GOLDEN / name
    if os.environ.get("PROVISIONER_WRITE_GOLDEN"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(CASES[name])
    assert CASES[name] == file.read_text()


@pytest.mark.parametrize("method", LocalBoot)
def test_field_03_a_host_has_three_ways_to_its_own_disk(method: LocalBoot) -> None:
    answer = answer_boot(LocalDisk(method, ""), URLS)
    assert (answer.status == 404) == (method is LocalBoot.NOT_FOUND)
    assert ("sanboot --no-describe --drive 0x80" in answer.text) == (method is LocalBoot.SANBOOT)
    # A UEFI shows its boot manager after an `exit` that succeeds.
    assert answer.text.startswith("#!ipxe\n")
    assert answer.text.endswith("exit 1\n")


# Characters that mean something to iPXE or to a kernel command line, between plain ones.
NASTY = st.text(st.sampled_from("a1.-/=:\n\r\t ${}&|#!;'\"\\\0é\u2028"), max_size=30)


def shape(script: str) -> list[str]:
    """Return the first word of every line: what the script does, whatever it does it with."""
    return [line.split(" ")[0] for line in script.split("\n")]


def holes(script: str) -> list[str]:
    return re.findall(r"\$\{[^}]*\}|&&|\|\||#!", script)


@given(ticket=NASTY, console=NASTY, argument=NASTY, digest=NASTY)
def test_no_value_leaves_its_place_in_a_boot_script(
    ticket: str, console: str, argument: str, digest: str
) -> None:
    """A value is refused, or the script does what it does with plain values."""
    for plan in (
        replace(PLAIN, ticket=Secret(ticket)),
        replace(PLAIN, console=(console,)),
        replace(PLAIN, arguments=(argument,)),
        replace(PLAIN, digest=digest),
    ):
        try:
            script = render_boot_script(plan, URLS)
        except ConfigError:
            continue
        plain = render_boot_script(PLAIN, URLS)
        assert shape(script) == shape(plain)
        assert holes(script) == holes(plain)
        assert script.isascii()


def words_of(config: str) -> list[tuple[int, bool]]:
    """Return, as GRUB reads a configuration, how many words each line has, and whether a
    quote is open at its end.

    Source: the GRUB manual, "Quoting" and "Variable expansion".
    """
    return [
        (len(re.findall(r"(?:'[^']*'|\"[^\"]*\"|[^\s'\"])+", line)), line.count("'") % 2 == 1)
        for line in config.split("\n")
    ]


@given(ticket=NASTY, console=NASTY, argument=NASTY, digest=NASTY)
def test_no_value_leaves_its_place_in_a_grub_config(
    ticket: str, console: str, argument: str, digest: str
) -> None:
    """A value is refused, or stands in single quotes and is one word in them."""
    for plan, plain in (
        (replace(PLAIN, ticket=Secret(ticket)), PLAIN),
        (replace(PLAIN, console=(console,)), PLAIN),
        (replace(PLAIN, arguments=(argument,)), replace(PLAIN, arguments=("a",))),
        (replace(PLAIN, digest=digest), PLAIN),
    ):
        try:
            config = render_grub_config(plan, URLS)
        except ConfigError:
            continue
        wanted = render_grub_config(plain, URLS)
        assert words_of(config) == words_of(wanted)
        assert re.findall(r"\$\w*", config) == ["$net_default_mac", "$try"]
        assert config.isascii()


@given(host=NASTY)
def test_no_url_leaves_its_place_in_a_grub_config(host: str) -> None:
    try:
        config = render_grub_config(PLAIN, BootUrls(f"http://{host}", f"https://{host}"))
    except ConfigError:
        return
    assert words_of(config) == words_of(CASES["grub/ramdisk.cfg"])


@pytest.mark.parametrize("method", LocalBoot)
def test_a_grub_config_ends_at_the_disk_or_at_the_firmware(method: LocalBoot) -> None:
    """And never at GRUB's prompt, which waits for a person."""
    for plan in (LocalDisk(method, ""), replace(PLAIN, local_boot=method)):
        config = render_grub_config(plan, URLS)
        assert config.endswith("\nexit\n") or config == "exit\n"
        has_chain = "chainloader /EFI/BOOT/BOOTX64.EFI" in config
        assert has_chain == (method in (LocalBoot.AUTO, LocalBoot.SANBOOT))


def test_only_a_mac_stands_in_the_hosts_file() -> None:
    text = hosts_file_text(["52:54:00:77:00:02", "52:54:00:77:00:01", "52:54:00:77:00:01"])
    assert text == (
        "dhcp-host=52:54:00:77:00:01,id:*,set:secure-boot\n"
        "dhcp-host=52:54:00:77:00:02,id:*,set:secure-boot\n"
    )
    with pytest.raises(ConfigError):
        hosts_file_text(["52:54:00:77:00:01,10.77.0.1"])


@given(host=NASTY)
def test_no_url_leaves_its_place_in_a_boot_script(host: str) -> None:
    try:
        script = render_boot_script(PLAIN, BootUrls(f"http://{host}", f"https://{host}"))
    except ConfigError:
        return
    assert shape(script) == shape(CASES["ipxe/ramdisk.ipxe"])
    assert holes(script) == holes(CASES["ipxe/ramdisk.ipxe"])


@given(value=NASTY)
def test_no_value_leaves_its_place_in_a_dhcp_configuration(value: str) -> None:
    for config in (
        replace(NETWORK, boot_url=f"http://{value}"),
        replace(NETWORK, tftp_address=value),
        replace(NETWORK, interface=value),
        replace(NETWORK, subnet=value),
        replace(NETWORK, range_start=value),
        replace(NETWORK, gateway=value or "x"),
        replace(NETWORK, dns=(value,)),
        replace(NETWORK, lease_file=Path("/" + value)),
    ):
        try:
            text = dnsmasq_config(config, DhcpMode.FULL)
        except ConfigError:
            continue
        plain = CASES["dhcp/dnsmasq_full.conf"]
        assert [line.split("=")[0] for line in text.split("\n")] == [
            line.split("=")[0] for line in plain.split("\n")
        ]


@pytest.mark.parametrize(
    "wrong",
    [
        replace(NETWORK, subnet="10.77.0.1/24"),
        replace(NETWORK, range_start="10.78.0.1"),
        replace(NETWORK, range_start="10.77.0.201"),
        replace(NETWORK, gateway="10.0.0.1"),
        replace(NETWORK, boot_url="https://10.77.0.1"),
        replace(NETWORK, boot_url="http://10.77.0.1/path"),
        replace(NETWORK, boot_url="http://user@10.77.0.1"),
        replace(NETWORK, boot_url="http://" + "a" * 60 + ":8081"),
        replace(NETWORK, lease=timedelta(seconds=5)),
        replace(NETWORK, lease_file=Path("/var/lib/../etc/passwd")),
    ],
)
def test_a_network_that_cannot_work_is_refused(wrong: NetbootConfig) -> None:
    with pytest.raises(ConfigError):
        dnsmasq_config(wrong, DhcpMode.FULL)


def test_dhcp_that_is_off_has_no_configuration() -> None:
    with pytest.raises(ConfigError):
        dnsmasq_config(NETWORK, DhcpMode.OFF)


def test_a_template_can_print_neither_a_missing_nor_an_unquoted_value() -> None:
    render = renderer("ipxe")
    with pytest.raises(UndefinedError):
        render("local.ipxe.j2", {})
    with pytest.raises(TypeError):
        render("ramdisk.ipxe.j2", {"boot": "http://10.77.0.1", "local_boot": "exit"})
