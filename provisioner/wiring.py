"""Puts the parts together. The only module that knows every concrete class.

Imports what a caller asks for, when it asks: the boot listener loads no BMC library.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from .core.contracts import BmcPool, Store
from .core.diagnosis import Dhcp
from .core.manifest import Manifest
from .core.trust import TrustPolicy
from .failpoints import Reach, WatchedEffects, WatchedMarkFile, WatchedPool, WatchedStore
from .in_force import addresses_of, limits_of, mac_at, policy_of, rules_of
from .settings import Settings

if TYPE_CHECKING:
    from flask import Flask
    from sqlalchemy import Engine

    from .imaging.archive import Archive
    from .imaging.blobs import Blobs
    from .imaging.publish import Publisher, Register
    from .service.agents import AgentSessions
    from .service.audit import Audit
    from .service.boot import BootService
    from .service.breaker import Breakers
    from .service.fence import Fence
    from .service.hosts import Hosts
    from .service.operations import Operations
    from .service.profiles import Profiles
    from .service.ramdisks import Ramdisks
    from .service.reconciliation import Reconciliation
    from .service.releases import Releases
    from .service.services import Services
    from .service.sightings import HighWater, Sightings
    from .service.tokens import Tokens
    from .service.transitions import Transitions
    from .service.why import Why
    from .service.worker import Worker
    from .store.durable import DbosEffectWorker
    from .web.file_source import FileSource

# Held by whoever changes the archive.
ARCHIVE_LOCK: Final = "archive.lock"
WORKER: Final = "worker-1"
# How far the audit log had come: a database that has not come so far was restored.
HIGH_WATER: Final = "high-water.json"


@dataclass(frozen=True)
class Service:
    """Every use case, over one store."""

    settings: Settings
    store: Store
    hosts: Hosts
    operations: Operations
    profiles: Profiles
    releases: Releases
    archive: Archive
    ramdisks: Ramdisks
    tokens: Tokens
    boot: BootService
    agents: AgentSessions
    audit: Audit
    breakers: Breakers
    services: Services
    transitions: Transitions
    pool: BmcPool
    fence: Fence
    sightings: Sightings
    high_water: HighWater
    reconciliation: Reconciliation
    why: Why
    on_close: Callable[[], None]

    def close(self) -> None:
        self.on_close()


def engine_of(settings: Settings) -> Engine:
    """Return the engine of the configured database, with its schema at the newest version."""
    from .store.engine import open_engine

    return open_engine(settings.database.url)


def prepare(settings: Settings, reach: Reach | None = None) -> None:
    """Create or upgrade the database, and make the first admin token known. Repeatable."""
    from .store.migrate import upgrade

    engine = engine_of(settings)
    try:
        upgrade(engine)
    finally:
        engine.dispose()
    service = build(settings, reach)
    try:
        with service.store.begin() as tx:
            tx.seal_profiles()
        # Before any part can give a permission.
        service.high_water.look()
        service.tokens.ensure_first_admin(settings.keys.admin_token)
    finally:
        service.close()


def trust_policy(
    settings: Settings, minimum_versions: Mapping[str, str] | None = None
) -> TrustPolicy:
    """Return what this installation believes of releases.

    `minimum_versions` is what the database says of them (`Releases.minimum_versions`), for a
    ramdisk to pin; the service itself asks the database each time.
    """
    return TrustPolicy(
        keys=settings.keys.trusted,
        threshold=settings.releases.threshold,
        channels={rule.name: rule.threshold for rule in settings.releases.channels},
        minimum_versions=minimum_versions or {},
    )


def blobs_of(settings: Settings, reach: Reach | None = None) -> Blobs:
    """Return where releases are kept: files below data_dir, or the configured bucket."""
    from .failpoints import WatchedBlobs, WatchedFileBlobs
    from .imaging.blobs import FileBlobs

    chosen, s3 = settings.releases, settings.keys.s3
    if s3 is None:
        root = settings.data_dir
        return FileBlobs(root) if reach is None else WatchedFileBlobs(root, reach)
    from .imaging.s3_blobs import S3Blobs, S3Place

    bucket = S3Blobs(
        S3Place(
            url=chosen.store,
            access_key=s3.access_key,
            secret_key=s3.secret_key,
            endpoint=chosen.s3_endpoint,
            region=chosen.s3_region,
        )
    )
    return bucket if reach is None else WatchedBlobs(bucket, reach)


def archive_of(settings: Settings, reach: Reach | None = None) -> Archive:
    """Return the release archive, trusted by the site's policy."""
    from .imaging.archive import Archive

    lock_file = settings.data_dir / ARCHIVE_LOCK
    return Archive(blobs_of(settings, reach), trust_policy(settings), lock_file)


