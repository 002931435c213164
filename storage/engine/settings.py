"""What an operator tunes of the SQL engine; no object that does work lives here."""

from __future__ import annotations

from dataclasses import dataclass

from lakebus.errors import ConfigurationError

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Bounds of one engine: one child process that runs queries and one spare.

    `allowed_directory`: the only folder the child's DuckDB may read (object store root or cache).
    `temp_directory`: where sorts and joins spill; belongs to this engine alone.
    `memory_limit_bytes`: DuckDB's own bound, for all running queries together.
    `address_space_bytes`: what the whole child may map beyond what it has mapped at start, the last
    line behind the memory limit (values such as one huge list are outside DuckDB's accounting).
    `threads`: DuckDB worker threads. `concurrent_queries`: how many run at once; others queue,
    fairly over principals (`storage.turns`, whose memory `presence_s` is).
    """

    allowed_directory: str
    temp_directory: str
    memory_limit_bytes: int = 1024 * MIB
    address_space_bytes: int = 2048 * MIB
    threads: int = 2
    temp_bytes_max: int = 8192 * MIB
    spare: bool = True
    concurrent_queries: int = 4
    queue_length_max: int = 512
    presence_s: float = 1.0
    sql_bytes_max: int = 128 * 1024
    parse_cache_entries: int = 1024
    scope_cache_entries: int = 64
    parse_deadline_s: float = 5.0
    start_deadline_s: float = 30.0
    interrupt_grace_s: float = 0.12
    ping_interval_s: float = 2.0
    ping_deadline_s: float = 10.0

    def __post_init__(self) -> None:
        for name in (
            "memory_limit_bytes", "address_space_bytes", "threads", "temp_bytes_max",
            "concurrent_queries", "queue_length_max", "sql_bytes_max", "parse_cache_entries",
            "scope_cache_entries", "parse_deadline_s", "start_deadline_s", "interrupt_grace_s",
            "ping_interval_s", "ping_deadline_s",
        ):  # fmt: skip
            if getattr(self, name) <= 0:
                raise ConfigurationError(f"engine setting {name} must be greater than zero")
        for name in ("allowed_directory", "temp_directory"):
            if not str(getattr(self, name)).startswith("/"):
                raise ConfigurationError(f"engine setting {name} must be an absolute path")
        if self.scope_cache_entries < self.concurrent_queries:
            raise ConfigurationError(
                "engine setting scope_cache_entries must be at least concurrent_queries"
            )
