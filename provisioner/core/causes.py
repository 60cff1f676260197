"""Every cause that `why` can tell apart, the most specific first: those before the ramdisk from
`causes_of_netboot` and `causes_of_download`, then what an agent and a new system may meet, then
what is as it should be.
"""

from collections.abc import Callable
from typing import Final

from .causes_of_download import DOWNLOAD
from .causes_of_netboot import (
    AGAIN,
    AGENT,
    BMC,
    CONSOLE,
    EVENTS,
    NETBOOT,
    QUEUE,
    SAFETY,
    SERVICE,
    code,
)
from .diagnosis import Case, Cause
from .model import HostState, Phase
from .netboot_trace import SYSTEM

_SYSTEM: Final = frozenset({"dhcp", "http", "cloud-init", "service"})
_ALL: Final = frozenset({"bmc", "dhcp", "tftp", "http", "agent", "cloud-init", "service"})
_DISK: Final = "replace the disk, or look at its cable and controller"
_RULE: Final = "provisioner profile show {profile}: its disk rule"


def _code_in(name: str, phase: Phase) -> Callable[[Case], bool]:
    return lambda case: case.code == name and case.phase is phase


def _agent_said(name: str, why: str, *steps: str) -> Cause:
    """A cause that an agent names itself, by the code of its error."""
    return Cause(name, code(name), why, steps, AGENT)


def _asked_for_address(case: Case) -> bool:
    """Say whether a system asked for an address, since the agent let its host restart."""
    return any(one.source == "dhcp" and one.detail.get("client") == SYSTEM for one in case.in_phase)


def _phase(*phases: Phase) -> Callable[[Case], bool]:
    return lambda case: case.is_open and case.phase in phases


_OF_THE_AGENT: Final = (
    _agent_said(
        "no_disk_matches",
        "no disk of {host} fits the disk rule of profile {profile}; nothing was written: {found}",
        _RULE,
        "provisioner host show {host} -o wide: its disks",
    ),
    _agent_said(
        "several_disks_match",
        "more than one disk of {host} fits the disk rule of profile {profile}, and none is "
        "guessed; nothing was written: {found}",
        _RULE + ", by serial or WWN",
        "provisioner host show {host} -o wide: its disks",
    ),
    _agent_said(
        "disk_too_small",
        "{message}: {release} needs {expected}, and {found} are there",
        _RULE,
        "or deploy a smaller image",
    ),
    _agent_said("host_unfit", "{release} cannot run on {host}: {message}", "{hint}"),
    _agent_said("image_unfit", "{release} cannot be placed on a disk: {message}", "{hint}"),
    _agent_said(
        "permission_refused",
        "the service refused to let it be written: {message}; found {found}",
        "provisioner host show {host}",
        EVENTS,
    ),
    _agent_said(
        "permission_expired",
        "the permission to write ran out, and could not be renewed: {message}",
        "is the network between {host} and agent.listen well?",
    ),
    Cause(
        "disk_write_failed",
        _code_in("disk_failed", Phase.WRITING),
        "the disk failed while it was being written: {message} ({found})",
        (_DISK, "then: " + AGAIN),
        AGENT,
    ),
    Cause(
        "disk_read_failed",
        _code_in("disk_failed", Phase.VERIFYING),
        "the disk failed as it was read back: {message} ({found})",
        (_DISK, "then: " + AGAIN),
        AGENT,
    ),
    _agent_said("disk_failed", "the disk failed: {message} ({found})", _DISK),
    _agent_said(
        "read_back_mismatch",
        "the disk returned other bytes than were written: {message}",
        _DISK,
        "then: " + AGAIN,
    ),
    _agent_said(
        "chunk_unavailable",
        "a part of {release} could not be fetched: {message}",
        "provisioner image verify {release}",
        "is the network between {host} and boot.listen, or the mirrors, well?",
    ),
    _agent_said(
        "chunk_corrupt",
        "a part of {release} is not what its signed manifest says: {message}",
        "provisioner image verify {release}",
        "is there a proxy or a mirror that keeps damaged files?",
    ),
    Cause(
        "release_untrusted",
        code("manifest_signature", "manifest_digest", "manifest_malformed"),
        "the manifest of {release} is not to be trusted: {message}",
        (
            "provisioner image verify {release}",
            "was the ramdisk built after the keys changed? provisioner ramdisk list",
        ),
        AGENT,
    ),
    Cause(
        "release_outdated",
        code("release_expired", "release_too_old", "release_untested"),
        "{release} may not be deployed here: {message}",
        ("deploy another release: provisioner image list",),
        AGENT,
    ),
    _agent_said(
        "service_unreachable",
        "its agent could not reach the service for longer than it waits: {message}",
        "is the network between {host} and agent.listen well? did the service run?",
    ),
    _agent_said(
        "service_refused",
        "the service said no to its agent: {message}; {found}",
        EVENTS,
    ),
    _agent_said("seed_unfit", "its seed does not fit: {message}", "make the profile smaller"),
    _agent_said(
        "seed_gone",
        "its seed had left already, and leaves once only: {message}",
        "provisioner audit list: the rows seed.taken",
        AGAIN,
    ),
    _agent_said(
        "boot_arguments",
        "the ramdisk's command line lacks what its agent needs: {message}",
        "does another server on the network boot our ramdisk?",
    ),
    Cause(
        "agent_silent",
        lambda case: case.is_agent_silent,
        "its agent fell silent in {phase}; {progress}",
        (
            CONSOLE + ": does its ramdisk still run? did its power or its network fail?",
            "did its disk hang? the console has the kernel's word",
        ),
        AGENT,
    ),
)

