"""Puts the parts together. The only module that knows every concrete class.

Imports what a caller asks for, when it asks: the boot listener loads no BMC library.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from .core.contracts import BmcPool, Store
from .core.lifecycle import Limits
from .core.manifest import Manifest
from .core.model import Phase
from .settings import Settings

if TYPE_CHECKING:
    from flask import Flask
    from sqlalchemy import Engine

    from .imaging.archive import Archive
    from .imaging.publish import Publisher
    from .service.agents import AgentSessions
    from .service.audit import Audit
    from .service.boot import BootService
    from .service.hosts import Hosts
    from .service.operations import Operations
    from .service.profiles import Profiles
    from .service.ramdisks import Ramdisks
    from .service.releases import Releases
    from .service.tokens import Tokens
    from .service.transitions import Transitions
    from .service.worker import Worker
    from .store.durable import DbosEffectWorker


@dataclass(frozen=True)
class Service:
    """Every use case, over one store."""

    settings: Settings
    store: Store
    hosts: Hosts
    operations: Operations
    profiles: Profiles
    releases: Releases
    ramdisks: Ramdisks
    tokens: Tokens
    boot: BootService
    agents: AgentSessions
    audit: Audit
    transitions: Transitions
    pool: BmcPool
    on_close: Callable[[], None]

    def close(self) -> None:
        self.on_close()


def limits_of(settings: Settings) -> Limits:
    """Return the time limits that the settings put in force."""
    chosen = settings.limits
    seconds = {
        Phase.QUEUED: chosen.queued_s,
        Phase.NETBOOTING: chosen.netbooting_s,
        Phase.PREPARING: chosen.preparing_s,
        Phase.WRITING: chosen.writing_s,
        Phase.VERIFYING: chosen.verifying_s,
        Phase.BOOTING: chosen.booting_s,
        Phase.PROVING: chosen.proving_s,
    }
    return Limits(
        phase={phase: timedelta(seconds=value) for phase, value in seconds.items()},
        agent_silence=timedelta(seconds=chosen.agent_silence_s),
    )


def engine_of(settings: Settings) -> Engine:
    """Return the engine of the configured database, with its schema at the newest version."""
    from .store.engine import open_engine

    return open_engine(settings.database.url)


def prepare(settings: Settings) -> None:
    """Create or upgrade the database, and make the first admin token known. Repeatable."""
    from .store.migrate import upgrade

    engine = engine_of(settings)
    try:
        upgrade(engine)
    finally:
        engine.dispose()
    service = build(settings)
    try:
        service.tokens.ensure_first_admin(settings.keys.admin_token)
    finally:
        service.close()


def archive_of(settings: Settings) -> Archive:
    """Return the release archive, trusted by the site's public key."""
    from .imaging.archive import Archive
    from .imaging.signing import load_public_key
    from .keys import RELEASE_PUB

    return Archive(settings.data_dir, load_public_key(settings.keys.folder / RELEASE_PUB))


def build(settings: Settings) -> Service:
    """Return the use cases over the configured database. Close it when done."""
    from .bmc.credentials import open_, seal
    from .bmc.ipmi import IpmiPool
    from .reporter.vendor_data import vendor_data
    from .service.agents import AgentSessions
    from .service.audit import Audit
    from .service.boot import BootService
    from .service.chance import Derived, utc_now
    from .service.hosts import Hosts
    from .service.operations import Operations
    from .service.profiles import Profiles
    from .service.ramdisks import Ramdisks
    from .service.releases import Releases
    from .service.timeline import Timeline
    from .service.tokens import Tokens
    from .service.transitions import Transitions
    from .store.durable import DbosEffectQueue
    from .store.rows import Sealing
    from .store.sql_store import SqlStore

    engine = engine_of(settings)
    queue = DbosEffectQueue(engine)
    master = bytes.fromhex(settings.keys.master.reveal())
    sealing = Sealing(seal=partial(seal, master), open=partial(open_, master))
    store = SqlStore(engine, queue, sealing)
    derived = Derived(master)
    ramdisks = Ramdisks(settings.data_dir / "ramdisks", settings.ramdisk.digest)
    transitions = Transitions(
        utc_now, derived, limits_of(settings), timedelta(seconds=settings.limits.ticket_s)
    )
    pool = IpmiPool(
        settings.data_dir / "locks",
        exchange_limit=timedelta(seconds=settings.limits.bmc_exchange_s),
    )
    agent_ca = settings.keys.agent_tls_pem.read_text()
    timeline = Timeline(store)

    def close() -> None:
        timeline.close()
        pool.close()
        queue.close()
        store.close()

    return Service(
        settings=settings,
        store=store,
        hosts=Hosts(store, pool, utc_now),
        operations=Operations(store, transitions, utc_now, ramdisks.newest),
        profiles=Profiles(store, utc_now),
        releases=Releases(store, archive_of(settings), utc_now),
        ramdisks=ramdisks,
        tokens=Tokens(store, utc_now),
        boot=BootService(
            store,
            transitions,
            utc_now,
            derived,
            ramdisks,
            record=timeline.add,
            discovery=settings.discovery.enabled,
            discovered_hosts_max=settings.discovery.hosts_max,
        ),
        agents=AgentSessions(
            store,
            transitions,
            utc_now,
            derived,
            boot_url=settings.boot.url,
            vendor_data=lambda nonce: vendor_data(settings.agent.url, nonce, agent_ca),
        ),
        audit=Audit(store),
        transitions=transitions,
        pool=pool,
        on_close=close,
    )


def worker(settings: Settings, service: Service) -> Worker:
    """Return the worker over an open service. One per process."""
    from .service.chance import utc_now
    from .service.performer import Performer
    from .service.worker import Worker

    performer = Performer(
        service.store,
        service.transitions,
        service.pool,
        utc_now,
        soft_shutdown_limit=timedelta(seconds=settings.limits.soft_shutdown_s),
    )
    return Worker(
        service.store,
        service.transitions,
        performer,
        effect_worker(settings),
        utc_now,
        in_flight_max=settings.limits.deployments_in_flight_max,
    )


def effect_worker(settings: Settings) -> DbosEffectWorker:
    from .store.durable import DbosEffectWorker

    return DbosEffectWorker(engine_of(settings))


def publisher(settings: Settings, service: Service, *, actor: str) -> Publisher:
    """Return what publishes images into the archive and registers them with the service."""
    from .imaging.publish import Publisher
    from .imaging.signing import load_signing_key
    from .keys import RELEASE_KEY

    def register(manifest: Manifest) -> None:
        service.releases.register(manifest, actor=actor)

    signer = load_signing_key(settings.keys.folder / RELEASE_KEY)
    return Publisher(archive_of(settings), register, signer)


def api_app(service: Service) -> Flask:
    from .web.api import create_app

    return create_app(service)


def boot_app(service: Service) -> Flask:
    from .web.boot import create_app

    return create_app(service)


def agent_app(service: Service) -> Flask:
    from .web.agent import create_app

    return create_app(service)


def find_settings(path: Path | None) -> Settings:
    """Return the settings of `path`, or of the first default place that has a file.

    Raises ConfigError that lists every problem, or where was looked.
    """
    from .errors import ConfigError
    from .settings import CONFIG_FILE, load

    if path is not None:
        return load(path)
    places = [Path(CONFIG_FILE), Path("/etc/provisioner") / CONFIG_FILE]
    for place in places:
        if place.is_file():
            return load(place)
    raise ConfigError(
        "there is no configuration",
        expected=" or ".join(str(place) for place in places),
        hint="`provisioner init DIR` writes one, with keys; or name it with --config",
    )
