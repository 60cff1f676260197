"""Hosts and their NICs in SQL."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Select, func, select

from ..core.model import Firmware, Host, HostId
from ..errors import Conflict, NotFound
from .rows import host_of, host_row
from .sql import Queries
from .tables import hosts, nics


class HostQueries(Queries):
    def host(self, host_id: HostId) -> Host:
        row = self._one(select(hosts).where(hosts.c.id == host_id), lock=True)
        if row is None:
            raise NotFound(f"there is no host with the id {host_id}")
        return host_of(row, self._sealing)

    def host_named(self, name: str) -> Host | None:
        """Return the host of that name, else the one with that id."""
        for column in (hosts.c.name, hosts.c.id):
            row = self._one(select(hosts).where(column == name), lock=True)
            if row is not None:
                return host_of(row, self._sealing)
        return None

    def hosts_with_mac(self, mac: str) -> Sequence[Host]:
        owner = select(nics.c.host_id).where(nics.c.mac == mac)
        return self._hosts(select(hosts).where(hosts.c.id.in_(owner)))

    def hosts_with_uuid(self, uuid: str) -> Sequence[Host]:
        return self._hosts(select(hosts).where(hosts.c.uuid == uuid).order_by(hosts.c.name))

    def hosts(self, *, after: str = "", limit: int = 1000) -> Sequence[Host]:
        page = select(hosts).where(hosts.c.name > after).order_by(hosts.c.name).limit(limit)
        return self._hosts(page)

    def macs_of_firmware(self, firmware: Firmware) -> Sequence[str]:
        owners = select(nics.c.mac).join(hosts).where(hosts.c.firmware == firmware.value)
        return [row["mac"] for row in self._all(owners.order_by(nics.c.mac))]

    def macs(self) -> Mapping[str, HostId]:
        rows = self._all(select(nics.c.mac, nics.c.host_id))
        return {row["mac"]: HostId(row["host_id"]) for row in rows}

    def count_unconfirmed_hosts(self) -> int:
        count = select(func.count()).select_from(hosts)
        return self._number(count.where(hosts.c.is_confirmed.is_(False)))

    def _hosts(self, query: Select[Any]) -> list[Host]:
        return [host_of(row, self._sealing) for row in self._all(query)]

    def add_host(self, host: Host) -> None:
        taken = Conflict(f"there is a host named {host.name} already", host=host.name)
        with self._connection.begin_nested():
            if self._one(select(hosts.c.id).where(hosts.c.name == host.name)) is not None:
                raise taken
            self._check_bmc(host)
            self._add(hosts, host_row(host, self._sealing), taken)
            for mac in host.macs:
                self._add_nic(host, mac)

    def _add_nic(self, host: Host, mac: str) -> None:
        owner = select(hosts.c.name).join(nics).where(nics.c.mac == mac)
        taken = Conflict(f"the MAC {mac} belongs to another host", host=host.name, found=mac)
        try:
            self._add(nics, {"mac": mac, "host_id": host.id}, taken)
        except Conflict as error:
            other = self._connection.execute(owner).scalar()
            error.hint = f"it is a NIC of {other}: change that host first"
            raise

    def save_host(self, host: Host) -> None:
        """Save every field. Raises Conflict, with nothing changed, on a used name, MAC or BMC."""
        unique = (hosts.c.name, hosts.c.macs, hosts.c.bmc_address, hosts.c.bmc_port)
        saved = self._one(select(*unique).where(hosts.c.id == host.id))
        if saved is None:
            raise NotFound(f"there is no host with the id {host.id}")
        row = host_row(host, self._sealing)
        if saved == {column.name: row[column.name] for column in unique}:
            self._save(hosts, row)
            return
        with self._connection.begin_nested():
            self._check_bmc(host)
            self._save(hosts, row, Conflict(f"there is another host named {host.name}"))
            self._change_nics(host, saved["macs"])

    def _change_nics(self, host: Host, before: Sequence[str]) -> None:
        for mac in set(before) - set(host.macs):
            self._change(nics.delete().where(nics.c.mac == mac, nics.c.host_id == host.id))
        for mac in host.macs:
            if mac not in before:
                self._add_nic(host, mac)

    def _check_bmc(self, host: Host) -> None:
        """Raise Conflict for a BMC that is another host's."""
        if host.bmc is None:
            return
        same = (hosts.c.bmc_address == host.bmc.address, hosts.c.bmc_port == host.bmc.port)
        other = self._one(select(hosts.c.name).where(*same, hosts.c.id != host.id))
        if other is not None:
            raise Conflict(
                f"the BMC {host.bmc.address} is that of {other['name']}",
                host=host.name,
                expected="a BMC of its own",
                found=f"{host.bmc.address}:{host.bmc.port}",
                hint=f"what is done to {host.name} would be done to {other['name']}: correct one",
            )

    def delete_host(self, host_id: HostId) -> None:
        """Delete the host with everything that hangs on it; the audit log keeps its past."""
        self._change(hosts.delete().where(hosts.c.id == host_id))
