"""Facts of boots that stand where they stand, one for each cause and some beside it."""

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from provisioner.core.diagnosis import Dhcp, Facts
from provisioner.core.model import Event, Host, HostState, Json, Kind, Operation, Phase

from .examples import HOST, NOW, operation_in

# The order in which the phases are gone through.
_WAY = (
    Phase.QUEUED,
    Phase.NETBOOTING,
    Phase.PREPARING,
    Phase.WRITING,
    Phase.VERIFYING,
    Phase.BOOTING,
    Phase.PROVING,
)
LATER = NOW + timedelta(hours=1)


def after(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def line(source: str, seconds: float = 10, text: str = "", **detail: Any) -> Event:
    return Event(after(seconds), source, text or f"{source} at {seconds:g}", detail=detail)


def power_on(seconds: float = 5) -> Event:
    return line("bmc", seconds, "powered on", event="powered_on", code=None)


def dhcp(packet: str, seconds: float = 60, client: str = "firmware", **more: Any) -> Event:
    return line("dhcp", seconds, packet=packet, client=client, **more)


def tftp(outcome: str, seconds: float = 62, file: str = "undionly.kpxe") -> Event:
    return line("tftp", seconds, file=file, outcome=outcome)


def script(answer: str = "ramdisk", seconds: float = 65, **more: Any) -> Event:
    return line("http", seconds, f"boot script: {answer}", answer=answer, **more)


def fetch(file: str, state: str, seconds: float = 70, taken: int = 0, size: int = 4096) -> Event:
    figures = {"taken_bytes": taken, "size_bytes": size}
    return line("http", seconds, f"{file}: {state}", file=file, download=state, **figures)


def failed(code: str, phase: Phase, **more: Any) -> Operation:
    """A deployment that failed in `phase`, with an error such as the service keeps."""
    error: Json = {"code": code, "message": f"it was {code}", "hint": "the hint", **more}
    passed = {one.value: 1.0 for one in _WAY[: _WAY.index(phase) + 1]}
    return replace(
        operation_in(Phase.FAILED),
        error=error,
        phase_seconds=passed,
        started_at=NOW if phase is not Phase.QUEUED else None,
        ended_at=LATER,
        phase_at=LATER,
    )


def story(operation: Operation | None, *events: Event, host: Host = HOST, **more: Any) -> Facts:
    given: dict[str, Any] = {"now": LATER, "release_name": "web@1", **more}
    return Facts(host=host, operation=operation, events=events, **given)


def unheard(*events: Event, **more: Any) -> Facts:
    """The facts of a host of which no ticket came back, after it was switched on."""
    operation = failed("netbooting_timed_out", Phase.NETBOOTING)
    return story(operation, power_on(), *events, **more)


def ended_by(code: str, phase: Phase = Phase.PREPARING, **error: Any) -> Facts:
    return story(failed(code, phase, **error))


def under_way(phase: Phase, seconds: float, *events: Event, **changes: Any) -> Facts:
    """The facts of an operation that has been in `phase` for so long."""
    given = {"started_at": NOW, **changes}
    return story(replace(operation_in(phase), **given), *events, now=after(seconds))


def heard(seconds: float) -> Json:
    return {"evidence": {"agent_heard_at": after(seconds).isoformat()}}


def flagged(**flags: Any) -> Host:
    return replace(HOST, **flags)


ACTIVE = replace(HOST, state=HostState.ACTIVE, release="ab" * 32)
DONE = replace(operation_in(Phase.SUCCEEDED), started_at=NOW)
QUARANTINED = flagged(quarantine_reason="web@1 failed in op_1")
ILL: Json = {"checks": {"ssh port 22": {"healthy": False, "found": "connection refused"}}}
WELL: Json = {"checks": {"ssh port 22": {"healthy": True, "found": "SSH-2.0"}}}
ASKED = dhcp("DISCOVER")
OFFERED = (ASKED, dhcp("OFFER", 61))
ADDRESSED = (*OFFERED, dhcp("REQUEST", 61.5), dhcp("ACK", 62))
LOADED = (*ADDRESSED, tftp("served", 63))
TOLD = (*LOADED, script("ramdisk", 65))
# Where downloads would be seen, and where they are not.
WATCHED = (*LOADED, script("ramdisk", 65, downloads_seen=True))
UNWATCHED = (*LOADED, script("ramdisk", 65, downloads_seen=False))
KERNEL = (fetch("kernel", "asked", 66), fetch("kernel", "whole", 67, 4096))
RAMDISK = (fetch("ramdisk", "asked", 68), fetch("ramdisk", "whole", 75, 4096))
GRUB_FILE = f"/ramdisks/{'ab' * 32}/"

STORIES: list[tuple[str, Facts]] = [
    ("ticket_contested", ended_by("ticket_contested", Phase.PREPARING)),
    ("identity_doubtful", ended_by("identity_doubtful", Phase.NETBOOTING)),
    ("own_host", ended_by("own_host", Phase.QUEUED)),
    ("database_restored", ended_by("database_restored", Phase.WRITING)),
    ("release_revoked", ended_by("release_revoked", Phase.WRITING)),
    (
        "in_maintenance",
        story(failed("host_refused", Phase.QUEUED), host=flagged(in_maintenance=True)),
    ),
    ("protected", story(failed("host_refused", Phase.QUEUED), host=flagged(is_protected=True))),
    ("host_refused", ended_by("host_refused", Phase.QUEUED)),
    ("profile_unreadable", ended_by("profile_unreadable", Phase.QUEUED)),
    # --- the queue
    ("observe_only", story(operation_in(Phase.QUEUED), is_observing=True, waits="observes")),
    ("breaker_open", story(operation_in(Phase.QUEUED), breaker="10 failed", waits="the breaker")),
    ("waits_for_its_turn", story(operation_in(Phase.QUEUED), waits="as many as may be")),
    ("waited_too_long", ended_by("queued_timed_out", Phase.QUEUED)),
    ("waited_too_long", story(failed("queued_timed_out", Phase.QUEUED), breaker="opened since")),
    ("nobody_starts_it", story(operation_in(Phase.QUEUED), now=after(31))),
    ("about_to_start", story(operation_in(Phase.QUEUED), now=after(29))),
    # --- the BMC
    ("bmc_wrong_password", ended_by("bmc_auth_failed", Phase.NETBOOTING)),
    ("bmc_unreachable", ended_by("bmc_unreachable", Phase.NETBOOTING)),
    ("bmc_busy", ended_by("bmc_busy", Phase.NETBOOTING)),
    ("bmc_disobeyed", ended_by("bmc_disobeyed", Phase.NETBOOTING)),
    ("bmc_rejected", ended_by("bmc_rejected", Phase.NETBOOTING)),
    # --- netboot, once it is over
    ("nothing_heard", unheard()),
    ("nothing_heard", unheard(dhcp=Dhcp.PROXY)),
    ("nothing_heard_elsewhere", unheard(dhcp=Dhcp.OFF)),
    ("nothing_heard", unheard(dhcp("DISCOVER", -10))),
    ("booted_its_disk", unheard(dhcp("DISCOVER", 80, "system"))),
    ("booted_its_disk", unheard(line("cloud-init", 80))),
    # A renewal before it was switched off says nothing of how it started.
    ("nothing_heard", unheard(dhcp("REQUEST", 2, "system"))),
    ("dhcp_silent", unheard(ASKED)),
    ("dhcp_silent", unheard(ASKED, dhcp("DISCOVER", 80, "system"))),
    ("dhcp_no_address", unheard(dhcp("DISCOVER", trouble="no address available"))),
    ("dhcp_offer_not_taken", unheard(*OFFERED)),
    ("dhcp_offer_not_taken", unheard(*OFFERED, dhcp("NAK", 62, "system"))),
    ("dhcp_refused", unheard(*OFFERED, dhcp("NAK", 62, trouble="wrong network"))),
    ("dhcp_refused", unheard(dhcp("REQUEST"), dhcp("NAK", 62))),
    ("other_dhcp_server", unheard(*OFFERED, dhcp("NAK", 62, other_server=True))),
    ("no_tftp", unheard(dhcp("NAK", 50), *ADDRESSED)),
    ("no_tftp", unheard(*ADDRESSED)),
    ("no_tftp", unheard(dhcp("PXE"), dhcp=Dhcp.PROXY)),
    ("tftp_not_found", unheard(*ADDRESSED, tftp("not found"))),
    ("tftp_aborted", unheard(*ADDRESSED, tftp("aborted"))),
    ("tftp_aborted", unheard(*ADDRESSED, tftp("not found"), tftp("timed out", 70))),
    # Boot ROMs ask for the size first, and break off.
    ("no_boot_script", unheard(*ADDRESSED, tftp("aborted"), tftp("served", 64))),
    ("no_boot_script", unheard(*LOADED)),
    ("no_boot_script", unheard(dhcp("DISCOVER", 60, "iPXE"), dhcp("ACK", 61, "iPXE"))),
    # It has no lease of ours, and so whoever asks in its name is sent away.
    ("other_dhcp_server", unheard(*OFFERED, dhcp("NAK", 62, other_server=True), script("disk"))),
    ("sent_to_its_disk", unheard(*LOADED, script("disk"))),
    ("sent_to_its_disk", unheard(script("disk"), dhcp=Dhcp.OFF)),
    ("ramdisk_not_heard", unheard(*TOLD)),
    ("ramdisk_not_heard", unheard(script("disk", 50), script("ramdisk"))),
    ("agent_not_heard", unheard(*TOLD, dhcp("DISCOVER", 90, "system"))),
    ("ramdisk_not_heard", unheard(dhcp("DISCOVER", 50, "system"), *TOLD)),
    ("ramdisk_not_heard", unheard(*TOLD, dhcp("OFFER", 90, "system"))),
    # --- kernel and ramdisk on their way to it
    ("download_not_begun", unheard(*WATCHED)),
    ("download_not_begun", unheard(*WATCHED, *KERNEL)),
    ("ramdisk_not_heard", unheard(*UNWATCHED)),
    ("ramdisk_not_heard", unheard(*UNWATCHED, *KERNEL)),
    ("ramdisk_missing", unheard(*WATCHED, fetch("kernel", "missing"))),
    ("download_cut", unheard(*WATCHED, *KERNEL, RAMDISK[0], fetch("ramdisk", "cut", 80, 99))),
    ("download_cut", unheard(*UNWATCHED, fetch("kernel", "cut"), fetch("kernel", "cut", 80))),
    # It was cut again and again, and came in the end.
    ("ramdisk_silent", unheard(*WATCHED, fetch("ramdisk", "cut", 67), *KERNEL, *RAMDISK)),
    ("ramdisk_silent", unheard(*WATCHED, *KERNEL, fetch("ramdisk", "unconfirmed", 90, 4000))),
    ("ramdisk_silent", unheard(*WATCHED, *RAMDISK, fetch("ramdisk", "cut", 90))),
    ("agent_not_heard", unheard(*WATCHED, *RAMDISK, dhcp("DISCOVER", 90, "system"))),
    # That the kernel came whole may be told after the next question.
    ("download_cut", unheard(*WATCHED, KERNEL[0], fetch("ramdisk", "cut", 66.9), KERNEL[1])),
    ("download_cut", unheard(*WATCHED, *KERNEL, fetch("kernel", "cut", 90))),
    # Before it was told: those of somebody else at its address.
    ("download_not_begun", unheard(*KERNEL, *RAMDISK, script(seconds=99, downloads_seen=True))),
    ("download_stalled", unheard(*WATCHED, *KERNEL, fetch("ramdisk", "stalled", 99, 512))),
    ("download_not_over", unheard(*WATCHED, *KERNEL, RAMDISK[0])),
    ("download_not_over", unheard(*WATCHED, fetch("kernel", "goes on", 99, 512))),
    ("ramdisk_silent", unheard(*TOLD, tftp("unconfirmed", 99, GRUB_FILE + "initrd"))),
    ("download_cut", unheard(*TOLD, tftp("timed out", 99, GRUB_FILE + "initrd"))),
    ("ramdisk_missing", unheard(*TOLD, tftp("not found", 99, GRUB_FILE + "vmlinuz"))),
    ("ramdisk_not_heard", unheard(*TOLD, tftp("served", 99, GRUB_FILE + "vmlinuz"))),
    ("ramdisk_not_heard", unheard(*TOLD, tftp("served", 99, "/grub/grub.cfg"))),
    ("fetches_ramdisk", under_way(Phase.NETBOOTING, 100, power_on(), *WATCHED, *KERNEL[:1])),
    ("netbooting", under_way(Phase.NETBOOTING, 100, power_on(), *WATCHED, *KERNEL)),
    (
        "netbooting",  # the next start: what was seen was of the last one
        under_way(Phase.NETBOOTING, 120, *WATCHED, *KERNEL[:1], phase_at=after(110)),
    ),
    ("download_not_over", under_way(Phase.NETBOOTING, 127, power_on(), *WATCHED, *KERNEL[:1])),
    # --- netboot, while it lasts
    ("netbooting", under_way(Phase.NETBOOTING, 59)),
    ("bmc_not_done_yet", under_way(Phase.NETBOOTING, 61)),
    ("bmc_not_done_yet", under_way(Phase.NETBOOTING, 900, power_on(), phase_at=after(700))),
    ("netbooting", under_way(Phase.NETBOOTING, 740, power_on(), phase_at=after(700))),
    # Discovered, and on already: nobody switches it.
    ("netbooting", replace(under_way(Phase.NETBOOTING, 110, script()), host=flagged(bmc=None))),
    (
        "ramdisk_not_heard",
        replace(under_way(Phase.NETBOOTING, 130, script()), host=flagged(bmc=None)),
    ),
    ("netbooting", under_way(Phase.NETBOOTING, 5 + 239, power_on())),
    ("nothing_heard", under_way(Phase.NETBOOTING, 5 + 241, power_on())),
    ("netbooting", under_way(Phase.NETBOOTING, 110, power_on(), ASKED)),
    ("dhcp_silent", under_way(Phase.NETBOOTING, 121, power_on(), ASKED)),
    ("nothing_heard", under_way(Phase.NETBOOTING, 300, dhcp("RELEASE", 2, "system"), power_on())),
    # --- the agent
    ("no_disk_matches", ended_by("no_disk_matches", found=[{"name": "vda"}])),
    ("several_disks_match", ended_by("several_disks_match")),
    ("disk_too_small", ended_by("disk_too_small")),
    ("host_unfit", ended_by("host_unfit")),
    ("image_unfit", ended_by("image_unfit")),
    ("permission_refused", ended_by("permission_refused")),
    ("permission_expired", ended_by("permission_expired", Phase.WRITING)),
    ("disk_failed", ended_by("disk_failed", Phase.PREPARING)),
    ("disk_write_failed", ended_by("disk_failed", Phase.WRITING)),
    ("disk_read_failed", ended_by("disk_failed", Phase.VERIFYING)),
    ("read_back_mismatch", ended_by("read_back_mismatch", Phase.VERIFYING)),
    ("chunk_unavailable", ended_by("chunk_unavailable", Phase.WRITING)),
    ("chunk_corrupt", ended_by("chunk_corrupt", Phase.WRITING)),
    ("release_untrusted", ended_by("manifest_signature")),
    ("release_outdated", ended_by("release_expired")),
    ("service_unreachable", ended_by("service_unreachable")),
    ("service_refused", ended_by("service_refused")),
    ("seed_unfit", ended_by("seed_unfit", Phase.VERIFYING)),
    ("seed_gone", ended_by("seed_gone", Phase.VERIFYING)),
    ("boot_arguments", ended_by("boot_arguments")),
    ("agent_silent", ended_by("preparing_timed_out", Phase.PREPARING)),
    ("agent_silent", ended_by("writing_timed_out", Phase.WRITING)),
    ("agent_silent", ended_by("verifying_timed_out", Phase.VERIFYING)),
    ("agent_silent", under_way(Phase.WRITING, 161, **heard(100))),
    ("agent_works", under_way(Phase.WRITING, 159, **heard(100))),
    ("agent_works", under_way(Phase.VERIFYING, 500)),
    # --- the new system
    ("wrong_disk", ended_by("wrong_disk", Phase.BOOTING)),
    ("wrong_system", ended_by("wrong_system", Phase.BOOTING)),
    ("system_not_heard", ended_by("booting_timed_out", Phase.BOOTING)),
    # A deployment that failed here had been booting for the last second of its hour: what the
    # ramdisk asked before that is no word of the new system.
    (
        "system_not_heard",
        story(failed("booting_timed_out", Phase.BOOTING), dhcp("DISCOVER", 90, "system")),
    ),
    (
        "system_without_word",
        story(
            failed("booting_timed_out", Phase.BOOTING),
            line("http", 3599.2),
            dhcp("ACK", 3599.3, "firmware"),
            dhcp("DISCOVER", 3599.5, "system"),
        ),
    ),
    ("system_starts", under_way(Phase.BOOTING, 359)),
    ("system_not_heard", under_way(Phase.BOOTING, 361, dhcp("DISCOVER", 362))),
    (
        "system_not_heard",
        under_way(Phase.BOOTING, 461, dhcp("ACK", 90, "system"), phase_at=after(100)),
    ),
    (
        "system_without_word",
        under_way(Phase.BOOTING, 461, dhcp("ACK", 110, "system"), phase_at=after(100)),
    ),
    ("unhealthy", under_way(Phase.PROVING, 60, evidence=ILL)),
    ("unhealthy", story(replace(failed("proving_timed_out", Phase.PROVING), evidence=ILL))),
    ("not_healthy_for_long", ended_by("proving_timed_out", Phase.PROVING)),
    ("soaks", under_way(Phase.PROVING, 60, evidence=WELL)),
    # --- the rest
    ("failed", ended_by("bug", Phase.WRITING)),
    ("failed", ended_by("", Phase.WRITING, message="it broke")),
    ("quarantined", story(operation_in(Phase.CANCELLED), host=QUARANTINED)),
    ("quarantined", story(None, host=QUARANTINED)),
    ("cancelled", story(operation_in(Phase.CANCELLED))),
    ("not_confirmed", story(None, host=flagged(is_confirmed=False))),
    ("healthy", story(DONE, host=ACTIVE)),
    ("healthy", story(None, host=replace(ACTIVE, is_protected=True))),
    ("retired", story(None, host=flagged(state=HostState.RETIRED))),
    ("idle", story(None, host=flagged(state=HostState.ENROLLED))),
    ("idle", story(DONE)),
]


# Beside the stories: what changes no cause, and what is said of it.
ASIDES: list[Facts] = [
    story(operation_in(Phase.SUCCEEDED, Kind.INSPECTION), host=flagged(bmc=None, profile=None)),
    story(replace(failed("disk_failed", Phase.WRITING), phase_seconds={}), release_name=None),
    story(replace(failed("disk_failed", Phase.WRITING), follow_up_at=LATER), host=QUARANTINED),
    story(replace(failed("disk_failed", Phase.WRITING), follow_up_at=LATER), before="another"),
    ended_by("no_disk_matches", found="x" * 10_000),
    ended_by("wrong_disk", Phase.BOOTING, expected={"serial": "S-1"}, found={"wwn": "naa.5"}),
    ended_by("wrong_disk", Phase.BOOTING, found={"serial": "S-2", "name": "sdb"}, expected={}),
    unheard(ASKED, replace(ASKED, text="asks"), replace(ASKED, text="asks")),
    under_way(Phase.WRITING, 5, progress={"done_bytes": 50, "total_bytes": 200}),
    unheard(ASKED, replace(ASKED, at=after(4000))),
]
