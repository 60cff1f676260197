"""The boot listener: HTTP in clear for hosts that boot. Boot scripts and immutable files.

It gives out no secret but the one-time boot ticket, and it answers whatever happens: a
host that gets no answer hangs, so every failure here ends at the host's own disk.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Final, Protocol

import structlog
from flask import Flask, Response, jsonify, request

from provisioner.core.bootplan import BootPlan, Inspect, LocalDisk, Ramdisk, boot_request
from provisioner.core.model import LocalBoot
from provisioner.errors import ProvisionerError, RequestError
from provisioner.netboot.scripts import CONTENT_TYPE, BootAnswer, BootUrls, answer_boot
from provisioner.service.boot import BootService
from provisioner.settings import Settings

from .bodies import peer
from .files import add_files
from .problems import install_problems

BODY_BYTES_MAX: Final = 4096  # nothing here takes a body
# A boot ROM gives up on a script that takes ten seconds, and hangs or reboots. A database
# that is locked or away may take longer than that to say so.
DECISION_LIMIT_S: Final = 3.0
DECISIONS_AT_ONCE_MAX: Final = 24

log = structlog.get_logger(__name__)


class BootListener(Protocol):
    """What this listener needs; `wiring` builds it."""

    @property
    def boot(self) -> BootService: ...
    @property
    def settings(self) -> Settings: ...


def create_app(service: BootListener) -> Flask:
    """Return the WSGI application."""
    settings = service.settings
    urls = BootUrls(boot=settings.boot.url, agent=settings.agent.url)
    app = Flask("provisioner.boot", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = BODY_BYTES_MAX
    install_problems(app)
    deciding = ThreadPoolExecutor(DECISIONS_AT_ONCE_MAX, thread_name_prefix="boot")

    def decide() -> BootPlan:
        asking = boot_request(request.args)
        decided = deciding.submit(service.boot.answer, asking, peer())
        try:
            return decided.result(DECISION_LIMIT_S)
        except TimeoutError:
            decided.cancel()
            raise

    add_files(app, settings.data_dir, accel=settings.boot.accel)

    @app.get("/boot/ipxe")
    def boot_script() -> Response:
        answer = _answer(lambda: _told(decide(), settings.ramdisk.kernel_arguments), urls)
        response = Response(answer.text, answer.status, content_type=CONTENT_TYPE)
        # The next answer may be another one: no proxy may keep this.
        response.headers["Cache-Control"] = "no-store"
        return response

    @app.get("/healthz")
    def healthz() -> Response:
        return jsonify(status="ok")

    return app


def _told(plan: BootPlan, arguments: tuple[str, ...]) -> BootPlan:
    """Return the plan with the site's own arguments for the ramdisk's kernel."""
    return replace(plan, arguments=arguments) if isinstance(plan, Ramdisk) else plan


def _answer(decide: Callable[[], BootPlan], urls: BootUrls) -> BootAnswer:
    try:
        plan = decide()
        if not isinstance(plan, Inspect):
            return answer_boot(plan, urls)
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
    return answer_boot(LocalDisk(LocalBoot.AUTO, reason), urls)
