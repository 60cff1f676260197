"""Says how a long piece of work goes, on standard error: a line for each stage with the time,
and a bar on a terminal or the quarters elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Final, Self

import click

from .messages import clean

QUARTERS: Final = 4


class Stages:
    """Use it in a `with`. `say` begins a stage, `progress` tells how far it is."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._bar = _Bar() if sys.stderr.isatty() else None
        self._told: tuple[str, int] = ("", 0)
        self.said: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def pause(self) -> None:
        """Leave the terminal to something else; the next stage takes it again."""
        if self._bar is not None:
            self._bar.stop()

    def say(self, line: str) -> None:
        """Begin a stage."""
        seconds = time.monotonic() - self._began
        stamped = f"[{seconds:5.1f} s] {clean(line)}"
        self.said.append(stamped)
        self._told = ("", 0)
        if self._bar is not None:
            self._bar.stage(stamped)
        else:
            click.echo(stamped, err=True)

    def progress(self, phase: str, done_bytes: int, total_bytes: int) -> None:
        """Tell how far `phase` is. Called often, so it shows only what can be seen."""
        if self._bar is not None:
            self._bar.at(phase, done_bytes, total_bytes)
            return
        told_phase, told = self._told
        quarter = done_bytes * QUARTERS // total_bytes if total_bytes else 0
        if phase != told_phase:
            told = 0
        self._told = (phase, max(quarter, told))
        if quarter > told:
            click.echo(f"          {phase}: {quarter * 100 // QUARTERS} %", err=True)


class _Bar:
    """A bar under the stages, which ends with the work."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task: Any = None
        self._phase = ""
        self._progress.start()

    def stage(self, line: str) -> None:
        self._progress.start()  # again, after a pause
        self._progress.console.print(line, markup=False, highlight=False)
        self._begin("", None)

    def at(self, phase: str, done_bytes: int, total_bytes: int) -> None:
        if phase != self._phase:
            self._begin(phase, total_bytes)
        self._progress.update(self._task, completed=done_bytes)

    def stop(self) -> None:
        self._progress.stop()

    def _begin(self, phase: str, total: int | None) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._phase = phase
        self._task = self._progress.add_task(phase, total=total)
