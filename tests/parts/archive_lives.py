"""Publishing and image gc in processes that are killed: with failpoints, on a real installation.

Run as a program, this file has everything imported and forks a life for each line that it is
told: `publish FILE VERSION` or `gc`. It answers with the life's exit code, or its signal.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from provisioner import wiring
from provisioner.cli.image.keeping import given_up
from provisioner.cli.site import OpenSite
from provisioner.failpoints import ARMED, CONSENT, FIRED, TRACE, Failpoints
from provisioner.settings import Settings, load
from tests.parts.test_imaging_archive import FACTS

ROOT: Final = Path(__file__).resolve().parents[2]
PART: Final = "image"
LIMIT_S: Final = 60.0


@dataclass
class ArchiveLives:
    """The process that forks lives, one at a time."""

    settings: Settings
    process: "subprocess.Popen[str]"

    @property
    def failpoints(self) -> Path:
        return self.settings.data_dir / "failpoints"

    def publish(self, disk: Path, version: str, *, armed: str | None = None) -> int:
        return self._tell(f"publish {disk} {version}", armed)

    def gc(self, *, armed: str | None = None) -> int:
        return self._tell("gc", armed)

    def trace(self) -> list[str]:
        """Return every point that the last life has reached, in order."""
        return (self.failpoints / TRACE).read_text().splitlines()

    def _tell(self, line: str, armed: str | None) -> int:
        for name in (ARMED, FIRED, TRACE):
            (self.failpoints / name).unlink(missing_ok=True)
        if armed is not None:
            (self.failpoints / ARMED).write_text(armed)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(line, file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline().rsplit(None, 1)[-1])


@contextmanager
def archive_lives(settings: Settings) -> Iterator[ArchiveLives]:
    folder = settings.data_dir / "failpoints"
    folder.mkdir(exist_ok=True)
    (folder / CONSENT).touch()
    with (settings.data_dir / "lives.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.parts.archive_lives", str(settings.path)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        yield ArchiveLives(settings, process)
    finally:
        process.communicate(timeout=LIMIT_S)


def main(config: str) -> None:
    settings = load(Path(config))
    wiring.build(settings).close()  # imports all that the lives need
    for line in sys.stdin:
        life = os.fork()
        if life == 0:
            _live(settings, line.split())
        code = os.waitstatus_to_exitcode(os.waitpid(life, 0)[1])
        os.write(1, f"ended {code}\n".encode())


def _live(settings: Settings, words: list[str]) -> None:
    code = 1
    try:
        os.dup2(2, 1)  # what it logs is no answer
        reach = Failpoints(settings.data_dir / "failpoints").of(PART)
        service = wiring.build(settings, reach)
        if words[0] == "publish":
            facts = replace(FACTS, version=words[2], release_id=words[2].rjust(32, "0"))
            wiring.publisher(settings, service, actor="test").publish(Path(words[1]), facts)
        else:
            given_up(OpenSite(settings, service), 1)
        code = 0
    finally:
        if code:
            sys.excepthook(*sys.exc_info())
        os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1])
