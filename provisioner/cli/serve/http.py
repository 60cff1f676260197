"""Runs one WSGI application under gunicorn on a socket that is bound already."""

import logging
import os
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from flask import Flask
from gunicorn.app.base import BaseApplication
from gunicorn.glogging import Logger

from .quick_worker import QuickWorker
from .supervisor import die_with_parent, name_process

# A worker that is silent for so long is replaced. Its threads do the work, so even a slow
# download does not make it silent.
WORKER_SILENCE_S: Final = 60
# How long requests may go on after SIGTERM.
GRACE_S: Final = 5
# An agent fetches thousands of chunks over few connections.
KEEPALIVE_S: Final = 30
REQUEST_LINE_BYTES_MAX: Final = 2048
HEADERS_MAX: Final = 64


@dataclass(frozen=True)
class HttpServer:
    """How one listener is served. `make_app` runs in each worker process, and returns the
    application; `tls` is (certificate, key)."""

    name: str
    make_app: Callable[[], Flask]
    workers: int
    threads: int
    tls: tuple[Path, Path] | None = None


def run_http(server: HttpServer, sock: socket.socket, ready: Callable[[], None]) -> None:
    """Serve until SIGTERM. `ready` is called once a worker can answer."""
    # gunicorn closes the descriptor that it is given, and keeps a copy.
    _Application(server, os.dup(sock.fileno()), ready).run()


class _Application(BaseApplication):
    def __init__(self, server: HttpServer, fd: int, ready: Callable[[], None]) -> None:
        self._server = server
        self._fd = fd
        self._ready = ready
        super().__init__()

    def load_config(self) -> None:
        server, parent = self._server, os.getpid()

        def in_worker(_arbiter: Any, _worker: Any) -> None:
            die_with_parent(parent)
            name_process(f"prov-{server.name}-w")

        chosen: dict[str, Any] = {
            "bind": f"fd://{self._fd}",
            "worker_class": QuickWorker,
            "workers": server.workers,
            "threads": server.threads,
            "timeout": WORKER_SILENCE_S,
            "graceful_timeout": GRACE_S,
            "keepalive": KEEPALIVE_S,
            "limit_request_line": REQUEST_LINE_BYTES_MAX,
            "limit_request_fields": HEADERS_MAX,
            "worker_tmp_dir": "/dev/shm" if os.path.isdir("/dev/shm") else None,
            "control_socket_disable": True,
            "proc_name": f"provisioner-{server.name}",
            "logger_class": _Logs,
            "loglevel": "warning",
            "accesslog": None,
            "post_fork": in_worker,
            "post_worker_init": lambda _worker: self._ready(),
        }
        if server.tls is not None:
            certificate, key = server.tls
            chosen |= {
                "certfile": str(certificate),
                "keyfile": str(key),
                "ssl_context": _tls_context,
            }
        for name, value in chosen.items():
            self.cfg.set(name, value)

    def load(self) -> Any:
        return self._server.make_app()


def _tls_context(_config: Any, default: Callable[[], ssl.SSLContext]) -> ssl.SSLContext:
    context = default()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


class _Logs(Logger):
    """gunicorn's records go where all of ours go; it logs no requests, whose paths and
    queries may hold what is nobody's business."""

    def setup(self, cfg: Any) -> None:
        super().setup(cfg)
        for logger in (self.error_log, self.access_log):
            logger.handlers.clear()
        self.error_log.propagate = True
        self.error_log.setLevel(logging.WARNING)
        self.access_log.disabled = True