def build(settings: Settings, reach: Reach | None = None) -> Service:
    """Return the use cases over the configured database. Close it when done.

    `reach` is told of every failpoint: there are none without it.
    """
    from .bmc.credentials import open_, seal
    from .bmc.ipmi import IpmiPool
    from .cloud_init import check_cloud_config
    from .own_identity import own_host
    from .reporter.vendor_data import vendor_data
    from .service.agents import AgentSessions
    from .service.audit import Audit
    from .service.boot import BootService
    from .service.breaker import Breakers
    from .service.chance import Derived, utc_now
    from .service.facts import GuardFacts
    from .service.fence import Fence
    from .service.hosts import Hosts
    from .service.network_lines import SeenFrom
    from .service.operations import Operations
    from .service.profiles import Profiles
    from .service.ramdisks import Ramdisks
    from .service.reconciliation import Reconciliation
    from .service.services import Services
    from .service.sightings import HighWater, MarkFile, Sightings
    from .service.timeline import Timeline
    from .service.tokens import Tokens
    from .service.transitions import Transitions
    from .service.why import Why
    from .store.durable import DbosEffectQueue
    from .store.sealing import Sealing
    from .store.sql_store import SqlStore

    engine = engine_of(settings)
    queue = DbosEffectQueue(engine)
    master = bytes.fromhex(settings.keys.master.reveal())
    sealing = Sealing(seal=partial(seal, master), open=partial(open_, master))
    store: Store = SqlStore(engine, queue, sealing)
    derived = Derived(master)
    ramdisks = Ramdisks(settings.data_dir / "ramdisks", settings.ramdisk.digest)
    transitions = Transitions(
        utc_now,
        derived,
        limits_of(settings),
        timedelta(seconds=settings.limits.ticket_s),
        policy=policy_of(settings),
        guard=GuardFacts(own_host(settings.service.own_hosts), rules_of(settings)),
    )
    fence = Fence()
    mark_file = MarkFile(settings.data_dir / HIGH_WATER)
    ipmi = IpmiPool(
        settings.data_dir / "locks",
        exchange_limit=timedelta(seconds=settings.limits.bmc_exchange_s),
        may_begin=fence.begin,
    )
    pool: BmcPool = ipmi
    if reach is not None:
        mark_file = WatchedMarkFile(settings.data_dir / HIGH_WATER, reach)
        store, pool = WatchedStore(store, reach), WatchedPool(pool, reach)
    agent_ca = settings.keys.agent_tls_pem.read_text()
    archive = archive_of(settings, reach)
    addresses = addresses_of(settings)
    timeline = Timeline(store, None if settings.boot.accel else SeenFrom(mac_at(settings)))

    def close() -> None:
        timeline.close()
        pool.close()
        queue.close()
        store.close()

    return Service(
        settings=settings,
        store=store,
        hosts=Hosts(store, pool, utc_now, ipmi.weak_logins),
        operations=Operations(store, transitions, utc_now, ramdisks.newest, archive),
        profiles=Profiles(store, utc_now, check_cloud_config),
        releases=_releases(settings, store, archive, transitions),
        archive=archive,
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
            addresses=addresses,
        ),
        agents=AgentSessions(
            store,
            transitions,
            utc_now,
            derived,
            boot_url=settings.boot.url,
            mirrors=settings.releases.mirrors,
            vendor_data=lambda nonce: vendor_data(settings.agent.url, nonce, agent_ca),
            addresses=addresses,
        ),
        audit=Audit(store),
        breakers=Breakers(store, utc_now),
        services=Services(store, utc_now),
        transitions=transitions,
        pool=pool,
        fence=fence,
        sightings=Sightings(store, utc_now, derived),
        high_water=HighWater(store, utc_now, mark_file),
        reconciliation=Reconciliation(store, transitions, utc_now),
        why=Why(store, transitions.guard, utc_now, Dhcp(settings.dhcp.mode)),
        on_close=close,
    )


