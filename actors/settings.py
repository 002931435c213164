"""What an operator tunes about the roles, in one frozen object that every role takes."""

from __future__ import annotations

from dataclasses import dataclass, fields

from lakebus.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class RoleSettings:
    """Times are by the local monotonic clock; what decides anything is timed by the database.

    :param claim_poll_ms: how long a coordinator waits for a hint before it looks by itself.
    :param linger_ms: least time between two rounds of claims, and between two publishes, under
        load, so that files grow; never waited after idle.
    :param linger_entries_min: fewer entries than this begun within a linger are no load.
    :param range_bytes_large, range_entries_large: a range of this size makes a large file anyway,
        so the next claim does not linger.
    :param ranges_in_flight: ranges one coordinator works on at a time; range n+1 is written while
        range n is published.
    :param encode_threads: threads that write Parquet in one coordinator.
    :param hold_ttls_max, hold_s_min: how many lease times, and at least how long, a range may be
        worked on before the worker is taken to be stuck, stops renewing and ends its process.
    :param verdicts_max: entries of one range that may be found bad by trying; more than that says
        that the fault is ours, and the range is returned instead.
    :param publish_commits_max: commits joined in one publish.
    :param publish_attempts: tries of one publication before its commits are given back.
    :param backoff_ms, backoff_ms_max: waiting after failures, doubling.
    :param failures_max: failures in a row after which a role ends its process.
    :param unavailable_s_max: how long store or catalog may be away before it does so too.
    :param supervisor_tick_ms: time between two looks of the supervisor.
    :param tick_age_s_max: a role whose loop did not turn for so long is replaced.
    :param purge_every_s: time between two purges of the bus.
    :param hint_every_ms: least time between two hints of one sender.
    :param directory_every_s: time between two readings or renewals of the hint directory.
    :param stop_s_max: how long a role may take to end its work when told to stop.
    """

    claim_poll_ms: int = 100
    linger_ms: int = 30
    linger_entries_min: int = 5
    range_bytes_large: int = 8 * 1024 * 1024
    range_entries_large: int = 1_024
    ranges_in_flight: int = 3
    encode_threads: int = 2
    hold_ttls_max: float = 2.0
    hold_s_min: float = 5.0
    verdicts_max: int = 16
    publish_commits_max: int = 64
    publish_attempts: int = 8
    backoff_ms: int = 50
    backoff_ms_max: int = 2_000
    failures_max: int = 5
    unavailable_s_max: float = 120.0
    supervisor_tick_ms: int = 1_000
    tick_age_s_max: float = 20.0
    purge_every_s: float = 15.0
    hint_every_ms: int = 5
    directory_every_s: float = 3.0
    stop_s_max: float = 10.0

    def __post_init__(self) -> None:
        for field in fields(self):
            least = 0 if field.name in _MAY_BE_ZERO else 1e-9
            if getattr(self, field.name) < least:
                raise ConfigurationError(f"the setting {field.name} must be greater than zero")

    def hold_s(self, ttl_s: float) -> float:
        """How long a range with this lease time may be worked on."""

        return max(self.hold_s_min, self.hold_ttls_max * ttl_s)


_MAY_BE_ZERO = frozenset(
    {"linger_ms", "linger_entries_min", "verdicts_max", "hint_every_ms", "hold_s_min"}
)
