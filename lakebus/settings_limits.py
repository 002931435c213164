"""The settings of limits: what one principal may take, so that others get their share."""

from __future__ import annotations

from lakebus.settings_table import Section, setting

_GIB = 1024**3


class LimitsSettings(Section):
    """What one principal may take. A key may have quotas of its own; these are for keys that have
    none. What they mean, and how they are divided over replicas: [Limits](operations.md#limits)."""

    requests_per_s: float = setting(
        0.0, "Requests a second of one principal; 0: no quota.", ge=0, le=1_000_000
    )
    ingest_bytes_per_s: int = setting(
        0,
        "Bytes of rows a second of one principal, after decompression; 0: no quota.",
        ge=0,
        le=1024 * _GIB,
    )
    burst_s: float = setting(
        2.0, "Of both quotas, so many seconds' worth may come at once.", gt=0, le=3600
    )
    queries_at_once: int = setting(
        0,
        "Queries of one principal that run at a time in one replica; 0: its share, and"
        " query.concurrent while it is alone.",
        ge=0,
        le=256,
    )
    requests_at_once: int = setting(
        224,
        "Requests of one principal in one replica at a time; below http.ongoing_requests_max, so"
        " that others find a place.",
        ge=1,
        le=10_000,
    )
    ingest_at_once: int = setting(
        8,
        "Ingest requests that one replica decodes and appends at a time while several principals"
        " send; each gets an equal share. One that is alone is not bound.",
        ge=1,
        le=10_000,
    )
    inflight_share: float = setting(
        0.75, "Share of bus.inflight_bytes_max that one principal may take.", gt=0, le=1
    )
    presence_s: float = setting(
        1.0,
        "How long a principal's share is kept for it after its last request.",
        ge=0,
        le=60,
    )
