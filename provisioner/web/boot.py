"""The boot listener: HTTP in clear for hosts that boot. Boot scripts and immutable files.

It gives out no secret but the one-time boot ticket, and it answers whatever happens: a
host that gets no answer hangs, so every failure here ends at the host's own disk.
"""

import ipaddress
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http import HTTPStatus
from typing import Final, Protocol, TypeVar

import structlog
from flask import Flask, Response, jsonify, request

from provisioner.core.bootplan import (
    BootPlan,
    Inspect,
    Loader,
    LocalDisk,
    Ramdisk,
    boot_request,
)
from provisioner.core.model import LocalBoot
from provisioner.errors import ProvisionerError, RequestError
from provisioner.netboot import grub
from provisioner.netboot.scripts import (
    CONTENT_TYPE,
    BootUrls,
    answer_boot,
    render_grub_config,
)
from provisioner.service.boot import BootService
from provisioner.settings import Settings

from .bodies import peer
from .downloads import Downloads
from .file_source import FileSource, LocalFiles
from .files import add_files
from .problems import install_problems

BODY_BYTES_MAX: Final = 4096  # nothing here takes a body
# A boot ROM gives up on a script that takes ten seconds, and hangs or reboots. A database
# that is locked or away may take longer than that to say so.
DECISION_LIMIT_S: Final = 3.0
DECISIONS_AT_ONCE_MAX: Final = 24

_Answer = TypeVar("_Answer")

log = structlog.get_logger(__name__)


class BootListener(Protocol):
    """What this listener needs; `wiring` builds it."""

    @property
    def boot(self) -> BootService: ...
    @property
    def settings(self) -> Settings: ...


def create_app(
    service: BootListener, files: FileSource | None = None, downloads: Downloads | None = None
) -> Flask:
    """Return the WSGI application. Without `files`, all of them lie below data_dir; without
    `downloads`, nobody watches ramdisks leave."""
    settings = service.settings
    urls = BootUrls(boot=settings.boot.url, agent=settings.agent.url)
    app = Flask("provisioner.boot", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = BODY_BYTES_MAX
    install_problems(app)
    deciding = ThreadPoolExecutor(DECISIONS_AT_ONCE_MAX, thread_name_prefix="boot")

    def decide(loader: Loader) -> BootPlan:
        asking = boot_request(request.args, loader)
        decided = deciding.submit(service.boot.answer, asking, _source(loader, service.boot))
        try:
            return decided.result(DECISION_LIMIT_S)
        except TimeoutError:
            decided.cancel()
            raise

    def told(loader: Loader) -> BootPlan:
        return _told(decide(loader), settings.ramdisk.kernel_arguments)

    source = files or LocalFiles(settings.data_dir)
    add_files(app, source, accel=settings.boot.accel, downloads=downloads)

    @app.get("/boot/ipxe")
    def boot_script() -> Response:
        answer = _answer(lambda: told(Loader.IPXE), lambda plan: answer_boot(plan, urls))
        return _response(answer.text, answer.status)

    @app.get(grub.ANSWERS)
    def grub_config() -> Response:
        # Always a success: GRUB asks by TFTP, and has no other way to be told.
        text = _answer(lambda: told(Loader.GRUB), lambda plan: render_grub_config(plan, urls))
        return _response(text, HTTPStatus.OK)

    @app.get("/healthz")
    def healthz() -> Response:
        return jsonify(status="ok")

    return app


def _told(plan: BootPlan, arguments: tuple[str, ...]) -> BootPlan:
    """Return the plan with the site's own arguments for the ramdisk's kernel."""
    return replace(plan, arguments=arguments) if isinstance(plan, Ramdisk) else plan


def _source(loader: Loader, boot: BootService) -> str:
    """Return the host's address.

    GRUB's question comes from our TFTP server, which names the address that asked it. From
    anywhere else such a name is anyone's to write, and is not looked at.
    """
    asking = peer()
    if loader is not Loader.GRUB or not boot.may_speak_for_others(asking):
        return asking
    try:
        return str(ipaddress.ip_address(request.args.get("address", "")))
    except ValueError:
        return asking


def _response(text: str, status: int) -> Response:
    response = Response(text, status, content_type=CONTENT_TYPE)
    # The next answer may be another one: no proxy may keep this.
    response.headers["Cache-Control"] = "no-store"
    return response


def _answer(
    decide: Callable[[], BootPlan], render: Callable[[LocalDisk | Ramdisk], _Answer]
) -> _Answer:
    try:
        plan = decide()
        if not isinstance(plan, Inspect):
            return render(plan)
        reason = "nobody issued a ticket for the inspection"
    except RequestError as error:
        reason = error.message
    except ProvisionerError as error:
        log.warning("boot request not decided", code=error.code, error=error.message)
        reason = error.message
    except TimeoutError:
        log.warning("boot request not decided in time", limit_s=DECISION_LIMIT_S)
        reason = "the service is slow"
    except Exception:
        # A bug, or a database that is away: the host boots its disk all the same.
        log.exception("boot request not decided")
        reason = "the service failed"
    return render(LocalDisk(LocalBoot.AUTO, reason))
