"""The table of settings: each with unit, default, bounds and one sentence of help.

One class a component. A default may differ by profile; nothing else may. `lakebus.settings` reads
the sources and gives the values; here is only what can be set, and how a row is put in words.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr
from pydantic.fields import FieldInfo

Profile = Literal["local", "test", "production"]
PROFILES: tuple[Profile, ...] = ("local", "test", "production")
ENVIRONMENT_PREFIX = "LAKEBUS_"

_KIB, _MIB, _GIB = 1024, 1024**2, 1024**3


def setting(
    default: Any,
    help: str,  # noqa: A002 - the word an operator knows
    *,
    test: Any = None,
    production: Any = None,
    **bounds: Any,
) -> Any:
    """One row of the table. `test` and `production` replace the default in that profile."""
    profiles = {"test": test, "production": production}
    given = {name: value for name, value in profiles.items() if value is not None}
    return Field(default, description=help, json_schema_extra={"profiles": given}, **bounds)


class Section(BaseModel):
    """One component's settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class PostgresSettings(Section):
    """The database that knows the truth."""

    dsn: SecretStr | None = setting(
        None, "DSN of your own PostgreSQL (15 to 18); without one, lakebus runs its own."
    )
    embedded: bool = setting(
        True, "Run a PostgreSQL of our own when no DSN is given.", production=False
    )
    port: int = setting(
        0, "Port of the embedded server on 127.0.0.1; 0 takes a free one.", ge=0, le=65535
    )
    bin_dir: Path | None = setting(
        None, "Folder with postgres and initdb, instead of the ones that were installed."
    )
    program_cache_dir: Path = setting(
        Path("/var/cache/lakebus/postgres"),
        "Where root keeps a copy of PostgreSQL's programs if its user cannot reach the originals.",
    )
    run_as_user: str = setting(
        "nobody", "Whom the embedded server runs as when root starts it.", min_length=1
    )
    start_timeout_s: float = setting(
        30.0, "How long the embedded server may take to start.", gt=0, le=600
    )
    pool_connections_max: int = setting(8, "Connections each process may open.", ge=1, le=100)
    command_timeout_ms: int = setting(
        30_000, "How long one statement of ours may take.", ge=100, le=600_000
    )


class BusSettings(Section):
    """The log of entries between the door and the commit coordinators."""

    shards: int = setting(
        4, "Ordered slices of the bus; fixed once the first table exists.", ge=1, le=256
    )
    group_bytes_max: int = setting(1 * _MIB, "Bytes of a group commit.", ge=4 * _KIB, le=64 * _MIB)
    group_entries_max: int = setting(1000, "Entries of a group commit.", ge=1, le=10_000)
    segment_ring_rotate_bytes: int = setting(
        256 * _MIB,
        "A bus table of this size is closed; when all in it is terminal it is emptied.",
        ge=1 * _MIB,
        le=64 * _GIB,
        test=16 * _MIB,
    )
    segment_ring_rotate_age_s: float = setting(
        600.0, "A bus table of this age is closed.", gt=0, le=86_400, test=60.0
    )
    backlog_bytes_hard: int = setting(
        8 * _GIB,
        "From this backlog of a shard on ingest refuses (429).",
        ge=1 * _MIB,
        le=1024 * _GIB,
    )
    inflight_bytes_max: int = setting(
        256 * _MIB,
        "Bytes of requests that one ingest replica holds at a time.",
        ge=1 * _MIB,
        le=64 * _GIB,
    )
    claim_check_bytes: int = setting(
        1 * _MIB,
        "Payloads above this size go to the object store, and the bus carries their name; 0: none.",
        ge=0,
        le=64 * _MIB,
    )
    idempotency_window_hours: float = setting(
        24.0, "How long a key is remembered; below 24 only in the profile test.", gt=0, le=8760
    )
    lease_ttl_ms: int = setting(
        10_000, "How long a lease lives without renewal.", ge=200, le=600_000, test=1000
    )
    claim_bytes_max: int = setting(32 * _MIB, "Bytes of one claim.", ge=4 * _KIB, le=1 * _GIB)
    claim_entries_max: int = setting(1024, "Entries of one claim.", ge=1, le=100_000)
    claim_poll_ms: int = setting(
        250, "How often a coordinator looks for work unasked.", ge=5, le=60_000, test=50
    )
    quarantine_attempts: int = setting(
        3, "Failures alone in a healthy worker before an entry is set aside.", ge=1, le=100
    )
    quarantine_rate_max: int = setting(
        10, "Quarantined entries per window above which quarantining stops.", ge=0, le=100_000
    )
    quarantine_window_s: float = setting(
        300.0, "The window for quarantine_rate_max.", gt=0, le=86_400
    )
    retry_backoff_ms: int = setting(
        100, "Pause after a range's first failure; doubles.", ge=0, le=60_000
    )
    intent_ttl_s: float = setting(
        3600.0, "How long a write intent protects a file nobody refers to.", gt=0, le=604_800
    )


