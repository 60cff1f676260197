"""Typed quoting for generated text: boot scripts, GRUB and DHCP configurations.

A template may print only `Quoted` values, and only the functions here make them. They
refuse rather than escape, because iPXE has no escape for `${`, `&&`, `||` or a newline.
"""

import ipaddress
import re
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from provisioner.errors import ConfigError

WORD_CHARACTERS_MAX: Final = 1024
LEASE_MIN: Final = timedelta(minutes=2)  # dnsmasq's own least
LEASE_MAX: Final = timedelta(days=30)

# No blank, quote, backslash, $, {, }, &, |, #, ;, <, > or control character: none of the
# languages we generate can be left with these.
_WORD = re.compile(r"[A-Za-z0-9_.,:=/@+%~\[\]-]+")
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_INTERFACE = re.compile(r"[A-Za-z0-9_.-]{1,15}")
_PATH = re.compile(r"/[A-Za-z0-9_./+-]*")


class Quoted(str):
    """Text that a quoting function let through; nothing else may be printed by a template."""

    __slots__ = ()


def word(value: str) -> Quoted:
    """Return one argument, such as a kernel argument or a ticket.

    Raises ConfigError when it holds anything that the receiving language could read as more
    than a plain word.
    """
    return _checked(value, _WORD, "a plain word")


def digest(value: str) -> Quoted:
    """Return a SHA-256 in lower-case hex."""
    return _checked(value, _DIGEST, "a SHA-256 in hex")


def mac(value: str) -> Quoted:
    """Return a MAC in lower case with colons."""
    return _checked(value, _MAC, "a MAC")


def interface(value: str) -> Quoted:
    """Return the name of a network interface (Linux allows 15 characters)."""
    return _checked(value, _INTERFACE, "an interface name")


def path(value: Path | str) -> Quoted:
    """Return an absolute path without `..` and without characters that need quoting."""
    text = str(value)
    if ".." in Path(text).parts:
        raise _refused(text, "a path without '..'")
    return _checked(text, _PATH, "an absolute path of plain characters")


def address(value: str) -> Quoted:
    """Return an IPv4 address. iPXE as Debian 12 ships it boots over IPv4 only."""
    try:
        return Quoted(ipaddress.IPv4Address(value))
    except ValueError as error:
        raise _refused(value, "an IPv4 address") from error


def base_url(value: str, *, scheme: str) -> Quoted:
    """Return `scheme://host[:port]`, without the trailing slash that would double later."""
    text = value.rstrip("/")
    try:
        parts = urlsplit(text)
        plain = parts.scheme == scheme and parts.hostname and not (parts.path or parts.query)
        plain = plain and parts.username is None and (parts.port is None or parts.port > 0)
    except ValueError as error:
        raise _refused(value, f"{scheme}://host:port") from error
    if not plain:
        raise _refused(value, f"{scheme}://host:port")
    return _checked(text, _WORD, f"{scheme}://host:port")


def seconds(value: timedelta) -> Quoted:
    """Return a lease time in whole seconds, within the bounds that DHCP servers take."""
    if not LEASE_MIN <= value <= LEASE_MAX:
        raise _refused(str(value), f"a lease between {LEASE_MIN} and {LEASE_MAX}")
    return Quoted(int(value.total_seconds()))


def constant(text: str) -> Quoted:
    """Mark text written in this program, never text from data, as fit to print."""
    return Quoted(text)


def _checked(value: str, pattern: re.Pattern[str], wanted: str) -> Quoted:
    # `||` and `&&` cannot occur: neither character is in any of the patterns.
    if len(value) > WORD_CHARACTERS_MAX or not pattern.fullmatch(value):
        raise _refused(value, wanted)
    return Quoted(value)


def _refused(value: str, wanted: str) -> ConfigError:
    return ConfigError(
        "a value cannot stand in a generated script",
        expected=wanted,
        found=ascii(value[:WORD_CHARACTERS_MAX]),
    )


Render = Callable[[str, Mapping[str, object]], str]


def renderer(folder: str) -> Render:
    """Return `render(template, values)` for the packaged templates in `folder`.

    A missing name and a value that is not Quoted are both errors, so a template cannot
    print data that no typed function has seen.
    """
    environment = Environment(
        loader=FileSystemLoader(_template_root() / folder),
        undefined=StrictUndefined,
        autoescape=False,  # not HTML; _only_quoted is the guard
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_only_quoted,
    )

    def render(template: str, values: Mapping[str, object]) -> str:
        return environment.get_template(template).render(values)

    return render


def _only_quoted(value: object) -> object:
    if not isinstance(value, Quoted):
        raise TypeError(f"a template prints an unquoted {type(value).__name__}")
    return value


def _template_root() -> Path:
    """Return the folder of templates: inside the installed package, or of the checkout."""
    package = Path(__file__).resolve().parents[1]
    packaged = package / "templates"
    return packaged if packaged.is_dir() else package.parent / "templates"
