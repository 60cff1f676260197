"""Routes of hosts: enrol, show, change, power, timeline. Decides nothing."""

from typing import Any

from apiflask import APIBlueprint
from flask import Response

from provisioner.service.hosts import HostSpec

from .auth import Verb, actor, needs
from .idempotency import asked
from .schemas import (
    BmcCheckOut,
    ConfirmIn,
    EventsOut,
    FlagsIn,
    HostChangeIn,
    HostIn,
    HostOut,
    HostsOut,
    ImportIn,
    NumberedPageQuery,
    OperationOut,
    PageQuery,
    PowerIn,
    PowerOut,
    WhyOut,
)
from .services import (
    ApiServices,
    bmc_address,
    show_answer,
    show_host,
    show_hosts,
    show_operation,
)

Shown = dict[str, Any]


def host_routes(services: ApiServices) -> APIBlueprint:
    """Return the routes under /hosts."""
    api = APIBlueprint("hosts", __name__, tag="hosts")
    _reads(api, services)
    _changes(api, services)
    _enrolment(api, services)
    return api


def _reads(api: APIBlueprint, services: ApiServices) -> None:
    hosts, store = services.hosts, services.store

    @api.get("/hosts")
    @api.input(PageQuery, location="query")
    @api.output(HostsOut)
    @needs(Verb.READ)
    def list_hosts(query_data: PageQuery) -> Shown:
        """List hosts by name, a page at a time."""
        page = hosts.list(after=query_data.after, limit=query_data.limit)
        is_full = len(page) == query_data.limit
        return {"hosts": show_hosts(store, page), "next": page[-1].name if is_full else None}

    @api.get("/hosts/<name>")
    @api.output(HostOut)
    @needs(Verb.READ)
    def get_host(name: str) -> Shown:
        """Show one host, by name or id, with its inventory."""
        return show_host(store, hosts.show(name))

    @api.get("/hosts/<name>/events")
    @api.input(NumberedPageQuery, location="query")
    @api.output(EventsOut)
    @needs(Verb.READ)
    def host_events(name: str, query_data: NumberedPageQuery) -> Shown:
        """Show a host's timeline after a number, or its newest events; oldest first."""
        found = hosts.timeline(name, after=query_data.after, limit=query_data.limit)
        events = [
            {
                "number": number,
                "at": event.at,
                "source": event.source,
                "text": event.text,
                "operation": event.operation_id,
                "mac": event.mac,
                "detail": event.detail,
            }
            for number, event in found
        ]
        return {"events": events, "next": found[-1][0] if found else None}

    @api.get("/hosts/<name>/why")
    @api.output(WhyOut)
    @needs(Verb.READ)
    def why_host(name: str) -> Shown:
        """Say where a host's boot stands, why, and what to do."""
        return show_answer(services.why.ask(name))


def _enrolment(api: APIBlueprint, services: ApiServices) -> None:
    hosts, store = services.hosts, services.store

    @api.post("/hosts")
    @api.input(HostIn)
    @api.output(HostOut, status_code=201)
    @needs(Verb.OPERATE)
    def add_host(json_data: HostIn) -> Shown:
        """Enrol a host."""
        return show_host(store, hosts.add(_spec(json_data), actor=actor()))

    @api.post("/hosts/import")
    @api.input(ImportIn)
    @api.output(HostsOut, status_code=201)
    @needs(Verb.OPERATE)
    def import_hosts(json_data: ImportIn) -> Shown:
        """Enrol many hosts: all of them, or none."""
        specs = [_spec(host) for host in json_data.hosts]
        added = hosts.add_many(specs, actor=actor())
        return {"hosts": show_hosts(store, added), "next": None}

    @api.post("/hosts/<name>/confirm")
    @api.input(ConfirmIn)
    @api.output(HostOut)
    @needs(Verb.OPERATE)
    def confirm_host(name: str, json_data: ConfirmIn) -> Shown:
        """Take a discovered host into management."""
        host = hosts.confirm(
            name,
            new_name=json_data.new_name,
            bmc=bmc_address(json_data.bmc),
            profile=json_data.profile,
            actor=actor(),
        )
        return show_host(store, host)

    @api.delete("/hosts/<name>")
    @api.output({}, status_code=204)
    @needs(Verb.OPERATE)
    def delete_host(name: str) -> Response:
        """Stop managing a host. Its disk stays as it is."""
        hosts.delete(name, actor=actor())
        return Response(status=204)


def _changes(api: APIBlueprint, services: ApiServices) -> None:
    hosts, store = services.hosts, services.store

    @api.patch("/hosts/<name>")
    @api.input(HostChangeIn)
    @api.output(HostOut)
    @needs(Verb.OPERATE)
    def change_host(name: str, json_data: HostChangeIn) -> Shown:
        """Change what is given; the rest stays."""
        host = hosts.change(
            name,
            profile=json_data.profile,
            firmware=json_data.firmware,
            local_boot=json_data.local_boot,
            bmc=bmc_address(json_data.bmc),
            labels=json_data.labels,
            actor=actor(),
        )
        return show_host(store, host)

    @api.post("/hosts/<name>/flags")
    @api.input(FlagsIn)
    @api.output(HostOut)
    @needs(Verb.OPERATE)
    def flag_host(name: str, json_data: FlagsIn) -> Shown:
        """Protect a host, put it into maintenance, or release its quarantine."""
        host = hosts.set_flags(
            name,
            is_protected=json_data.is_protected,
            in_maintenance=json_data.in_maintenance,
            release_quarantine=json_data.release_quarantine,
            actor=actor(),
        )
        return show_host(store, host)

    @api.post("/hosts/<name>/power")
    @api.input(PowerIn)
    @api.output(PowerOut)
    @needs(Verb.OPERATE)
    def power_host(name: str, json_data: PowerIn) -> Shown:
        """Ask or tell the BMC, once. Refused while an operation owns the host."""
        return {"power": hosts.power(name, json_data.action, actor=actor())}

    @api.post("/hosts/<name>/bmc-check")
    @api.output(BmcCheckOut)
    @needs(Verb.OPERATE)
    def check_bmc(name: str) -> Shown:
        """Ask the BMC whether it lets people in without a password."""
        return {"findings": hosts.check_bmc(name)}

    @api.post("/hosts/<name>/inspect")
    @api.output(OperationOut, status_code=202)
    @needs(Verb.OPERATE)
    def inspect_host(name: str) -> Shown:
        """Netboot a host to take its inventory, and return it to its disk."""
        operation = services.operations.request_inspection(name, actor=actor(), asked=asked())
        return show_operation(services, operation)


def _spec(given: HostIn) -> HostSpec:
    return HostSpec(
        name=given.name,
        macs=tuple(given.macs),
        bmc=bmc_address(given.bmc),
        firmware=given.firmware,
        uuid=given.uuid,
        serial=given.serial,
        profile=given.profile,
        local_boot=given.local_boot,
        labels=given.labels,
    )