class PublishSettings(Section):
    """How commits become snapshots."""

    linger_ms: int = setting(
        30, "Least pause between two publications while commits keep coming.", ge=0, le=10_000
    )
    linger_ms_load: int = setting(
        150,
        "The longest such pause that load makes: the more requests, the longer it is.",
        ge=0,
        le=10_000,
    )
    linger_ms_max: int = setting(
        2_000,
        "The longest such pause, while tables have far more small files than they may keep.",
        ge=0,
        le=10_000,
    )
    commits_max: int = setting(64, "Commits joined in one publication.", ge=1, le=10_000)
    stage_ahead: int = setting(
        1, "Ranges a coordinator writes at a time, besides the first.", ge=0, le=16
    )
    partitions_per_range_max: int = setting(
        16,
        "A range with more partitions of a table becomes one mixed file, which compaction cuts.",
        ge=1,
        le=1_024,
    )


class QuerySettings(Section):
    """What one query may take."""

    timeout_ms_default: int = setting(
        30_000, "Time of a query that asks for none.", ge=1, le=100_000
    )
    timeout_ms_max: int = setting(
        100_000, "The longest time a query may ask for.", ge=1, le=100_000
    )
    rows_max: int = setting(10_000_000, "Rows of an answer.", ge=1, le=1_000_000_000)
    result_bytes_max: int = setting(1 * _GIB, "Bytes of an answer.", ge=1 * _KIB, le=64 * _GIB)
    sql_bytes_max: int = setting(256 * _KIB, "Bytes of a statement.", ge=64, le=16 * _MIB)
    memory_limit_bytes: int = setting(
        1 * _GIB, "Memory of the engine in one query replica.", ge=64 * _MIB, le=1024 * _GIB
    )
    address_space_bytes: int = setting(
        2 * _GIB,
        "What the engine's process may map beyond its size at start, the wall behind"
        " memory_limit_bytes.",
        ge=256 * _MIB,
        le=1024 * _GIB,
    )
    temporary_bytes_max: int = setting(
        4 * _GIB, "Disk for spilling of one query replica.", ge=0, le=1024 * _GIB
    )
    threads: int = setting(2, "Threads of the engine in one query replica.", ge=1, le=256)
    concurrent: int = setting(4, "Queries that run at a time in one replica.", ge=1, le=256)
    queue_max: int = setting(64, "Queries that wait in one replica before it refuses.", ge=0)
    cancel_grace_ms: int = setting(
        250, "An interrupted query that does not stop by then loses its process.", ge=10, le=10_000
    )
    spare_processes: int = setting(
        1, "Warm engine processes kept beside the working one.", ge=0, le=1
    )
    pin_ttl_s: float = setting(
        120.0,
        "How long files are kept for a query replica that died; one that is silent for so long "
        "loses its queries.",
        ge=10,
        le=3_600,
    )


class HttpSettings(Section):
    """The outside face."""

    host: str = setting("127.0.0.1", "Address to listen on.", production="0.0.0.0")
    port: int = setting(8350, "Port to listen on; 0 takes a free one.", ge=0, le=65535, test=0)
    body_bytes_max: int = setting(
        64 * _MIB, "Bytes of a request body after decompression.", ge=1 * _KIB, le=4 * _GIB
    )
    rows_max: int = setting(1_000_000, "Rows of one ingest request.", ge=1, le=100_000_000)
    ingest_replicas: int = setting(1, "Ingest replicas.", ge=1, le=1000, production=2)
    query_replicas_min: int = setting(1, "Query replicas at rest.", ge=1, le=1000)
    query_replicas_max: int = setting(
        0,
        "Query replicas under load; 0: 2, or 1 on fewer than 4 processors.",
        ge=0,
        le=1000,
        test=1,
        production=16,
    )
    ongoing_requests_max: int = setting(
        256, "Requests one replica works on at a time.", ge=1, le=10_000
    )
    queued_requests_max: int = setting(
        512, "Requests that wait for a replica before 503.", ge=0, le=100_000
    )
    drain_s: float = setting(
        1.0,
        "How long a stopping replica finishes its requests.",
        ge=0,
        le=600,
        test=0.5,
        production=30.0,
    )


