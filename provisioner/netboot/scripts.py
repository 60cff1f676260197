"""Renders a boot plan to what carries it out: an iPXE script or a grub.cfg. Decides nothing."""

from dataclasses import dataclass
from functools import cache
from typing import Final
from urllib.parse import urlsplit

from provisioner.core.bootplan import LocalDisk, Ramdisk
from provisioner.core.model import LocalBoot
from provisioner.netboot import grub
from provisioner.netboot.bootfiles import DISK_FILE
from provisioner.netboot.quoting import (
    Render,
    base_url,
    constant,
    digest,
    renderer,
    word,
)

CONTENT_TYPE: Final = "text/plain; charset=utf-8"

# The first answer may be lost with a switch port that is still learning; after this many
# tries the host boots its own disk and the operation's deadline takes over.
FETCH_ATTEMPTS_MAX: Final = 5
FETCH_PAUSE_S: Final = 2


@dataclass(frozen=True)
class BootUrls:
    """Where a host finds us: `boot` by HTTP in clear, `agent` by HTTPS, and the name or
    address of our TFTP server, which is the boot listener's when nothing is given.

    (`${next-server}` will not do: beside another DHCP server it may be that one's.)
    """

    boot: str
    agent: str
    tftp: str | None = None


@dataclass(frozen=True)
class BootAnswer:
    """The HTTP answer to a host that asks how to boot."""

    status: int
    text: str


def answer_boot(plan: LocalDisk | Ramdisk, urls: BootUrls) -> BootAnswer:
    """Return status and body: 404 is itself one of the ways to boot the local disk."""
    if isinstance(plan, LocalDisk) and plan.method is LocalBoot.NOT_FOUND:
        return BootAnswer(404, render_boot_script(plan, urls))
    return BootAnswer(200, render_boot_script(plan, urls))


def render_boot_script(plan: LocalDisk | Ramdisk, urls: BootUrls) -> str:
    """Return the iPXE script for a plan.

    Raises ConfigError when a URL, digest, ticket or kernel argument holds anything that
    iPXE could read as more than a word. The host then gets no script, and boots its disk.
    """
    if isinstance(plan, LocalDisk):
        # The body of a 404 is a script, too: iPXE on BIOS runs any other text that some
        # proxy might pass off as a success, as machine code.
        return _render()("local.ipxe.j2", _disk(plan.method, urls))
    values = {
        "digest": digest(plan.digest),
        **_ramdisk(plan, urls),
        **_disk(plan.local_boot, urls),
        "attempts_max": constant(str(FETCH_ATTEMPTS_MAX)),
    }
    return _render()("ramdisk.ipxe.j2", values)


def render_grub_config(plan: LocalDisk | Ramdisk, urls: BootUrls) -> str:
    """Return the grub.cfg for a plan: the same answer for a host with Secure Boot on.

    Raises ConfigError when a value holds anything that GRUB could read as more than a word.
    """
    if isinstance(plan, LocalDisk):
        return grub.render()("local.cfg.j2", grub.disk_values(plan.method))
    folder = f"{grub.RAMDISKS}/{digest(plan.digest)}"
    values = {
        "kernel": word(f"{folder}/vmlinuz"),
        "initrd": word(f"{folder}/initrd"),
        **_ramdisk(plan, urls),
        **grub.disk_values(plan.local_boot),
        "tries": constant(" ".join(str(number + 1) for number in range(FETCH_ATTEMPTS_MAX))),
    }
    return grub.render()("ramdisk.cfg.j2", values)


def _ramdisk(plan: Ramdisk, urls: BootUrls) -> dict[str, object]:
    return {
        "boot": base_url(urls.boot, scheme="http"),
        "agent": base_url(urls.agent, scheme="https"),
        "ticket": word(plan.ticket.reveal()),
        "console": [word(name) for name in plan.console],
        "arguments": [word(argument) for argument in plan.arguments],
        "pause_s": constant(str(FETCH_PAUSE_S)),
    }


def _disk(method: LocalBoot, urls: BootUrls) -> dict[str, object]:
    values: dict[str, object] = {"local_boot": constant(method.value)}
    if method in (LocalBoot.AUTO, LocalBoot.SANBOOT):
        host = urls.tftp or urlsplit(base_url(urls.boot, scheme="http")).hostname or ""
        values |= {"tftp": word(host), "disk_file": constant(DISK_FILE)}
    return values


@cache
def _render() -> Render:
    return renderer("ipxe")
