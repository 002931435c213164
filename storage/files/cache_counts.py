"""What a cache of files has done, and how it is told on as metrics."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from lakebus.telemetry import NO_METRICS, Metrics

_COUNTERS: Final = {
    "hits": "lakebus_file_cache_hits_total",
    "fetched": "lakebus_file_cache_fetches_total",
    "bytes_fetched": "lakebus_file_cache_fetched_bytes_total",
    "evicted": "lakebus_file_cache_evictions_total",
}


@dataclass(slots=True)
class CacheCounts:
    """Since the process began. `bytes_leased` is now; it is part of `bytes_kept`."""

    hits: int = 0
    fetched: int = 0
    bytes_fetched: int = 0
    evicted: int = 0
    bytes_kept: int = 0
    bytes_leased: int = 0
    metrics: Metrics = field(default=NO_METRICS, repr=False, compare=False)
    _told: dict[str, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    def tell(self) -> None:
        """Called at the end of every use: only what has changed since goes on."""

        for name, metric in _COUNTERS.items():
            count = getattr(self, name)
            more = count - self._told.get(name, 0)
            if more:
                self._told[name] = count
                self.metrics.count(metric, more)
        if self._told.get("bytes_kept") != self.bytes_kept:
            self._told["bytes_kept"] = self.bytes_kept
            self.metrics.gauge("lakebus_file_cache_bytes", self.bytes_kept)