class ActorsSettings(Section):
    """Lease manager, commit coordinators, snapshot publisher, supervisor."""

    placement: Literal["together", "spread"] = setting(
        "together", "One process for all roles, or an actor each.", production="spread"
    )
    coordinators: int = setting(
        1, "Commit coordinators with placement `spread`.", ge=1, le=256, production=4
    )
    supervisor_tick_ms: int = setting(
        1000,
        "How often the supervisor compares what should live with what does.",
        ge=50,
        le=60_000,
        test=200,
    )
    stall_s: float = setting(
        30.0, "An actor without progress for this long is replaced.", gt=0, le=3600, test=5.0
    )
    publish_retry_ms: int = setting(
        50, "First pause after a failed tick; doubles, at most to 5 s.", ge=1, le=5000
    )


class MaintenanceSettings(Section):
    """Compaction, retention, collection of files nobody needs, validation."""

    enabled: bool = setting(
        True, "Run the periodic jobs; without them only those that somebody asks for."
    )
    compact_every_s: float = setting(
        10.0,
        "How often small files are merged; sooner in a table over its bound, later if busy.",
        gt=0,
        le=86_400,
        test=1.0,
    )
    retain_every_s: float = setting(
        600.0, "How often old rows and snapshots are ended.", gt=0, le=604_800, test=5.0
    )
    collect_every_s: float = setting(
        600.0, "How often files that nobody needs are deleted.", gt=0, le=604_800, test=5.0
    )
    validate_every_s: float = setting(
        86_400.0, "How often the lake is checked.", gt=0, le=31_536_000
    )
    target_file_bytes: int = setting(
        128 * _MIB, "Size of the files that compaction makes.", ge=1 * _MIB, le=4 * _GIB
    )
    small_file_bytes: int = setting(
        8 * _MIB, "Files below this size are merged.", ge=4 * _KIB, le=1 * _GIB
    )
    small_files_max: int = setting(
        64, "Small files that a table may keep; beyond it compaction hurries.", ge=2, le=100_000
    )
    compact_inputs_min: int = setting(
        8, "Fewer files of about one size are not worth a rewrite.", ge=2, le=10_000
    )
    compact_inputs_max: int = setting(2_000, "Files of one rewrite.", ge=2, le=100_000)
    compact_input_bytes_max: int = setting(
        1 * _GIB, "Bytes of the files of one rewrite.", ge=1 * _MIB, le=64 * _GIB
    )
    rewrite_memory_bytes: int = setting(
        512 * _MIB, "Memory of one rewrite; beyond it the sort spills.", ge=64 * _MIB, le=64 * _GIB
    )
    rewrite_threads: int = setting(1, "Threads of one rewrite.", ge=1, le=64)
    snapshot_keep_hours: float = setting(
        168.0, "Younger snapshots stay readable.", gt=0, le=876_000
    )
    snapshot_keep_count: int = setting(
        1_000, "The newest so many snapshots stay readable, however old.", ge=1, le=100_000_000
    )
    safety_window_s: float = setting(
        3_600.0, "How long a file stays condemned before it is deleted.", gt=0, le=31_536_000
    )
    orphan_window_hours: float = setting(
        24.0, "How long after its write intent a file nobody refers to is kept.", gt=0, le=8_760
    )
    deletes_max: int = setting(10_000, "Files that one collection deletes.", ge=1, le=10_000_000)
    expire_max: int = setting(
        100_000, "Snapshots that one retention job ends.", ge=1, le=100_000_000
    )
    sample_files: int = setting(
        200, "Data files whose contents the periodic validation reads.", ge=0, le=10_000_000
    )
    jobs_at_once: int = setting(
        1,
        "Jobs that run at a time: so many that rewrite files, and so many of the others.",
        ge=1,
        le=64,
    )
    job_lease_s: float = setting(
        60.0, "How long a job stays with a worker that died.", ge=1, le=86_400, test=5.0
    )
    job_attempts_max: int = setting(10, "Tries of one job.", ge=1, le=1_000)


