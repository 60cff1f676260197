"""Reads the files that a person names on the command line. Whatever is wrong with one is told
as a mistake in the request, without a word of what the file holds: that may be a secret."""

import io
import json
from typing import Any, Final

import click

from provisioner.errors import RequestError

DOCUMENT_CHARACTERS_MAX: Final = 16 * 1024**2
_TAG: Final = "tag:yaml.org,2002:"


def read_text(file: str, characters_max: int, *, only_line: bool = False) -> str:
    """Return the text of a file (- is standard input), or its first line, cut at a limit."""
    try:
        with click.open_file(file, encoding="utf-8") as stream:
            text: str = (stream.readline if only_line else stream.read)(characters_max)
    except OSError as error:
        raise RequestError(f"{_name(file)} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        # Without the cause, which shows what stands there.
        raise RequestError(f"{_name(file)} is not text", expected="UTF-8") from None
    return text


def documents_in(file: str) -> Any:
    """Return what a YAML or JSON file holds (- is standard input), as plain JSON values.

    What YAML 1.1 takes for a date or a number to the base of 60, such as the MAC address
    10:22:33:44:55:56, stays the text that was written.
    """
    import yaml

    text = read_text(file, DOCUMENT_CHARACTERS_MAX + 1)
    if len(text) > DOCUMENT_CHARACTERS_MAX:
        raise RequestError(
            f"{_name(file)} is too large", expected=f"{DOCUMENT_CHARACTERS_MAX} characters"
        )
    # From a stream, the messages of PyYAML have the place alone; from a text also its line.
    stream = io.StringIO(text)
    stream.name = _name(file)  # which PyYAML shows
    try:
        found = yaml.load(stream, Loader=_loader())  # it is a SafeLoader
        json.dumps(found, allow_nan=False)
    except yaml.YAMLError as error:
        raise RequestError(f"{_name(file)} is not YAML: {error}") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(
            f"{_name(file)} holds what cannot be sent: {error}",
            expected="text, finite numbers, true, false, null, lists and mappings",
        ) from error
    return found


def _loader() -> Any:
    """Return the class that reads a document. Made on demand: PyYAML takes long to import."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: list[Any] = []
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key} stands there twice", key_node.start_mark
                    )
                seen.append(key)
            return super().construct_mapping(node, deep)

        def number(self, node: Any) -> Any:
            if ":" in node.value:
                return self.construct_scalar(node)
            is_whole = node.tag == _TAG + "int"
            return (self.construct_yaml_int if is_whole else self.construct_yaml_float)(node)

        def as_written(self, node: Any) -> Any:
            return self.construct_scalar(node)

    for kind in ("int", "float"):
        Loader.add_constructor(_TAG + kind, Loader.number)
    Loader.add_constructor(_TAG + "timestamp", Loader.as_written)
    return Loader


def _name(file: str) -> str:
    return "standard input" if file == "-" else file
