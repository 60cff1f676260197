"""On a full disk each command says what to do, and a little space is enough for image gc."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

WAIT_LIMIT_S: Final = 120
# A site whose disk, of 8 MiB and in a mount namespace of its own, is filled to the last byte.
# Of its two releases gc would keep one.
PREPARED: Final = """\
import os, subprocess, sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from click.testing import CliRunner
from provisioner import wiring
from provisioner.cli.main import main
from provisioner.imaging.archive import Archive
from provisioner.imaging.publish import Publisher
from provisioner.imaging.signing import load_signing_key
from provisioner.settings import load
from provisioner.setup import Plan, initialise
from tests.parts.test_imaging_archive import FACTS, make_disk

mount = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(mount)], check=True)
initialise(mount / "site", Plan())
config = mount / "site" / "provisioner.toml"
config.write_text(config.read_text() + "\\n[releases]\\ngrace_s = 0\\n")
settings = load(config)
wiring.prepare(settings)
service = wiring.build(settings)
archive = Archive(
    service.archive.blobs,
    service.archive.policy,
    mount / "site" / "archive.lock",
    space_reserve_bytes=0,
)
signer = load_signing_key(settings.keys.folder / "release.key")
publisher = Publisher(archive, [signer], wiring.registrar(service, actor="test"))
for version in ("1", "2"):
    disk = make_disk(Path(sys.argv[2]), os.urandom(1024 * 1024))
    publisher.publish(disk, replace(FACTS, version=version, release_id=version.rjust(32, "0")))

def fill():
    # Whole pages of the tmpfs: not one byte is left.
    with suppress(OSError), open(mount / "fill", "wb", buffering=0) as file:
        while True:
            assert file.write(bytes(4096)) == 4096

def run(*words):
    done = CliRunner().invoke(main, [*words, "--config", str(config)])
    print(done.exit_code, done.stderr, done.exception)
    return done
"""


def on_a_full_disk(folder: Path, script: str) -> list[str]:
    """Run the script after PREPARED; return the lines that it printed."""
    (folder / "mount").mkdir()
    apart = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-c"]
    done = subprocess.run(
        [*apart, PREPARED + script, str(folder / "mount"), str(folder / "disk.raw")],
        capture_output=True,
        text=True,
        timeout=WAIT_LIMIT_S,
        check=False,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


GC: Final = """
service.close()
fill()
full = run("image", "gc", "--keep", "1")
assert full.exit_code == 3, full.stderr
assert "image gc" in full.stderr and "by hand" in full.stderr
os.truncate(mount / "fill", os.path.getsize(mount / "fill") - 2 * 1024 * 1024)
done = run("image", "gc", "--keep", "1")
assert done.exit_code == 0, done.stderr
assert "removed 1 release" in done.stderr
"""


def test_gc_says_what_to_free_by_hand_and_then_frees_the_rest(tmp_path: Path) -> None:
    on_a_full_disk(tmp_path, GC)


KEYS: Final = """
service.close()
folder = mount / "site" / "keys"
before = {file.name: file.read_bytes() for file in folder.iterdir()}
fill()
full = run("image", "keys", "new")
assert full.exit_code == 3, full.stderr
assert "No space left" in full.stderr and "free some space" in full.stderr
assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
(mount / "fill").unlink()
assert run("image", "keys", "new").exit_code == 0
"""


def test_a_new_key_that_finds_no_space_leaves_nothing(tmp_path: Path) -> None:
    on_a_full_disk(tmp_path, KEYS)