class RaySettings(Section):
    """The runtime that places and restarts our processes."""

    address: str | None = setting(
        None, "Address of a running Ray cluster; without one, lakebus starts its own."
    )
    auth_mode: Literal["token", "disabled"] = setting(
        "token", "Whether Ray's own ports ask for the stack's token."
    )
    cpus: int | None = setting(
        None, "CPUs that Ray may hand out; without a number, those of the machine.", ge=1
    )
    object_store_bytes: int = setting(
        256 * _MIB, "Ray's shared-memory object store.", ge=80 * _MIB, le=1024 * _GIB
    )
    temp_dir: Path | None = setting(
        None, "Ray's folder for sockets and logs; short, because socket paths end at 107 bytes."
    )
    port_base: int = setting(
        0,
        "First of 256 ports for replicas and HAProxy's own pages; 0 takes free ones.",
        ge=0,
        le=65000,
    )
    start_timeout_s: float = setting(
        90.0, "How long Ray and the application may take to start.", gt=0, le=900
    )


class LogSettings(Section):
    """Logs of our own processes."""

    level: Literal["debug", "info", "warning", "error"] = setting(
        "info", "The least that is logged."
    )
    json_lines: bool = setting(True, "Log one JSON object a line.")
    file_bytes_max: int = setting(
        64 * _MIB, "Size at which a log file is replaced; one older one is kept.", ge=64 * _KIB
    )


class TelemetrySettings(Section):
    """Traces and metrics."""

    tracing: bool = setting(False, "Make OpenTelemetry spans from request to snapshot.")
    exporter: str = setting(
        "console",
        "Where spans go: `console`, `otlp` (needs the OpenTelemetry OTLP exporter package), or"
        " module:function giving a span exporter.",
    )
    sample_ratio: float = setting(1.0, "Share of requests that are traced.", ge=0, le=1)


@dataclass(frozen=True, slots=True)
class SettingRow:
    """One row of the table, for documentation and for the sources."""

    name: str
    help: str
    kind: str
    defaults: Mapping[str, Any]
    bounds: str
    secret: bool

    @property
    def variable(self) -> str:
        return ENVIRONMENT_PREFIX + self.name.replace(".", "_").upper()

    def read(self, settings: BaseModel) -> Any:
        value: Any = settings
        for part in self.name.split("."):
            value = getattr(value, part)
        return value


def describe_row(name: str, field: FieldInfo) -> SettingRow:
    extra = typing.cast("dict[str, Any]", field.json_schema_extra)
    return SettingRow(
        name=name,
        help=field.description or "",
        kind=_kind_words(field.annotation),
        defaults={profile: extra["profiles"].get(profile, field.default) for profile in PROFILES},
        bounds=_bounds_words(field),
        secret="SecretStr" in str(field.annotation),
    )


# --- words ---------------------------------------------------------------------------------


def words(value: Any, *, secret: bool = False) -> str:
    if value is None:
        return "(none)"
    if secret:
        return "<secret>"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return _sized(value)
    return str(value)


def _sized(number: int) -> str:
    for unit, name in ((_GIB, "GiB"), (_MIB, "MiB"), (_KIB, "KiB")):
        if number >= unit and number % unit == 0:
            return f"{number} ({number // unit} {name})"
    return str(number)


def defaults_words(row: SettingRow) -> str:
    usual = row.defaults["local"]
    differing = [
        f"{profile}: {words(row.defaults[profile])}"
        for profile in PROFILES[1:]
        if row.defaults[profile] != usual
    ]
    return "; ".join([words(usual, secret=row.secret), *differing])


def _kind_words(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(kind))
    if isinstance(kind, types.UnionType):
        return _kind_words(next(one for one in typing.get_args(kind) if one is not type(None)))
    names = {bool: "true, false", int: "whole number", float: "number", Path: "path"}
    return names.get(kind, "text")


def _bounds_words(field: FieldInfo) -> str:
    low = high = ""
    for bound in field.metadata:
        if getattr(bound, "ge", None) is not None:
            low = words(bound.ge)
        if getattr(bound, "gt", None) is not None:
            low = f"above {words(bound.gt)}"
        if getattr(bound, "le", None) is not None:
            high = words(bound.le)
    if low and high:
        return f"{low} to {high}"
    return f"from {low}" if low else ""
