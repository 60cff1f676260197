"""Reads single values of the configuration file: each function returns the value or raises
`Wrong` saying what was expected. Knows no setting by name."""

import difflib
import ipaddress
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from .core.fleet import Floor
from .core.trust import KEYS_MAX, check_channel
from .errors import RequestError

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?")
_INTERFACE = re.compile(r"[A-Za-z0-9_.-]{1,15}")  # Linux allows 15 characters
_DIGEST = re.compile(r"[0-9a-f]{64}")
_SHARE = re.compile(r"([1-9]?[0-9]|100)%")
_WORD = re.compile(r"[A-Za-z0-9._,:=/@%+-]{1,256}")

WILDCARDS: Final = ("0.0.0.0", "::")
_BUCKET = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9._-]+)*/?")
_REGION = re.compile(r"[a-z0-9-]{1,63}")
TEXT_CHARACTERS_MAX: Final = 4096
NAME_CHARACTERS_MAX: Final = 63
MIRRORS_MAX: Final = 16
HOSTS_MAX: Final = 100_000
CHANNELS_MAX: Final = 32
SIGNATURES_MAX: Final = KEYS_MAX


class Wrong(ValueError):
    """The value is not what the setting takes; the text says what it takes."""


@dataclass(frozen=True)
class Address:
    """Where a listener binds: an IP address and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class ChannelRule:
    """What a channel asks for: signatures of so many trusted keys, and a passed test."""

    name: str
    threshold: int = 1
    tested: bool = False


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean …?" for a name that is close to a known one, else nothing."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def text(value: object) -> str:
    if not isinstance(value, str) or len(value) > TEXT_CHARACTERS_MAX:
        raise Wrong("a text")
    return value


def worker_name(value: object) -> str:
    name = text(value)
    if (name and not _NAME.fullmatch(name)) or len(name) > NAME_CHARACTERS_MAX:
        raise Wrong("a short name of letters, digits, . and -")
    return name


def boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise Wrong("true or false")
    return value


def one_of(*allowed: str) -> Callable[[object], str]:
    def parse(value: object) -> str:
        if value not in allowed:
            raise Wrong("one of " + ", ".join(allowed))
        return text(value)

    return parse


def whole(least: int, most: int) -> Callable[[object], int]:
    """A whole number within bounds; a limit can be changed, but not removed."""

    def parse(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise Wrong(f"a whole number from {least} to {most}")
        return value

    return parse


def floor(value: object) -> Floor:
    """A number of hosts, or a share of a group such as `60%`."""
    if isinstance(value, str) and (share := _SHARE.fullmatch(value)):
        return Floor(percent=int(share[1]))
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= HOSTS_MAX:
        raise Wrong("a number of hosts, or a share of the group such as 60%")
    return Floor(hosts=value)


def listen(value: object) -> Address:
    """`address:port`, an IPv6 address in brackets. Raises Wrong for a name: which of its
    addresses would be bound?"""
    wanted = "an IP address and a port, such as 10.77.0.1:8081"
    given = text(value).lower()
    try:
        parts = urlsplit("//" + given)
        host, port = parts.hostname or "", parts.port
        ipaddress.ip_address(host)
    except ValueError as error:
        raise Wrong(wanted) from error
    # Written anew, so that nothing was passed over: `[::1]x:80` has a host and a port as well.
    if not port or given != (f"[{host}]:{port}" if ":" in host else f"{host}:{port}"):
        raise Wrong(wanted)
    return Address(host, port)


def base_url(scheme: str) -> Callable[[object], str]:
    """`scheme://host[:port]` and nothing behind it; empty means: made from `listen`."""

    def parse(value: object) -> str:
        plain = text(value).rstrip("/")
        if not plain:
            return ""
        try:
            parts = urlsplit(plain)
            good = parts.scheme == scheme and _is_host(parts.hostname)
            good = good and (parts.port is None or parts.port > 0)
        except ValueError as error:
            raise Wrong(f"{scheme}://host:port") from error
        if not good or parts.path or parts.query or parts.fragment or parts.username is not None:
            raise Wrong(f"{scheme}://host:port")
        return plain

    return parse


def _is_host(name: str | None) -> bool:
    if not name:
        return False
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return _NAME.fullmatch(name) is not None
    return True


def database_url(value: object) -> str:
    url = text(value)
    if url.startswith("sqlite:///") and len(url) > len("sqlite:///") and ":memory:" not in url:
        return url
    if url.startswith(("postgresql://", "postgresql+psycopg://")):
        return url
    raise Wrong("sqlite:///state.db or postgresql+psycopg://user@host/database")


def interface(value: object) -> str:
    if value != "" and not _INTERFACE.fullmatch(text(value)):
        raise Wrong("a network interface, such as br0")
    return text(value)


def ipv4(value: object) -> str:
    try:
        return str(ipaddress.IPv4Address(text(value))) if value != "" else ""
    except ValueError as error:
        raise Wrong("an IPv4 address") from error


def ipv4_list(value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise Wrong('a list of IPv4 addresses, such as ["10.77.0.1"]')
    return tuple(ipv4(item) for item in value)


def words(value: object) -> tuple[str, ...]:
    """Return plain words, which a boot script can carry unquoted."""
    if not isinstance(value, list) or not all(_WORD.fullmatch(text(item)) for item in value):
        raise Wrong('a list of plain words, such as ["nomodeset"]')
    return tuple(value)


def subnet(value: object) -> str:
    try:
        return str(ipaddress.IPv4Network(text(value))) if value != "" else ""
    except ValueError as error:
        raise Wrong("an IPv4 network, such as 10.77.0.0/24") from error


def digest(value: object) -> str:
    if value != "" and not _DIGEST.fullmatch(text(value)):
        raise Wrong("a SHA-256 in lower-case hex, or empty")
    return text(value)


def bucket_url(value: object) -> str:
    if value != "" and not _BUCKET.fullmatch(text(value)):
        raise Wrong("s3://bucket/prefix, or empty")
    return text(value).rstrip("/")


def endpoint(value: object) -> str:
    """A base URL by http or https; whether the name exists shows when it is used."""
    schemes = ("http", "https")
    for scheme in schemes:
        try:
            return base_url(scheme)(value)
        except Wrong:
            continue
    raise Wrong("http://host:port or https://host:port, or empty")


def region(value: object) -> str:
    if not _REGION.fullmatch(text(value)):
        raise Wrong("a region, such as us-east-1")
    return text(value)


def origins(value: object) -> tuple[str, ...]:
    wanted = f'at most {MIRRORS_MAX} origins, such as ["http://10.77.1.1:8081"]'
    if not isinstance(value, list) or len(value) > MIRRORS_MAX:
        raise Wrong(wanted)
    parse = base_url("http")
    try:
        found = tuple(parse(item) for item in value)
    except Wrong as error:
        raise Wrong(wanted) from error
    if not all(found):
        raise Wrong(wanted)
    return found


def channels(value: object) -> tuple[ChannelRule, ...]:
    """Return the rules of a table such as {stable = {threshold = 2, tested = true}}, by name."""
    if not isinstance(value, dict) or len(value) > CHANNELS_MAX:
        raise Wrong(f"a table of at most {CHANNELS_MAX} channels")
    return tuple(_channel_rule(name, value[name]) for name in sorted(value))


def _channel_rule(name: str, value: object) -> ChannelRule:
    try:
        check_channel(name)
    except RequestError as error:
        raise Wrong(f"channel names of small letters, digits and '-', not {name!r}") from error
    parsers: dict[str, Callable[[object], object]] = {
        "threshold": whole(1, SIGNATURES_MAX),
        "tested": boolean,
    }
    if not isinstance(value, dict):
        raise Wrong(f"{name} = {{threshold = 2, tested = true}}")
    rule: dict[str, Any] = {}
    for key, item in value.items():
        if key not in parsers:
            raise Wrong(f"threshold and tested for {name}, not {key}{did_you_mean(key, parsers)}")
        try:
            rule[key] = parsers[key](item)
        except Wrong as wrong:
            raise Wrong(f"{name}.{key} to be {wrong}") from wrong
    return ChannelRule(name, **rule)
