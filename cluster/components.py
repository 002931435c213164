"""From settings to components: the one place that names a backend.

A process of the stack is given the path of a private settings file and nothing else; it reads the
file and makes what it needs. Settings stay here: each component is handed its own small part.

What only replicas have is in `cluster.replica_components`: a job's process starts with this module,
and should not wait for theirs.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from pydantic import SecretStr

from actors.settings import MaintainerSettings, RoleSettings
from cluster.private_files import write_private
from cluster.schema_state import require_known_schema
from lakebus.errors import ConfigurationError
from lakebus.settings import Settings
from lakebus.telemetry import NO_TRACING, Tracing, open_tracing
from storage.bus.settings import BusSettings
from storage.engine.settings import EngineSettings
from storage.files.objects import LocalObjectStore, ObjectStore, OpenedStore
from storage.maintenance.settings import MaintenanceSettings
from storage.postgres import PostgresLake
from storage.postgres.pool import PoolSettings

SETTINGS_FILE = "secrets/settings.json"


def keep_settings(settings: Settings) -> Path:
    """Writes the settings, secrets in clear, where only this user can read them."""

    path = Path(settings.data_dir).resolve() / SETTINGS_FILE
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_private(path, json.dumps(settings.private_json(), indent=1))
    return path


def read_settings(path: str) -> Settings:
    """Raises ConfigurationError when the file cannot be read."""

    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"the stack's settings file cannot be read: {error}") from error
    return Settings.from_private_json(values)


def bus_settings(settings: Settings) -> BusSettings:
    bus = settings.bus
    return BusSettings(
        shards=bus.shards,
        lease_ttl_ms=bus.lease_ttl_ms,
        claim_bytes_max=bus.claim_bytes_max,
        claim_entries_max=bus.claim_entries_max,
        group_bytes_max=bus.group_bytes_max,
        group_entries_max=bus.group_entries_max,
        backlog_bytes_hard=bus.backlog_bytes_hard,
        idempotency_window_s=bus.idempotency_window_hours * 3600,
        quarantine_attempts=bus.quarantine_attempts,
        quarantine_rate_max=bus.quarantine_rate_max,
        quarantine_window_s=bus.quarantine_window_s,
        retry_backoff_ms=bus.retry_backoff_ms,
        segment_ring_rotate_bytes=bus.segment_ring_rotate_bytes,
        segment_ring_rotate_age_s=bus.segment_ring_rotate_age_s,
        claim_check_bytes=bus.claim_check_bytes,
        intent_ttl_s=bus.intent_ttl_s,
    )


def role_settings(settings: Settings) -> RoleSettings:
    return RoleSettings(
        claim_poll_ms=settings.bus.claim_poll_ms,
        linger_ms=settings.publish.linger_ms,
        linger_ms_load=settings.publish.linger_ms_load,
        linger_ms_max=settings.publish.linger_ms_max,
        ranges_in_flight=settings.publish.stage_ahead + 1,
        intent_ttl_s=settings.bus.intent_ttl_s,
        publish_commits_max=settings.publish.commits_max,
        partitions_per_range_max=settings.publish.partitions_per_range_max,
        backoff_ms=settings.actors.publish_retry_ms,
        supervisor_tick_ms=settings.actors.supervisor_tick_ms,
        tick_age_s_max=settings.actors.stall_s,
    )


def maintainer_settings(settings: Settings) -> MaintainerSettings:
    """When jobs run."""

    upkeep = settings.maintenance
    return MaintainerSettings(
        enabled=upkeep.enabled,
        tick_ms=settings.actors.supervisor_tick_ms,
        compact_every_s=upkeep.compact_every_s,
        retain_every_s=upkeep.retain_every_s,
        collect_every_s=upkeep.collect_every_s,
        validate_every_s=upkeep.validate_every_s,
        jobs_at_once=upkeep.jobs_at_once,
        lease_ttl_s=upkeep.job_lease_s,
        attempts_max=upkeep.job_attempts_max,
    )


def maintenance_settings(settings: Settings) -> MaintenanceSettings:
    """What jobs do."""

    upkeep = settings.maintenance
    return MaintenanceSettings(
        target_file_bytes=upkeep.target_file_bytes,
        small_file_bytes=upkeep.small_file_bytes,
        small_files_max=upkeep.small_files_max,
        inputs_min=upkeep.compact_inputs_min,
        inputs_max=upkeep.compact_inputs_max,
        input_bytes_max=upkeep.compact_input_bytes_max,
        rewrite_memory_bytes=upkeep.rewrite_memory_bytes,
        rewrite_threads=upkeep.rewrite_threads,
        snapshot_keep_s=upkeep.snapshot_keep_hours * 3600,
        snapshot_keep_count=upkeep.snapshot_keep_count,
        safety_window_s=upkeep.safety_window_s,
        orphan_window_s=upkeep.orphan_window_hours * 3600,
        intent_ttl_s=settings.bus.intent_ttl_s,
        deletes_max=upkeep.deletes_max,
        expire_max=upkeep.expire_max,
        sample_files=upkeep.sample_files,
    )


def jobs_dir(settings: Settings) -> Path:
    """Where jobs have their folders."""

    return Path(settings.data_dir).resolve() / "jobs"


def object_store(settings: Settings) -> OpenedStore:
    """The store of data files. Raises ConfigurationError."""

    if not keeps_files_here(settings):
        return _cloud_store(settings)
    root = objects_dir(settings)
    root.mkdir(parents=True, exist_ok=True)
    return LocalObjectStore(root)


async def check_object_store(store: ObjectStore) -> None:
    """Once a start: a store by URL must refuse to overwrite. Raises ConfigurationError,
    Unavailable."""

    if store.local_path("probe") is None:
        from storage.files.cloud import check_conditions  # as in `_cloud_store`

        await check_conditions(store)


def object_store_words(settings: Settings) -> str:
    """For people; never with a secret."""

    if keeps_files_here(settings):
        return str(objects_dir(settings))
    at = f" at {settings.store.endpoint}" if settings.store.endpoint else ""
    return f"{settings.store.url}{at}"


def objects_dir(settings: Settings) -> Path:
    """The folder of a local store."""

    url = settings.store.url
    if url is None:
        return Path(settings.data_dir).resolve() / "objects"
    if not url.startswith("file:///"):
        raise ConfigurationError(f"store.url is {url[:80]!r}; a folder is written file:///path")
    return Path(url.removeprefix("file://"))


def keeps_files_here(settings: Settings) -> bool:
    """Whether the store is a folder of this machine."""

    url = settings.store.url
    return url is None or url.startswith("file:")


def _cloud_store(settings: Settings) -> OpenedStore:
    # Only who needs it loads the client library.
    from storage.files.cloud import CloudObjectStore
    from storage.files.cloud_settings import CloudSettings, Place

    store = settings.store
    if store.credentials_file is not None and not store.credentials_file.is_absolute():
        raise ConfigurationError("store.credentials_file must be an absolute path")
    return CloudObjectStore(
        Place.parse(store.url or ""),
        CloudSettings(
            endpoint=store.endpoint,
            region=store.region,
            allow_http=store.allow_http,
            virtual_host_style=store.virtual_host_style,
            account=store.account,
            access_key_id=_clear(store.access_key_id),
            secret_access_key=_clear(store.secret_access_key),
            session_token=_clear(store.session_token),
            credentials_file=store.credentials_file,
            request_timeout_s=store.request_timeout_s,
        ),
    )


def _clear(secret: SecretStr | None) -> str | None:
    return None if secret is None else secret.get_secret_value()


def cache_dir(settings: Settings) -> Path:
    """Where the replicas of this machine keep copies of files from a store by URL."""

    return (settings.store.cache_dir or Path(settings.data_dir) / "cache").absolute()


def job_engine_settings(settings: Settings) -> EngineSettings:
    """The caged engine of one job: it spills into the job's folder, which replaces the one named
    here, and is as small as the job."""

    return dataclasses.replace(
        engine_settings_at(settings, str(jobs_dir(settings))),
        memory_limit_bytes=settings.maintenance.rewrite_memory_bytes,
        threads=settings.maintenance.rewrite_threads,
        spare=False,
    )


def _readable_dir(settings: Settings) -> Path:
    """Of a store by URL the engine reads copies: in the folder of a job, or of a cache."""

    return objects_dir(settings) if keeps_files_here(settings) else cache_dir(settings)


def engine_settings_at(settings: Settings, temp_directory: str) -> EngineSettings:
    """Of an engine that spills into this folder."""

    query = settings.query
    return EngineSettings(
        allowed_directory=str(_readable_dir(settings)),
        temp_directory=temp_directory,
        memory_limit_bytes=query.memory_limit_bytes,
        address_space_bytes=query.address_space_bytes,
        threads=query.threads,
        temp_bytes_max=query.temporary_bytes_max,
        spare=query.spare_processes > 0,
        concurrent_queries=query.concurrent,
        queue_length_max=query.queue_max,
        presence_s=settings.limits.presence_s,
        sql_bytes_max=query.sql_bytes_max,
        interrupt_grace_s=query.cancel_grace_ms / 1000,
    )


def tracing(settings: Settings, service: str) -> Tracing:
    """Traces of one process, where they are wanted."""

    if not settings.telemetry.tracing:
        return NO_TRACING
    return open_tracing(
        exporter=settings.telemetry.exporter,
        service=f"lakebus {service}",
        ratio=settings.telemetry.sample_ratio,
    )


def dsn_of(settings: Settings) -> str:
    if settings.postgres.dsn is None:
        raise ConfigurationError("postgres.dsn is not set for a process of the stack")
    return settings.postgres.dsn.get_secret_value()


async def open_lake(settings: Settings, store: ObjectStore) -> PostgresLake:
    """Connects to a database whose schema is this version's. Raises StartRefused, Unavailable."""

    dsn = dsn_of(settings)
    await require_known_schema(dsn)
    return await PostgresLake.open(
        dsn,
        bus_settings=bus_settings(settings),
        object_store=store,
        pool_settings=PoolSettings(
            size_max=settings.postgres.pool_connections_max,
            statement_ms=settings.postgres.command_timeout_ms,
        ),
    )
