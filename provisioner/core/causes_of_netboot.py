"""Causes from the request to the ramdisk: what keeps an operation from starting, what a BMC does
not do, and how far a netboot came; the downloads have a table of their own. The most specific
first."""

from collections.abc import Callable
from typing import Final

from .diagnosis import QUEUE_PATIENCE, Case, Cause, Dhcp
from .model import Json, Phase
from .netboot_trace import Reach

EVENTS: Final = "provisioner host events {host}"
CONSOLE: Final = "look at the console of {host}"
AGAIN: Final = "provisioner reimage {host} --release {release}"
NETWORK: Final = frozenset({"bmc", "dhcp", "tftp", "http"})
_BMC_LINES: Final = frozenset({"bmc", "service"})
AGENT: Final = frozenset({"agent", "service"})
SERVICE: Final = frozenset({"service"})


def code(*codes: str) -> Callable[[Case], bool]:
    return lambda case: case.code in codes


def _reached(*reaches: Reach) -> Callable[[Case], bool]:
    return lambda case: case.is_unheard and case.trace.reach in reaches


def _missed(case: Case) -> bool:
    return case.is_unheard and case.trace.reach is Reach.FILE_MISSED


def _refusal(case: Case) -> Json:
    refused = case.trace.refused
    return refused.detail if refused else {}


def _was_refused(case: Case) -> bool:
    return _reached(Reach.ASKED, Reach.OFFERED)(case) and bool(_refusal(case))


def _is_queued(case: Case) -> bool:
    return case.is_open and case.phase is Phase.QUEUED


# Nothing is tried by itself after these, and none of them is about a boot.
SAFETY: Final = (
    Cause(
        "ticket_contested",
        code("ticket_contested"),
        "two came with the one boot ticket of {host}, so both were stopped: {found}",
        (
            "provisioner audit list: the rows ticket_contested hold both addresses",
            "find who else listens on the provisioning network; then: " + AGAIN,
        ),
        AGENT,
    ),
    Cause(
        "identity_doubtful",
        code("identity_doubtful"),
        "what came with the ticket of {host} may be another host as well: {message}; {found}",
        ("provisioner host show {host} -o wide", "{hint}"),
        AGENT,
    ),
    Cause(
        "own_host",
        code("own_host"),
        "the service runs on {host}, and never rebuilds itself",
        ("remove it from the request",),
        SERVICE,
    ),
    Cause(
        "database_restored",
        code("database_restored"),
        "the operation was unfinished in a restored database, and was ended by a person",
        ("look at the host, then: " + AGAIN,),
        SERVICE,
    ),
    Cause(
        "observe_only",
        lambda case: _is_queued(case) and case.facts.is_observing,
        "the database was restored and is older than its hosts, so nothing is done",
        ("provisioner reconcile --plan",),
        SERVICE,
    ),
    Cause(
        "in_maintenance",
        lambda case: case.code == "host_refused" and case.host.in_maintenance,
        "{host} is in maintenance: somebody works on it, so nothing starts",
        ("provisioner host maintenance {host} --off", AGAIN),
        SERVICE,
    ),
    Cause(
        "protected",
        lambda case: case.code == "host_refused" and case.host.is_protected,
        "{host} is protected: nothing rebuilds it",
        ("provisioner host unprotect {host}", AGAIN),
        SERVICE,
    ),
    Cause(
        "host_refused",
        code("host_refused"),
        "{message}",
        ("provisioner host show {host}", "{hint}"),
        SERVICE,
    ),
    Cause(
        "profile_unreadable",
        code("profile_unreadable"),
        "what {host} is to be made of is not known: {message}",
        ("{hint}", AGAIN),
        SERVICE,
    ),
    Cause(
        "release_revoked",
        code("release_revoked"),
        "{release} was revoked while it was being deployed: {message}",
        ("deploy another release: provisioner image list",),
        SERVICE,
    ),
)  # fmt: skip

