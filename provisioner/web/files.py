"""Serves the immutable files of the store: ramdisks, manifests, chunks.

Every path is one of a few patterns with hex digests in it, so no name from a request ever
becomes a path of its own. Knows no host and needs no token: the agent checks all of it.
"""

from http import HTTPStatus
from typing import Final

from flask import Blueprint, Flask, Response, abort, request, send_file
from werkzeug.routing import BaseConverter

from .chunk_batches import ChunkBatches
from .downloads import Downloads
from .file_source import BYTES, IMMUTABLE, FileSource, LocalFiles
from .quick_chunks import EXTENSION, QuickChunks

# When to ask again for a file whose store is slow: an agent's own pauses are of that kind.
RETRY_AFTER_S: Final = 2
ACCEL_PREFIX: Final = "/provisioner-files"

_JSON: Final = "application/json"
_MISSING: Final = "there is no such file"
_SIGNATURES: Final = "manifest.sig"
_MANIFESTS: Final = {"manifest.json": _JSON, "manifest.json.zst": BYTES}


class _Digest(BaseConverter):
    regex = "[0-9a-f]{64}"


class _Pair(BaseConverter):
    regex = "[0-9a-f]{2}"


def add_files(
    app: Flask, source: FileSource, *, accel: bool, downloads: Downloads | None = None
) -> None:
    """Add the routes for the files of `source` to `app`.

    With `accel` the answer for a file on this machine is an X-Accel-Redirect below
    ACCEL_PREFIX, and an nginx in front sends the file: nobody sees how that goes. Without it
    `downloads` watches the ramdisks leave. Batches are always made here.
    """
    app.url_map.converters["digest"] = _Digest
    app.url_map.converters["pair"] = _Pair
    files = Blueprint("files", __name__)
    batches = ChunkBatches(source)
    if isinstance(source, LocalFiles) and not accel:
        app.extensions[EXTENSION] = QuickChunks(source, batches)

    def read(relative: str) -> bytes:
        with source.turn():
            data = source.read(relative)
        if data is None:
            abort(404, description=_MISSING)
        return data

    def answer(relative: str, etag: str, mimetype: str) -> Response:
        path = source.local(relative)
        if path is not None and not accel:
            return _kept(send_file(path, mimetype=mimetype, etag=etag, conditional=True))
        response = Response(mimetype=mimetype)
        if path is not None:
            response.headers["X-Accel-Redirect"] = f"{ACCEL_PREFIX}/{relative}"
        else:
            response.set_data(read(relative))
        response.set_etag(etag)
        return _kept(response)

    @files.get("/ramdisks/<digest:digest>/<any(vmlinuz, initrd):name>")
    def ramdisk(digest: str, name: str) -> Response:
        relative, etag = f"ramdisks/{digest}/{name}", f"{digest}-{name}"
        if downloads is None or accel or request.method != "GET":
            return answer(relative, etag, BYTES)
        path = source.local(relative)
        if path is None:
            downloads.missing(name)
            abort(404, description=_MISSING)
        return downloads.watch(answer(relative, etag, BYTES), path, name)

    @files.get("/releases/<digest:digest>/<name>")
    def manifest(digest: str, name: str) -> Response:
        if name not in _MANIFESTS:
            abort(404, description=_MISSING)
        return answer(f"releases/{digest}/{name}", f"{digest}-{name}", _MANIFESTS[name])

    @files.get(f"/releases/<digest:digest>/{_SIGNATURES}")
    def signatures(digest: str) -> Response:
        # Signatures are added to a release later on: nobody may keep the file.
        response = Response(read(f"releases/{digest}/{_SIGNATURES}"), mimetype=_JSON)
        response.headers["Cache-Control"] = "no-cache"
        return response

    @files.get("/releases/<digest:digest>/chunks/<spec>")
    def batch(digest: str, spec: str) -> Response:
        with source.turn():
            body = batches.answer(digest, spec)
        return _kept(Response(body, mimetype=BYTES))

    @files.get("/chunks/<pair:pair>/<digest:digest>")
    def chunk(pair: str, digest: str) -> Response:
        if not digest.startswith(pair):
            abort(404, description=_MISSING)
        return answer(f"chunks/{pair}/{digest}", digest, BYTES)

    @files.after_request
    def not_now(response: Response) -> Response:
        if response.status_code == HTTPStatus.SERVICE_UNAVAILABLE:
            response.headers["Retry-After"] = str(RETRY_AFTER_S)
        return response

    app.register_blueprint(files)


def _kept(response: Response) -> Response:
    """Let everybody keep the answer: it is the only one that there will ever be."""
    response.headers["Cache-Control"] = IMMUTABLE
    return response