def _releases(
    settings: Settings, store: Store, archive: Archive, transitions: Transitions
) -> Releases:
    from .service.chance import utc_now
    from .service.releases import Releases
    from .service.removal import Keeping

    chosen = settings.releases
    return Releases(
        store,
        archive,
        utc_now,
        transitions,
        tested_channels=[rule.name for rule in chosen.channels if rule.tested],
        keeping=Keeping(chosen.keep_newest, timedelta(seconds=chosen.grace_s)),
    )


def worker(settings: Settings, service: Service, reach: Reach | None = None) -> Worker:
    """Return the worker over an open service. One per process."""
    from .service.chance import utc_now
    from .service.clock_watch import ClockWatch
    from .service.performer import Performer
    from .service.recovery import Recovery
    from .service.worker import Worker

    performer = Performer(
        service.store,
        service.transitions,
        service.pool,
        utc_now,
        soft_shutdown_limit=timedelta(seconds=settings.limits.soft_shutdown_s),
        fence=service.fence,
    )
    effects = effect_worker(settings)
    service.fence.hold(effects.lease_left)
    return Worker(
        service.store,
        service.transitions,
        performer,
        effects if reach is None else WatchedEffects(effects, reach),
        utc_now,
        Recovery(service.store, service.transitions, service.archive, utc_now),
        high_water=service.high_water,
        clock_watch=ClockWatch(service.store, utc_now),
    )


def effect_worker(settings: Settings) -> DbosEffectWorker:
    from .store.durable import DbosEffectWorker

    engine = engine_of(settings)
    return DbosEffectWorker(engine, name=_name_of(settings))


def _name_of(settings: Settings) -> str:
    """Return this worker's name among those on its database, the same over restarts."""
    if settings.service.name:
        return settings.service.name
    # SQLite has one; who calls the same PostgreSQL from elsewhere has another host name.
    return WORKER if settings.database.url.startswith("sqlite") else socket.gethostname()


def registrar(service: Service, *, actor: str) -> Register:
    """Return what makes releases of the archive known to the service."""

    def register(manifest: Manifest, stored_bytes: int) -> None:
        service.releases.register(manifest, stored_bytes, actor=actor)

    return register


def publisher(
    settings: Settings, service: Service, *, actor: str, key_file: Path | None = None
) -> Publisher:
    """Return what publishes images into the archive and registers them with the service.

    It signs with the key in use, or with the one in `key_file`.
    """
    from .imaging.publish import Publisher
    from .imaging.signing import load_signing_key
    from .keys import RELEASE_KEY

    signer = load_signing_key(key_file or settings.keys.folder / RELEASE_KEY)
    return Publisher(service.archive, [signer], registrar(service, actor=actor))


def api_app(service: Service) -> Flask:
    from .web.api import create_app

    return create_app(service)


def boot_app(service: Service) -> Flask:
    from .service.chance import utc_now
    from .service.network_lines import NetworkLines
    from .web.boot import create_app
    from .web.downloads import Downloads

    lines = NetworkLines(service.store, mac_at(service.settings))
    return create_app(service, files_of(service), Downloads(lines.add, utc_now))


def files_of(service: Service) -> FileSource:
    """Return where the boot listener's files are: releases perhaps in a bucket."""
    from .web.file_source import LocalFiles, StoredElsewhere

    here = LocalFiles(service.settings.data_dir)
    if service.settings.keys.s3 is None:
        return here
    return StoredElsewhere(here, service.archive.blobs.read)


def agent_app(service: Service) -> Flask:
    from .web.agent import create_app

    return create_app(service)