_OF_THE_SYSTEM: Final = (
    Cause(
        "wrong_disk",
        code("wrong_disk"),
        "it came up from another disk than the one that was written: written was {expected}, "
        "it runs from {found}",
        (
            "set the boot order in its firmware, or remove the other disk",
            CONSOLE,
        ),
        _SYSTEM,
    ),
    Cause(
        "wrong_system",
        code("wrong_system"),
        "it came up with another system than {release}: an old one from another disk, most likely",
        ("set the boot order in its firmware, or wipe the other disk", CONSOLE),
        _SYSTEM,
    ),
    Cause(
        "system_without_word",
        lambda case: case.is_system_unheard and _asked_for_address(case),
        "a system came up and asked for an address, and never phoned home",
        (
            CONSOLE + ": did cloud-init end? is it the new system at all?",
            "can it reach agent.listen by HTTPS? is its clock far off?",
        ),
        _SYSTEM,
    ),
    Cause(
        "system_not_heard",
        lambda case: case.is_system_unheard,
        "the disk was written and read back, and no new system was heard of since",
        (
            CONSOLE + ": did it boot its disk, did the network come up, did cloud-init end?",
            "set the boot order in its firmware: network first, then the disk that was written",
        ),
        _SYSTEM,
    ),
    Cause(
        "unhealthy",
        lambda case: case.phase is Phase.PROVING and bool(case.unhealthy),
        "the new system runs, and is not healthy: {unhealthy}",
        (
            "log in to {host} and look",
            "provisioner profile show {profile}: its health checks",
        ),
        _SYSTEM,
    ),
    Cause(
        "not_healthy_for_long",
        code("proving_timed_out"),
        "its health checks did not hold for the whole soak time: {found}",
        ("provisioner profile show {profile}: checks and soak time", EVENTS),
        _SYSTEM,
    ),
)


def _idle(*states: HostState) -> Callable[[Case], bool]:
    return lambda case: case.host.state in states


_AS_IT_IS: Final = (
    Cause("failed", lambda case: case.is_failed, "{message}", ("{hint}", EVENTS), _ALL),
    Cause(
        "about_to_start",
        _phase(Phase.QUEUED),
        "it was just requested, and is about to start",
        (),
        SERVICE,
    ),
    Cause(
        "fetches_ramdisk",
        lambda case: case.is_fetching,
        "nothing is wrong so far: it fetches its {kernel_or_ramdisk}; the last line had {came}",
        (CONSOLE + ", if you like to see it",),
        _ALL,
    ),
    Cause(
        "netbooting",
        _phase(Phase.NETBOOTING),
        "nothing is wrong so far: its BMC switches it off and on, and it starts from the network",
        (CONSOLE + ", if you like to see it",),
        _ALL,
    ),
    Cause(
        "agent_works",
        _phase(Phase.PREPARING, Phase.WRITING, Phase.VERIFYING),
        "nothing is wrong: its agent works, and was heard a moment ago; {progress}",
        (),
        AGENT,
    ),
    Cause(
        "system_starts",
        _phase(Phase.BOOTING),
        "nothing is wrong so far: the disk is written, and its new system starts",
        (),
        _SYSTEM,
    ),
    Cause(
        "soaks",
        _phase(Phase.PROVING),
        "nothing is wrong: the new system phoned home, and its health is watched for a while",
        (),
        _SYSTEM,
    ),
    Cause(
        "quarantined",
        lambda case: case.host.quarantine_reason is not None,
        "it is quarantined, and nothing is done to it until a person decides: {quarantine}",
        ("provisioner host show {host}: what failed on it",),
        SERVICE,
    ),
    Cause(
        "not_confirmed",
        lambda case: not case.host.is_confirmed,
        "it was discovered, and nobody has taken it into management",
        ("provisioner host confirm {host} --name NAME --profile PROFILE",),
        _ALL,
    ),
    Cause(
        "cancelled",
        lambda case: case.operation is not None and case.operation.phase is Phase.CANCELLED,
        "a person cancelled it; the host was given back to its own disk",
        (),
        SERVICE,
    ),
    Cause("healthy", _idle(HostState.ACTIVE), "nothing is wrong: it runs {release}, proven", ()),
    Cause("retired", _idle(HostState.RETIRED), "it is retired: nothing is done to it", ()),
    Cause(
        "idle",
        lambda _: True,
        "nothing is wrong, and nothing is being done; no release was proven on it",
        (
            "{unprotect_it}",
            "{free_it}",
            "{give_it_a_bmc}",
            "{give_it_a_profile}",
            "provisioner reimage {host} --release RELEASE",
        ),
    ),
)

CAUSES: Final = (
    *SAFETY,
    *QUEUE,
    *BMC,
    *DOWNLOAD,
    *NETBOOT,
    *_OF_THE_AGENT,
    *_OF_THE_SYSTEM,
    *_AS_IT_IS,
)
