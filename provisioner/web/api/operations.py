"""Routes of operations: request, show, cancel, and a bounded stream of changes."""

import json
import threading
import time
from collections.abc import Iterator
from typing import Any, Final

from apiflask import APIBlueprint
from flask import Response

from provisioner.errors import RequestError, Unavailable

from .auth import Verb, actor, needs
from .idempotency import asked
from .schemas import (
    PAGE_MAX,
    DeploymentIn,
    OperationOut,
    OperationsOut,
    OperationsQuery,
    VerificationIn,
)
from .services import ApiServices, show_operation, show_operations

Shown = dict[str, Any]

# Each stream holds a thread of the listener, so most of them stay free for requests.
STREAMS_MAX: Final = 8
STREAM_LIMIT_S: Final = 600.0
STREAM_LOOK_S: Final = 0.5
# A comment now and then, so that a client that left is noticed and its thread freed.
STREAM_PULSE_S: Final = 10.0


def operation_routes(services: ApiServices, stopping: threading.Event) -> APIBlueprint:
    """Return the routes under /operations and /deployments. Streams end at `stopping`."""
    api = APIBlueprint("operations", __name__, tag="operations")
    operations = services.operations
    streams = threading.BoundedSemaphore(STREAMS_MAX)

    @api.post("/deployments")
    @api.input(DeploymentIn)
    @api.output(OperationsOut, status_code=202)
    @needs(Verb.OPERATE)
    def request_deployments(json_data: DeploymentIn) -> Shown:
        """Queue a deployment for every named host, or for none."""
        requested = operations.request_deployment(
            json_data.hosts,
            json_data.release,
            options=json_data.options.model_dump(exclude_none=True),
            actor=actor(),
            asked=asked(),
        )
        return {"operations": show_operations(services, requested)}

    @api.post("/verifications")
    @api.input(VerificationIn)
    @api.output(OperationsOut, status_code=202)
    @needs(Verb.OPERATE)
    def request_verifications(json_data: VerificationIn) -> Shown:
        """Queue a comparison of every named host's disk with a release; nothing is written."""
        requested = operations.request_verification(
            json_data.hosts, json_data.release, actor=actor(), asked=asked()
        )
        return {"operations": show_operations(services, requested)}

    @api.get("/operations")
    @api.input(OperationsQuery, location="query")
    @api.output(OperationsOut)
    @needs(Verb.READ)
    def list_operations(query_data: OperationsQuery) -> Shown:
        """List operations, newest first: those of a host, those still open, or by ids."""
        if query_data.ids:
            ids = query_data.ids.split(",")
            if len(ids) > PAGE_MAX:
                raise RequestError("too many ids", expected=PAGE_MAX, found=len(ids))
            found = [operations.show(one) for one in ids]
        else:
            found = list(
                operations.list(query_data.host, only_open=query_data.open, limit=query_data.limit)
            )
        return {"operations": show_operations(services, found)}

    @api.get("/operations/<operation_id>")
    @api.output(OperationOut)
    @needs(Verb.READ)
    def get_operation(operation_id: str) -> Shown:
        """Show one operation with its phases, progress, error and evidence."""
        return show_operation(services, operations.show(operation_id))

    @api.post("/operations/<operation_id>/cancel")
    @api.output(OperationOut)
    @needs(Verb.OPERATE)
    def cancel_operation(operation_id: str) -> Shown:
        """Cancel an operation that has not begun to write, or what is to follow a failed one."""
        return show_operation(services, operations.cancel(operation_id, actor=actor()))

    @api.get("/operations/<operation_id>/stream")
    @api.doc(responses={200: "Server-sent events, each an operation as JSON."})
    @needs(Verb.READ)
    def stream_operation(operation_id: str) -> Response:
        """Send the operation as a server-sent event at each change, until it is final."""
        operations.show(operation_id)  # an unknown one is a 404, not an empty stream
        if not streams.acquire(blocking=False):
            raise Unavailable(
                f"{STREAMS_MAX} streams are open already", hint="poll the operation instead"
            )
        changes = _Changes(services, operation_id, stopping)
        response = Response(changes.events(), mimetype="text/event-stream")
        response.call_on_close(streams.release)
        response.headers["Cache-Control"] = "no-store"
        return response

    return api


class _Changes:
    """Looks at one operation again and again, and tells what is new."""

    def __init__(self, services: ApiServices, operation_id: str, stopping: threading.Event) -> None:
        self._services = services
        self._operation_id = operation_id
        self._stopping = stopping

    def events(self) -> Iterator[str]:
        ends_at = time.monotonic() + STREAM_LIMIT_S
        told, told_at = "", time.monotonic()
        while time.monotonic() < ends_at:
            shown = self._look()
            text = json.dumps(shown, default=_plain, separators=(",", ":"))
            if text != told:
                told, told_at = text, time.monotonic()
                yield f"event: operation\ndata: {text}\n\n"
            elif time.monotonic() - told_at >= STREAM_PULSE_S:
                told_at = time.monotonic()
                yield ": still here\n\n"
            if shown["is_final"] or self._stopping.wait(STREAM_LOOK_S):
                return

    def _look(self) -> Shown:
        found = self._services.operations.show(self._operation_id)
        return show_operation(self._services, found)


def _plain(value: Any) -> str:
    """Return a date as ISO 8601; nothing else that is not JSON is in an operation."""
    text: str = value.isoformat()
    return text
