"""A release as it lies in an archive, served by the real boot listener's routes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flask import Flask

from provisioner.web.file_source import FileSource, LocalFiles
from provisioner.web.files import add_files
from provisioner.web.problems import install_problems
from tests.parts.agent_service import Release
from tests.parts.http_listener import listening


def lay_out(folder: Path, *releases: Release) -> None:
    """Write all files of the releases below the folder."""
    for release in releases:
        for path, data in release.files().items():
            place = folder / path[1:]
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)


@contextmanager
def served(folder: Path, *, accel: bool = False) -> Iterator[str]:
    """Serve what lies below the folder; yields the URL."""
    with serving(LocalFiles(folder), accel=accel) as url:
        yield url


@contextmanager
def serving(files: FileSource, *, accel: bool = False) -> Iterator[str]:
    """Serve these files; yields the URL."""
    with listening(files_app(files, accel=accel)) as url:
        yield url


def files_app(files: FileSource, *, accel: bool = False) -> Flask:
    """Return an application that has the boot listener's routes for files, and no other."""
    app = Flask("store", static_folder=None)
    install_problems(app)
    add_files(app, files, accel=accel)
    return app
