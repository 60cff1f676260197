"""Reads and writes a disk past the page cache, so that what is read comes from the disk.

Works on a block device or a file. Offsets and lengths are bytes in whole sectors. It knows
nothing of images, and asks nobody for permission: that is its caller's duty.
"""

import fcntl
import mmap
import os
import stat
import struct
from typing import Final, Self

from provisioner.agent.problems import DiskFailed, HostUnfit

SECTOR_BYTES: Final = 512

# The usual huge page of amd64 and arm64.
HUGE_PAGE_BYTES: Final = 2 * 1024 * 1024
# asm-generic/mman-common.h; Python's mmap does not name it.
_MAP_HUGETLB: Final = 0x40000

# linux/fs.h
_BLKRRPART: Final = 0x125F
_BLKSSZGET: Final = 0x1268
_BLKDISCARD: Final = 0x1277
_BLKZEROOUT: Final = 0x127F


def aligned_buffer(size_bytes: int) -> mmap.mmap:
    """Return a buffer that begins on a page, as reading past the cache demands."""
    return mmap.mmap(-1, max(size_bytes, mmap.PAGESIZE))


def chunk_buffer(size_bytes: int) -> mmap.mmap:
    """Return a buffer of at least that size which is one piece of memory, where there is one.

    A disk's driver then handles one piece instead of one for each 4 KiB. /init has the
    kernel set huge pages aside; without one this is a buffer like any other.
    """
    whole = -(-size_bytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    try:
        return mmap.mmap(-1, whole, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_HUGETLB)
    except OSError:
        return aligned_buffer(size_bytes)


class DiskFile:
    """An open disk. `name` is what errors call it."""

    def __init__(self, path: str, *, name: str, is_read_only: bool = False) -> None:
        self.name = name
        try:
            # With a descriptor that cannot write, the kernel itself refuses every write.
            self._fd = _open_direct(path, os.O_RDONLY if is_read_only else os.O_RDWR)
        except OSError as error:
            raise self._failed("open", 0, error) from error
        self.is_device = stat.S_ISBLK(os.fstat(self._fd).st_mode)
        self.size_bytes = os.lseek(self._fd, 0, os.SEEK_END)
        if self.is_device and (sector := self._sector_bytes()) != SECTOR_BYTES:
            os.close(self._fd)
            raise HostUnfit(
                f"disk {name} has sectors that our images do not fit",
                expected=f"{SECTOR_BYTES} bytes",
                found=f"{sector} bytes",
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def read_into(self, buffer: mmap.mmap, length: int, offset: int, *, at: int = 0) -> None:
        """Fill `length` bytes of an aligned buffer, from its byte `at` on. Raises DiskFailed."""
        with memoryview(buffer) as view, view[at : at + length] as part:
            try:
                count = os.preadv(self._fd, [part], offset)
            except OSError as error:
                raise self._failed("read", offset, error, length) from error
        if count != length:
            raise self._failed("read", offset, f"{count} bytes came", length)

    def write_from(self, buffer: mmap.mmap, length: int, offset: int, *, at: int = 0) -> None:
        """Write `length` bytes of an aligned buffer, from its byte `at` on. Raises DiskFailed."""
        with memoryview(buffer) as view, view[at : at + length] as part:
            try:
                count = os.pwritev(self._fd, [part], offset)
            except OSError as error:
                raise self._failed("write", offset, error, length) from error
        if count != length:
            raise self._failed("write", offset, f"{count} bytes went", length)

    def read(self, length: int, offset: int) -> bytes:
        """Return a small piece of the disk."""
        with aligned_buffer(length) as buffer:
            self.read_into(buffer, length, offset)
            return buffer[:length]

    def write(self, data: bytes, offset: int) -> None:
        """Write a small piece; its length must be whole sectors."""
        with aligned_buffer(len(data)) as buffer:
            buffer[: len(data)] = data
            self.write_from(buffer, len(data), offset)

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeros, by the disk's own means where it has any."""
        try:
            if self.is_device:
                fcntl.ioctl(self._fd, _BLKZEROOUT, struct.pack("=QQ", offset, length))
            else:
                self._zero_in_file(offset, length)
        except OSError as error:
            raise self._failed("zero", offset, error, length) from error

    def discard(self, offset: int, length: int) -> bool:
        """Tell the disk that a range is not needed; say whether it took the hint."""
        if not self.is_device or length <= 0:
            return False
        try:
            fcntl.ioctl(self._fd, _BLKDISCARD, struct.pack("=QQ", offset, length))
        except OSError:
            # Many disks cannot; the range then keeps its old bytes, and nothing refers to them.
            return False
        return True

    def flush(self) -> None:
        """Return when everything written has reached the disk itself, and forget cached copies."""
        try:
            os.fsync(self._fd)
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise self._failed("flush", 0, error) from error

    def let_kernel_read_table(self) -> None:
        """Have the kernel read the partition table anew. Raises DiskFailed when it will not."""
        if self.is_device:
            try:
                fcntl.ioctl(self._fd, _BLKRRPART)
            except OSError as error:
                raise self._failed("read the partition table of", 0, error) from error

    def _sector_bytes(self) -> int:
        answer = fcntl.ioctl(self._fd, _BLKSSZGET, struct.pack("=i", 0))
        return int(struct.unpack("=i", answer)[0])

    def _zero_in_file(self, offset: int, length: int) -> None:
        step = 1024 * 1024
        for at in range(offset, offset + length, step):
            self.write(bytes(min(step, offset + length - at)), at)

    def _failed(self, what: str, offset: int, why: object, length: int | None = None) -> DiskFailed:
        return DiskFailed(
            f"could not {what} disk {self.name} at byte {offset}",
            expected="no error" if length is None else f"{length} bytes from there on",
            found=str(why),
            hint="look at the disk's health and cabling",
        )


def _open_direct(path: str, access: int) -> int:
    try:
        return os.open(path, access | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        # Some file systems cannot; only a test's file lies on one.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise error
        return os.open(path, access | os.O_CLOEXEC)
