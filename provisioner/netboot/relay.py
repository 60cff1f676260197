"""Finds for TFTP what a fixed list of files cannot hold: a host's grub.cfg, and ramdisks.

The grub.cfg comes from the boot listener, which alone decides, so this knows no database.
Without its answer a host finds no file, and boots its own disk.
"""

import http.client
import mmap
import re
from http import HTTPStatus
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import urlencode, urlsplit

import structlog

from provisioner.netboot.grub import ANSWERS, RAMDISKS

# The listener has decided within three seconds; GRUB asks again for a minute.
ANSWER_LIMIT_S: Final = 5.0
ANSWER_BYTES_MAX: Final = 64 * 1024

_ANSWER: Final = re.compile(rf"{ANSWERS}/(?P<mac>[0-9a-f:]{{17}})/(?P<uuid>[0-9a-f-]{{0,36}})")
_RAMDISK: Final = re.compile(rf"{RAMDISKS}/(?P<digest>[0-9a-f]{{64}})/(?P<file>vmlinuz|initrd)")

log = structlog.get_logger(__name__)

Content = bytes | mmap.mmap


class Source(Protocol):
    """Where a TFTP server looks for a name that it does not hold itself."""

    def has(self, name: str) -> bool:
        """Say, at once, whether `find` should be asked for a name of this form."""
        ...

    def find(self, name: str, client: str) -> Content | None:
        """Return the content, or None. May take seconds; runs in a thread; never raises."""
        ...


class BootRelay:
    """Answers from the boot listener at `boot_url`, and files from the folder of ramdisks."""

    def __init__(self, boot_url: str, ramdisks: Path) -> None:
        parts = urlsplit(boot_url)
        self._listener = (parts.hostname or "", parts.port or http.client.HTTP_PORT)
        self._ramdisks = ramdisks

    def has(self, name: str) -> bool:
        return bool(_ANSWER.fullmatch(name) or _RAMDISK.fullmatch(name))

    def find(self, name: str, client: str) -> Content | None:
        try:
            if found := _RAMDISK.fullmatch(name):
                return _mapped(self._ramdisks / found["digest"] / found["file"])
            if found := _ANSWER.fullmatch(name):
                asked = {"mac": found["mac"], "uuid": found["uuid"], "address": client}
                return self._ask(f"{ANSWERS}?{urlencode(asked)}")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: empty
            log.warning("not relayed", file=name, client=client, error=str(error))
        return None

    def _ask(self, path: str) -> bytes | None:
        connection = http.client.HTTPConnection(*self._listener, timeout=ANSWER_LIMIT_S)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            body = answer.read(ANSWER_BYTES_MAX + 1)
        finally:
            connection.close()
        if answer.status != HTTPStatus.OK or len(body) > ANSWER_BYTES_MAX:
            log.warning("not relayed", status=answer.status, answer_bytes=len(body))
            return None
        return body


def _mapped(path: Path) -> Content:
    """Return a file's content without reading it: a ramdisk may be 100 MiB, and is immutable."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
