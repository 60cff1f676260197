"""Serves the immutable files of the data directory: ramdisks, manifests, chunks.

Every path is one of a few patterns with hex digests in it, so no name from a request ever
becomes a path of its own. Knows no host and needs no token: the agent checks all of it.
"""

from pathlib import Path
from typing import Final

from flask import Blueprint, Flask, Response, abort, send_file
from werkzeug.routing import BaseConverter

# A year: the name is the digest of the content, so it can never be stale.
MAX_AGE_S: Final = 365 * 24 * 3600
ACCEL_PREFIX: Final = "/provisioner-files"

_JSON: Final = "application/json"
_BYTES: Final = "application/octet-stream"


class _Digest(BaseConverter):
    regex = "[0-9a-f]{64}"


class _Pair(BaseConverter):
    regex = "[0-9a-f]{2}"


def add_files(app: Flask, data_dir: Path, *, accel: bool) -> None:
    """Add the routes for files under `data_dir` to `app`.

    With `accel` the answer is an X-Accel-Redirect below ACCEL_PREFIX, and an nginx in
    front sends the file.
    """
    app.url_map.converters["digest"] = _Digest
    app.url_map.converters["pair"] = _Pair
    files = Blueprint("files", __name__)

    def answer(relative: str, etag: str, mimetype: str) -> Response:
        path = data_dir / relative
        if not path.is_file():
            abort(404, description="there is no such file")
        if accel:
            response = Response(mimetype=mimetype)
            response.headers["X-Accel-Redirect"] = f"{ACCEL_PREFIX}/{relative}"
            response.set_etag(etag)
        else:
            response = send_file(
                path, mimetype=mimetype, etag=etag, max_age=MAX_AGE_S, conditional=True
            )
        response.headers["Cache-Control"] = f"public, max-age={MAX_AGE_S}, immutable"
        return response

    @files.get("/ramdisks/<digest:digest>/<any(vmlinuz, initrd):name>")
    def ramdisk(digest: str, name: str) -> Response:
        return answer(f"ramdisks/{digest}/{name}", f"{digest}-{name}", _BYTES)

    @files.get("/releases/<digest:digest>/manifest.json")
    def manifest(digest: str) -> Response:
        return answer(f"releases/{digest}/manifest.json", digest, _JSON)

    @files.get("/releases/<digest:digest>/manifest.sig")
    def signature(digest: str) -> Response:
        return answer(f"releases/{digest}/manifest.sig", f"{digest}-sig", _BYTES)

    @files.get("/chunks/<pair:pair>/<digest:digest>")
    def chunk(pair: str, digest: str) -> Response:
        if not digest.startswith(pair):
            abort(404, description="there is no such file")
        return answer(f"chunks/{pair}/{digest}", digest, _BYTES)

    app.register_blueprint(files)
