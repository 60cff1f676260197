"""Tell from what mmdebstrap prints how far it is. Only reads lines; starts nothing."""

from __future__ import annotations

import re
from typing import Final

STEP: Final = 50  # packages between two lines of news

# What mmdebstrap, apt and our hooks print as they come to something new.
_STAGES: Final = (
    (re.compile(r"I: running apt-get update"), "fetching the lists of packages"),
    (re.compile(r"I: downloading packages with apt"), "fetching the essential packages"),
    (re.compile(r"I: extracting archives"), "unpacking the essential packages"),
    (re.compile(r"I: installing essential packages"), "setting up the essential packages"),
    (re.compile(r"I: installing remaining packages"), "fetching the other packages"),
    (re.compile(r"update-initramfs: Generating"), "making the initramfs"),
    (re.compile(r"I: creating tarball"), "packing the base tree"),
)
_SCRIPT: Final = re.compile(r"running the script (\S+)")
_TO_INSTALL: Final = re.compile(r"\d+ upgraded, (\d+) newly installed")
_SET_UP: Final = re.compile(r"Setting up (\S+) \(")


class InstallProgress:
    """Hears mmdebstrap's lines one by one, and has news at some of them."""

    def __init__(self) -> None:
        self._to_set_up = 0
        self._set_up = 0

    def news(self, line: str) -> str | None:
        """Return what to tell a person after this line, or None."""
        for pattern, stage in _STAGES:
            if pattern.match(line):
                return stage
        if match := _SCRIPT.fullmatch(line):
            return f"running the script {match[1]}"
        if match := _TO_INSTALL.match(line):
            # apt says so before each of its two installations; the second counts anew.
            self._to_set_up, self._set_up = int(match[1]), 0
            return None
        if _SET_UP.match(line):
            self._set_up += 1
            if self._set_up % STEP == 0 and self._set_up < self._to_set_up:
                return f"setting up packages: {self._set_up} of {self._to_set_up}"
        return None
