"""Answers plain requests for chunks from the bytes of the request, before any framework.

A rack asks for chunks many thousand times, and they need nothing that a framework knows. What
is not the plainest form of such a request, and every failure, is left to the routes in `files`.
"""

import re
import time
from email.utils import formatdate
from typing import Final

from provisioner.core.batches import BATCH_CHUNKS_MAX, LENGTH, SPEC_CHARACTERS_MAX, frame_bytes_max
from provisioner.core.manifest import CHUNK_BYTES_MIN
from provisioner.errors import ProvisionerError

from .chunk_batches import ChunkBatches
from .file_source import BYTES, IMMUTABLE, LocalFiles

# Where a server finds them among the application's extensions.
EXTENSION: Final = "provisioner-quick-chunks"
# What is longer is not plain.
REQUEST_BYTES_MAX: Final = 2048
# The largest batch. One large chunk may have no room: then the routes answer.
BODY_BYTES_MAX: Final = BATCH_CHUNKS_MAX * (LENGTH.size + frame_bytes_max(CHUNK_BYTES_MIN))

# The head and the body.
Answer = tuple[bytes, memoryview]

# Two paths, and headers that change nothing in the answer. There is no body, no range, no
# condition and no wish to close: nothing that two programs could understand in two ways.
_HEADERS: Final = (
    rb"(?:(?i:accept|accept-encoding|user-agent): ?[ -~]*\r\n|(?i:connection: ?keep-alive)\r\n)*"
)
_PLAIN: Final = re.compile(
    rb"GET /(?:(chunks/([0-9a-f]{2})/(\2[0-9a-f]{62}))"
    rb"|releases/([0-9a-f]{64})/chunks/([0-9,-]{1,%d})) HTTP/1\.1\r\n"
    % SPEC_CHARACTERS_MAX
    + _HEADERS
    + rb"(?i:host): ?[!-~]+\r\n"
    + _HEADERS
    + rb"\r\n"
)


class QuickChunks:
    """Chunks, and batches of them, that lie on this machine. Safe to use from several threads."""

    def __init__(self, files: LocalFiles, batches: ChunkBatches) -> None:
        self._files = files
        self._batches = batches
        self._date = (0, b"")

    def answer(self, request: bytes, into: memoryview, *, may_wait: bool) -> Answer | None:
        """Return what answers a request, or None, and then the routes do.

        request is all that has come. The body is a part of `into`. Unless may_wait, there is
        an answer only for a single chunk that is in memory already.
        """
        match = _PLAIN.fullmatch(request)
        if match is None:
            return None
        path, _, digest, release, spec = match.groups()
        if digest:
            count = self._files.read_into(path.decode(), into, may_wait=may_wait)
            more = b'ETag: "%b"\r\nAccept-Ranges: bytes\r\n' % digest
        else:
            count = self._batch(release.decode(), spec.decode(), into) if may_wait else None
            more = b""
        return None if count is None else (self._head(count, more), into[:count])

    def _batch(self, release: str, spec: str, into: memoryview) -> int | None:
        """Put a batch into the buffer, and return its length; None when there is none."""
        try:
            paths = self._batches.paths(release, spec)
        except ProvisionerError:
            return None
        end = 0
        for path in paths:
            begin = end + LENGTH.size
            count = self._files.read_into(path, into[begin:])
            if count is None:
                return None
            LENGTH.pack_into(into, end, count)
            end = begin + count
        return end

    def _head(self, length: int, more: bytes) -> bytes:
        return (
            b"HTTP/1.1 200 OK\r\nDate: %b\r\nConnection: keep-alive\r\nContent-Type: %b\r\n"
            b"Content-Length: %d\r\nCache-Control: %b\r\n%b\r\n"
            % (self._now(), BYTES.encode(), length, IMMUTABLE.encode(), more)
        )

    def _now(self) -> bytes:
        """Return the time as HTTP has it, written anew when it is another one."""
        now = int(time.time())
        if self._date[0] != now:
            self._date = now, formatdate(now, usegmt=True).encode()
        return self._date[1]
