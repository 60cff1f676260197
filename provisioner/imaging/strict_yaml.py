"""Read values out of YAML that people write, refusing all that is not exactly as expected.

Knows nothing of recipes. Every refusal is a RequestError that names the key.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import yaml

from provisioner.errors import RequestError

# Long enough to recognise a value by, short enough for a line of a terminal.
FOUND_CHARACTERS_MAX = 200


class _StrictLoader(yaml.SafeLoader):
    """A safe loader that refuses a key that stands in a mapping twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable) or key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands there twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def load(text: str) -> object:
    """Return what the YAML says, as plain values."""
    try:
        return yaml.load(text, Loader=_StrictLoader)  # it is a SafeLoader
    except (yaml.YAMLError, RecursionError) as error:
        raise RequestError("the recipe is not YAML we accept", found=str(error)) from error


def check_keys(
    where: str,
    value: Mapping[str, object],
    *,
    required: Iterable[str] = (),
    optional: Iterable[str] = (),
) -> None:
    """Raise RequestError for a missing key, or one that means nothing, with a likely spelling."""
    known = sorted({*required, *optional})
    for key in value:
        if key not in known:
            raise RequestError(
                f"{where} has a key of no known meaning: {key!r}",
                expected=", ".join(known),
                hint=did_you_mean(str(key), known),
            )
    if missing := set(required) - value.keys():
        raise RequestError(f"{where} lacks {', '.join(sorted(missing))}")


def did_you_mean(word: str, known: list[str]) -> str | None:
    """Return a hint when one of the known words is close."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else None


def mapping(where: str, value: object) -> Mapping[str, Any]:
    """Return the value, which must be keys and values."""
    if not isinstance(value, dict):
        raise wrong(where, "keys and values", value)
    return value


def items(where: str, value: object) -> list[Any]:
    """Return the value, which must be a list."""
    if not isinstance(value, list):
        raise wrong(where, "a list", value)
    return value


def text(where: str, value: object) -> str:
    """Return the value, which must be text."""
    if not isinstance(value, str):
        raise wrong(where, "text", value)
    return value


def strings(where: str, value: object, pattern: re.Pattern[str], expected: str) -> tuple[str, ...]:
    """Return a list of which every item is text that matches the whole pattern."""
    return tuple(matching(where, item, pattern, expected) for item in items(where, value))


def matching(where: str, value: object, pattern: re.Pattern[str], expected: str) -> str:
    """Return the value, which must be text that matches the whole pattern."""
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise wrong(where, expected, value)
    return value


def one_of(where: str, value: object, known: Iterable[str]) -> str:
    """Return the value, which must be one of the known words."""
    words = sorted(known)
    if not isinstance(value, str) or value not in words:
        raise wrong(where, " or ".join(words), value)
    return value


def wrong(where: str, expected: str, found: object) -> RequestError:
    """Return the error for a value that is not what is expected there."""
    shown = repr(found)[:FOUND_CHARACTERS_MAX]
    return RequestError(f"{where} is wrong", expected=expected, found=shown)
