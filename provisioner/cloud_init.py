"""Asks the cloud-init that is installed here whether it would take a cloud-config.

Source: cloud-init(1), `cloud-init schema`; seen with 22.4.2 (Debian 12) and, in its words,
like the versions since: the exit code tells that something is wrong, and the text what.
"""

import os
import re
import shutil
import subprocess
from datetime import timedelta
from typing import Final

import structlog

from .core.contracts import SchemaCheck

PROGRAM: Final = "cloud-init"
LIMIT: Final = timedelta(seconds=20)  # twice: its version, and its word
TEXT_MAX: Final = 4000

_IS_VALID: Final = re.compile(r"^Valid ", re.MULTILINE)
_PART: Final = r"Cloud config schema {}: (.*?)(?:\n\n|\nCloud config schema |\nError|\Z)"
_ERRORS: Final = re.compile(_PART.format("errors"), re.DOTALL)
_DEPRECATIONS: Final = re.compile(_PART.format("deprecations"), re.DOTALL)

log = structlog.get_logger(__name__)


def check_cloud_config(
    text: str, program: str = PROGRAM, *, limit: timedelta = LIMIT
) -> SchemaCheck:
    """Return what cloud-init's schema says of a `#cloud-config`.

    Never raises: without a cloud-init, or with one that cannot look, nothing was checked.
    """
    found = shutil.which(program)
    if found is None:
        return SchemaCheck(note="there is no cloud-init where the service runs")
    try:
        version = _run([found, "--version"], limit).stdout.split()[-1]
        done = _ask(found, text, limit)
    except (OSError, IndexError, subprocess.TimeoutExpired) as error:
        log.warning("cloud-init could not check a profile", error=str(error))
        return SchemaCheck(note=f"the cloud-init of the service could not look: {error}")
    return _verdict(f"{PROGRAM} {version}", done)


def _ask(program: str, text: str, limit: timedelta) -> subprocess.CompletedProcess[str]:
    # In memory, since it holds whatever secrets the profile holds.
    handle = os.memfd_create("user-data")
    try:
        with os.fdopen(os.dup(handle), "w", encoding="utf-8") as file:
            file.write(text)
        words = [program, "schema", "--config-file", f"/proc/self/fd/{handle}"]
        return _run(words, limit, pass_fds=(handle,))
    finally:
        os.close(handle)


def _run(
    words: list[str], limit: timedelta, pass_fds: tuple[int, ...] = ()
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words,
        pass_fds=pass_fds,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        # Its words are read here, so they must be English.
        env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"},
        timeout=limit.total_seconds(),
        check=False,
    )


def _verdict(asked: str, done: subprocess.CompletedProcess[str]) -> SchemaCheck:
    said = done.stdout
    if errors := _ERRORS.search(said):
        return SchemaCheck(checked_by=asked, errors=_short(errors[1]))
    if done.returncode == 0 and _IS_VALID.search(said):
        deprecated = _DEPRECATIONS.search(said)
        return SchemaCheck(checked_by=asked, note=_short(deprecated[1]) if deprecated else None)
    # Not shown: whatever this is, it may quote the profile.
    log.warning("cloud-init could not check a profile", cloud_init=asked, code=done.returncode)
    return SchemaCheck(note=f"{asked} could not look; `cloud-init schema` there says why")


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= TEXT_MAX else text[:TEXT_MAX] + " …"