QUEUE: Final = (
    Cause(
        "breaker_open",
        lambda case: _is_queued(case) and case.facts.breaker is not None,
        "the breaker is open, so nothing starts: {breaker}",
        (
            "provisioner breaker show: what failed, and where?",
            "provisioner breaker close --reason WHY",
        ),
        SERVICE,
    ),
    Cause(
        "waits_for_its_turn",
        lambda case: _is_queued(case) and case.facts.waits is not None,
        "it waits for its turn: {waits}",
        ("provisioner operation list --open: who is in front of it",),
        SERVICE,
    ),
    Cause(
        "waited_too_long",
        code("queued_timed_out"),
        "its turn did not come before its time was over: {found}",
        ("raise the limit that is named, or ask again when less is under way: " + AGAIN,),
        SERVICE,
    ),
    Cause(
        "nobody_starts_it",
        lambda case: _is_queued(case) and case.lasts > QUEUE_PATIENCE,
        "it could start, and nobody starts it: the worker does not run, or cannot save",
        ("systemctl status provisioner-worker", "provisioner doctor"),
        SERVICE,
    ),
)  # fmt: skip

BMC: Final = (
    Cause(
        "bmc_wrong_password",
        code("bmc_auth_failed"),
        "the BMC of {host} at {bmc} refused the user or the password; it is not tried again, "
        "since BMCs lock accounts",
        (
            "provisioner host change {host} --bmc ADDRESS --bmc-user USER --bmc-password-file FILE",
            "provisioner host power {host} on, for it may be off",
        ),
        _BMC_LINES,
    ),
    Cause(
        "bmc_busy",
        code("bmc_busy"),
        "the BMC of {host} at {bmc} had no session free for minutes: others keep theirs open",
        ("who else polls it? a cold reset of the BMC ends all of its sessions",),
        _BMC_LINES,
    ),
    Cause(
        "bmc_unreachable",
        code("bmc_unreachable"),
        "the BMC of {host} at {bmc} does not answer",
        (
            "check its power, cable and address, and that IPMI over LAN is on",
            "provisioner host power {host} status",
        ),
        _BMC_LINES,
    ),
    Cause(
        "bmc_disobeyed",
        code("bmc_disobeyed"),
        "{message}: expected {expected}; {found}",
        (
            "look whether the host is on, at the host itself or on its console",
            "a cold reset of the BMC often helps; then: provisioner host power {host} status",
        ),
        _BMC_LINES,
    ),
    Cause(
        "bmc_rejected",
        code("bmc_rejected"),
        "the BMC of {host} at {bmc} answered, and said no: {message}",
        ("may its user switch power and set the boot device (role operator)?",),
        _BMC_LINES,
    ),
)  # fmt: skip

