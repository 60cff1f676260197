"""Extended attributes as ext4 keeps them, in the inode and in a block of their own. No I/O.

Source: Linux, Documentation/filesystems/ext4/attributes.rst, and fs/ext4/acl.h.
"""

from __future__ import annotations

import struct
from typing import Final

from provisioner.errors import RequestError

_MAGIC: Final = 0xEA020000
_ENTRY: Final = struct.Struct("<BBHIII")
_INODE_CORE_BYTES: Final = 128
_BLOCK_HEADER_BYTES: Final = 32
_PREFIX: Final = {
    1: "user.",
    2: "system.posix_acl_access",
    3: "system.posix_acl_default",
    4: "trusted.",
    6: "security.",
}
_ACLS: Final = frozenset({2, 3})
# On the disk an ACL has version 1, and ids only where they say something: ACL_USER, ACL_GROUP.
_ACL_VERSION_ON_DISK: Final = 1
_ACL_VERSION_OUTSIDE: Final = 2
_ACL_WITH_ID: Final = frozenset({0x02, 0x08})
_ACL_NO_ID: Final = 0xFFFFFFFF


def xattrs_in_inode(inode: bytes) -> dict[str, str]:
    """Return {name: value in hex} of what stands behind the inode's fields."""
    if len(inode) <= _INODE_CORE_BYTES + 4:
        return {}
    (extra_bytes,) = struct.unpack_from("<H", inode, _INODE_CORE_BYTES)
    area = inode[_INODE_CORE_BYTES + extra_bytes :]
    if len(area) < 8 or struct.unpack_from("<I", area) != (_MAGIC,):
        return {}
    return _parsed(area[4:], 0)


def xattrs_in_block(block: bytes) -> dict[str, str]:
    """Return {name: value in hex} of a block that an inode names for its attributes."""
    if struct.unpack_from("<I", block) != (_MAGIC,):
        raise _refused("a block without its magic number")
    return _parsed(block, _BLOCK_HEADER_BYTES)


def _parsed(area: bytes, place: int) -> dict[str, str]:
    """Return what the list of entries at `place` says; values lie in the same area."""
    found = {}
    while area[place : place + 4] not in (bytes(4), b""):
        if place + _ENTRY.size > len(area):
            raise _refused("a list without end")
        name_bytes, index, offset, inode, size, _ = _ENTRY.unpack_from(area, place)
        name = area[place + _ENTRY.size : place + _ENTRY.size + name_bytes]
        value = area[offset : offset + size]
        if index not in _PREFIX or inode or len(value) != size:
            raise _refused(f"one of kind {index}, {size} bytes at {offset}")
        if index in _ACLS:
            value = _acl(value)
        found[_PREFIX[index] + name.decode("utf-8", "backslashreplace")] = value.hex()
        place += -(-(_ENTRY.size + name_bytes) // 4) * 4
    return found


def _acl(stored: bytes) -> bytes:
    """Return an access control list as getxattr(2) gives it."""
    if len(stored) < 4 or struct.unpack_from("<I", stored) != (_ACL_VERSION_ON_DISK,):
        raise _refused("an access control list of another version")
    given = [struct.pack("<I", _ACL_VERSION_OUTSIDE)]
    place = 4
    while place + 4 <= len(stored):
        tag, permissions = struct.unpack_from("<HH", stored, place)
        place += 4
        who = _ACL_NO_ID
        if tag in _ACL_WITH_ID:
            (who,) = struct.unpack_from("<I", stored, place)
            place += 4
        given.append(struct.pack("<HHI", tag, permissions, who))
    return b"".join(given)


def _refused(found: str) -> RequestError:
    return RequestError(
        "an extended attribute in the root file system cannot be read",
        expected="user, trusted and security attributes, and access control lists",
        found=found,
    )
