"""Causes between the boot script and the ramdisk: what became of its kernel and ramdisk on their
way. The most specific first, the last one where nothing is seen of that."""

from collections.abc import Callable
from typing import Final

from .causes_of_netboot import AGAIN, CONSOLE, NETWORK
from .diagnosis import Case, Cause
from .downloads import CAME, Download
from .netboot_trace import Reach

# Later starts, which came less far, would push out what shows it.
_FETCHING: Final = frozenset({"tftp", "http"})
_WIRE: Final = "packets are lost between here and {host}: cable, switch port, MTU, firewall?"


def _stands_at(*states: Download | None) -> Callable[[Case], bool]:
    def fits(case: Case) -> bool:
        seen = case.trace
        is_there = case.is_unheard and seen.reach is Reach.SCRIPT
        return is_there and seen.fetched is not None and seen.fetched.state in states

    return fits


DOWNLOAD: Final = (
    Cause(
        "ramdisk_missing",
        _stands_at(Download.MISSING),
        "it asked for the {kernel_or_ramdisk} that it was told to boot, and this server has none",
        (
            "provisioner ramdisk list: is it one of them? was its folder taken away?",
            "provisioner ramdisk build, then: " + AGAIN,
        ),
        _FETCHING,
    ),
    Cause(
        "download_cut",
        _stands_at(Download.CUT),
        "its {kernel_or_ramdisk} was not fetched whole: the download broke off {cuts}, at last "
        "after {came}",
        (
            CONSOLE + ": iPXE or GRUB says why. Has the host enough memory for it?",
            _WIRE,
        ),
        _FETCHING,
    ),
    Cause(
        "download_stalled",
        _stands_at(Download.STALLED),
        "the download of its {kernel_or_ramdisk} stands still after {came}: the host takes nothing "
        "more, or nothing reaches it",
        (_WIRE, CONSOLE + ": does its boot loader still run? is it on at all?"),
        _FETCHING,
    ),
    Cause(
        "download_not_over",
        _stands_at(Download.ASKED, Download.GOES_ON),
        "the download of its {kernel_or_ramdisk} had begun and no end of it was seen; the last "
        "line had {came}",
        (
            "how fast is its link? what else does the network carry?",
            "a slow network needs a longer limits.netbooting_s",
            CONSOLE,
        ),
        _FETCHING,
    ),
    Cause(
        "download_not_begun",
        _stands_at(None),
        "it was told to boot the ramdisk, and never asked for its {kernel_or_ramdisk}",
        (
            CONSOLE + ": iPXE says why it goes no further",
            "the boot script names boot.url: does it lead {host} to this service?",
        ),
        _FETCHING,
    ),
    Cause(
        "ramdisk_silent",
        _stands_at(*CAME),
        "kernel and ramdisk were sent to it whole, and nothing was heard since: the kernel does "
        "not start on this hardware, its network does not come up, or its agent reaches nobody",
        (
            CONSOLE + ": the kernel and the agent say where they stop",
            "does a firewall let {host} reach agent.listen? is its clock far off?",
            "was the ramdisk built for this hardware and installation? provisioner ramdisk list",
        ),
        _FETCHING,
    ),
    Cause(
        "ramdisk_not_heard",
        lambda case: case.is_unheard and case.trace.reach is Reach.SCRIPT,
        "it was told to boot the ramdisk, and nothing was heard of it since. Its downloads are "
        "not seen here: kernel and ramdisk were not fetched whole, do not start on this hardware, "
        "or its agent reaches nobody",
        (
            CONSOLE + ": the boot loader, the kernel and the agent say where they stop",
            "does a firewall let {host} reach boot.listen and agent.listen?",
        ),
        NETWORK,
    ),
)