NETBOOT: Final = (
    Cause(
        "bmc_not_done_yet",
        lambda case: case.is_bmc_slow,
        "its BMC at {bmc} has not switched it on yet: its system still shuts down, or its BMC is "
        "slow or silent and asked again",
        (CONSOLE, "provisioner host power {host} status, once this has ended"),
        _BMC_LINES,
    ),
    Cause(
        "agent_not_heard",
        _reached(Reach.RAMDISK),
        "the ramdisk came up and asked for an address, and its agent did not reach the service",
        (
            "does a firewall let {host} reach agent.listen? is its clock far off?",
            "was the ramdisk built for this installation? provisioner ramdisk list",
            CONSOLE,
        ),
        NETWORK,
    ),
    Cause(
        "other_dhcp_server",
        lambda case: _was_refused(case) and "other_server" in _refusal(case),
        "it took the address that another DHCP server offered, which ours refused: {refusal}",
        (
            "find that server, and take it off the provisioning network",
            "if it is the site's own: dhcp.mode = proxy or off, and provisioner dhcp-config",
        ),
        NETWORK,
    ),
    Cause(
        "sent_to_its_disk",
        lambda case: case.is_unheard and case.trace.turned_away is not None,
        "it asked how to boot and was sent to its own disk: {answer}",
        ("correct what is enrolled, or what its board says: provisioner host show {host}",),
        NETWORK,
    ),
    Cause(
        "no_boot_script",
        _reached(Reach.LOADED),
        "its boot loader was loaded, and never asked for its boot script",
        (
            "can {host} reach boot.url by HTTP, from the address that it got?",
            "does its DHCP server send the boot script's URL to iPXE? provisioner dhcp-config",
            CONSOLE,
        ),
        NETWORK,
    ),
    Cause(
        "tftp_not_found",
        lambda case: _missed(case) and case.words["outcome"] == "not found",
        "it asked TFTP for {file}, which there is not",
        ("which boot file does its DHCP server name? provisioner dhcp-config",),
        NETWORK,
    ),
    Cause(
        "tftp_aborted",
        _missed,
        "its boot file did not come through TFTP: {file}, {outcome}",
        (
            "packets are lost between here and {host}: cable, switch port, MTU, firewall",
            CONSOLE,
        ),
        NETWORK,
    ),
    Cause(
        "no_tftp",
        _reached(Reach.ADDRESSED),
        "it was told its address and its boot file, and asked TFTP for nothing",
        (
            "does a firewall let {host} reach tftp.listen (UDP port 69, and answers from any)?",
            "does another DHCP server answer as well, with another boot file?",
        ),
        NETWORK,
    ),
    Cause(
        "dhcp_refused",
        _was_refused,
        "our DHCP refused the address that it asked for: {refusal}",
        ("is dhcp.subnet the network that it is on?", EVENTS),
        NETWORK,
    ),
    Cause(
        "dhcp_offer_not_taken",
        _reached(Reach.OFFERED),
        "it was offered an address again and again, and took none: our answers do not reach it, "
        "or it takes another server's",
        (
            "is there another DHCP server on the provisioning network?",
            "does the switch let DHCP answers through (DHCP snooping, spanning tree)?",
        ),
        NETWORK,
    ),
    Cause(
        "dhcp_no_address",
        lambda case: _reached(Reach.ASKED)(case) and bool(case.trace.why_nothing_offered),
        "it asked for an address {asked} times, and our DHCP had none for it: {nothing_offered}",
        ("is the range dhcp.range_start to dhcp.range_end large enough?",),
        NETWORK,
    ),
    Cause(
        "dhcp_silent",
        _reached(Reach.ASKED),
        "it asked for an address {asked} times and got no answer",
        (
            "does our dnsmasq run, and on the right interface? provisioner doctor",
            "behind a relay: is the relay's subnet the one in dhcp.subnet?",
        ),
        NETWORK,
    ),
    Cause(
        "booted_its_disk",
        lambda case: _reached(Reach.NOTHING)(case) and case.trace.own_system is not None,
        "it was switched on and started its own disk, not the network: its BMC agreed to the "
        "network boot and forgot it",
        (
            "set the network first in its firmware's boot order: the service sends it to its "
            "disk whenever nothing is to be done",
            "provisioner reimage {host} goes through all three ways to set it again",
        ),
        NETWORK,
    ),
    Cause(
        "nothing_heard_elsewhere",
        lambda case: _reached(Reach.NOTHING)(case) and case.facts.dhcp is Dhcp.OFF,
        "it was switched on and asked neither TFTP nor for a boot script; DHCP is another "
        "server's here and not seen",
        (
            "does that server's log have a request of {host}? provisioner dhcp-config",
            "no request: it started its own disk, hangs in its firmware, or its link is down",
            CONSOLE,
        ),
        NETWORK,
    ),
    Cause(
        "nothing_heard",
        _reached(Reach.NOTHING),
        "it was switched on and never asked DHCP: it hangs in its firmware, its link is down, or "
        "it started its own disk since its BMC forgot the network boot",
        (
            CONSOLE + ": where does its firmware stop?",
            "cable, switch port and VLAN of the NIC that is enrolled: provisioner host show {host}",
            "is network boot on in its firmware, for that NIC?",
        ),
        NETWORK,
    ),
)  # fmt: skip
