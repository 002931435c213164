"""What an operator tunes about the bus, in one frozen object that every backend takes.

The bounds that protect people (a window of at least 24 h, contract A13) are checked where settings
are read from the outside; here only what would break the mechanism is refused, so that tests can
use short times.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from lakebus.errors import ConfigurationError

#: An isolation lease is short so that one poison entry cannot hold its shard (B8), and no shorter
#: than this, because a healthy worker must be able to read, stage and publish within it.
ISOLATION_TTL_MS_MIN = 250


@dataclass(frozen=True, slots=True)
class BusSettings:
    """Times are by the database's clock; `shards` is fixed for a line of history (G2)."""

    shards: int = 4
    lease_ttl_ms: int = 15_000
    claim_bytes_max: int = 32 * 1024 * 1024
    claim_entries_max: int = 4_096
    group_bytes_max: int = 4 * 1024 * 1024
    group_entries_max: int = 256
    backlog_bytes_hard: int = 1024 * 1024 * 1024
    idempotency_window_s: float = 86_400.0
    quarantine_attempts: int = 3
    quarantine_rate_max: int = 10
    quarantine_window_s: float = 300.0
    retry_backoff_ms: int = 100
    segment_ring_rotate_bytes: int = 256 * 1024 * 1024
    segment_ring_rotate_age_s: float = 600.0
    claim_check_bytes: int = 1024 * 1024
    intent_ttl_s: float = 3_600.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < (0 if field.name in _MAY_BE_ZERO else 1e-9):
                raise ConfigurationError(f"the bus setting {field.name} must be greater than zero")
        if self.shards > 32_767:  # `$shard` is a 16-bit column
            raise ConfigurationError("the bus setting shards must be at most 32767")

    @property
    def isolation_ttl_ms(self) -> int:
        """The lease time of a range that has failed before (attempt 1 and later)."""

        return min(self.lease_ttl_ms, max(ISOLATION_TTL_MS_MIN, self.lease_ttl_ms // 4))

    def backoff_ms(self, attempt: int) -> int:
        """How long a range waits after its `attempt`-th failure: doubling, at most ttl / 8.

        The cap keeps the sum over a whole isolation (12 halvings of 4,096 entries, then the lone
        failures) within the 10 x ttl of contract B8.
        """

        doubled = self.retry_backoff_ms << min(max(attempt - 1, 0), 20)
        return min(doubled, self.lease_ttl_ms // 8)


_MAY_BE_ZERO = frozenset({"retry_backoff_ms", "quarantine_rate_max", "claim_check_bytes"})
