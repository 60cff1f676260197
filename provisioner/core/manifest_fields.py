"""What a single field of a manifest may hold. Standard library only: it runs in the ramdisk."""

import re
from typing import Final

from provisioner.errors import RequestError

DIGEST: Final = re.compile(r"[0-9a-f]{64}")
RELEASE_ID: Final = re.compile(r"[0-9a-f]{32,64}")
IMAGE: Final = re.compile(r"[a-z0-9][a-z0-9.-]{0,62}")
VERSION: Final = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+~-]{0,62}")
MOMENT: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
GUID: Final = re.compile(r"[0-9A-F]{8}(-[0-9A-F]{4}){3}-[0-9A-F]{12}")
LABEL: Final = re.compile(r"[ -~]{1,36}")
TEXT: Final = re.compile(r"[ -~]{1,256}")
WORD: Final = re.compile(r"[!-~]{1,256}")
PATH: Final = re.compile(r"(/[!-.0-~]+)+")
ATTACHMENT: Final = re.compile(r"[a-z][a-z0-9-]{0,30}\.json")


def is_digest(value: object) -> bool:
    """Say whether value is a sha256 in lower-case hex, and so safe as a file name."""
    return isinstance(value, str) and DIGEST.fullmatch(value) is not None


def is_release_id(value: object) -> bool:
    """Say whether value may stand as release_id: 32 to 64 lower-case hex digits."""
    return isinstance(value, str) and RELEASE_ID.fullmatch(value) is not None


def check_image_name(image: object) -> None:
    """Raise RequestError unless this is a usable image name, such as `debian-12`."""
    match("image", image, IMAGE, "lower-case letters, digits, '.' and '-', at most 63")


def check_version(version: object) -> None:
    """Raise RequestError unless this is a usable version, such as `2026.11.1`."""
    match("version", version, VERSION, "letters, digits and '.+~-', at most 63")


def match(name: str, value: object, pattern: re.Pattern[str], expected: str) -> None:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise wrong(name, expected, value)


def number(name: str, value: object, least: int, most: int = 1 << 62) -> None:
    # type() and not isinstance(): true is an int to Python, and 1 to nobody else.
    if type(value) is not int or not least <= value <= most:
        raise wrong(name, f"a whole number from {least} to {most}", value)


def wrong(name: str, expected: str, found: object) -> RequestError:
    return RequestError(f"{name} is wrong", expected=expected, found=repr(found)[:200])
