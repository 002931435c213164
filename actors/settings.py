"""What an operator tunes about the roles, in frozen objects that they take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from lakebus.errors import ConfigurationError
from storage.maintenance.jobs import JobKind


@dataclass(frozen=True, slots=True)
class RoleSettings:
    """Times are by the local monotonic clock; what decides anything is timed by the database.

    :param claim_poll_ms: how long a coordinator waits for a hint before it looks by itself.
    :param linger_ms: least time between two rounds of claims, and between two publishes, under
        load, so that files grow; never waited after idle.
    :param linger_ms_load: the longest such time between rounds of claims that load makes: it grows
        with the processor time of a round and with the rate of entries (`actors.pacing`); at most
        `linger_ms`: it does not grow.
    :param linger_ms_max: the longest such time, when compaction does not keep up (`actors.brake`);
        at most `linger_ms`: never longer.
    :param linger_entries_min: fewer entries than this begun within a linger are no load.
    :param range_bytes_large, range_entries_large: a range of this size makes a large file anyway,
        so the next claim does not linger.
    :param ranges_in_flight: ranges one coordinator reads and writes at a time; besides these, one
        a shard may wait to be published.
    :param encode_threads: threads that write Parquet in one coordinator.
    :param hold_ttls_max, hold_s_min: how many lease times, and at least how long, a range may be
        worked on before the worker is taken to be stuck, stops renewing and ends its process.
    :param partitions_per_range_max: a range with more partitions of a table than this becomes one
        file that mixes them, which compaction cuts later.
    :param intent_ttl_s: how long the write intents protect the further files of a range.
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
    linger_ms_load: int = 150
    linger_ms_max: int = 2_000
    linger_entries_min: int = 5
    range_bytes_large: int = 8 * 1024 * 1024
    range_entries_large: int = 1_024
    ranges_in_flight: int = 3
    encode_threads: int = 2
    hold_ttls_max: float = 2.0
    hold_s_min: float = 5.0
    partitions_per_range_max: int = 16
    intent_ttl_s: float = 3_600.0
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


@dataclass(frozen=True, slots=True)
class MaintainerSettings:
    """When which jobs run. Leases are by the database's clock, pauses by the local one.

    :param enabled: submit the periodic jobs; jobs that somebody asked for run in any case.
    :param tick_ms: time between two looks at what is due and what is there to run.
    :param jobs_at_once: jobs that one maintainer has running: so many that rewrite files, and so
        many of the others.
    :param lease_ttl_s: how long a job stays with a worker that does not renew.
    :param attempts_max: tries of one job.
    :param backoff_s, backoff_s_max: pause after a failed try, doubling.
    :param job_s_max: a job that takes longer is ended and tried again.
    :param jobs_keep_s: how long the record of an ended job without a key is kept.
    """

    enabled: bool = True
    tick_ms: int = 1_000
    compact_every_s: float = 10.0
    retain_every_s: float = 600.0
    collect_every_s: float = 600.0
    validate_every_s: float = 86_400.0
    jobs_at_once: int = 1
    lease_ttl_s: float = 60.0
    attempts_max: int = 10
    backoff_s: float = 1.0
    backoff_s_max: float = 60.0
    job_s_max: float = 6 * 3_600.0
    jobs_keep_s: float = 30 * 86_400.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name != "enabled" and getattr(self, field.name) <= 0:
                raise ConfigurationError(f"the setting {field.name} must be greater than zero")

    def periods(self) -> Mapping[JobKind, float]:
        """How often the jobs run that look at everything, however little there is to do."""

        return {
            JobKind.RETAIN: self.retain_every_s,
            JobKind.COLLECT: self.collect_every_s,
            JobKind.VALIDATE: self.validate_every_s,
        }


_MAY_BE_ZERO = frozenset(
    {
        "linger_ms",
        "linger_ms_load",
        "linger_ms_max",
        "linger_entries_min",
        "verdicts_max",
        "hint_every_ms",
        "hold_s_min",
    }
)
