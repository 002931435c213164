"""Metrics on their way to Ray."""

from __future__ import annotations

import pytest

from actors.ray_metrics import RayMetrics


def test_a_metric_that_is_none_is_refused_again_and_again() -> None:
    metrics = RayMetrics()
    metrics.count("lakebus_http_requests_total", status="200", route="/")
    metrics.count("lakebus_http_requests_total", route="/", status="200")
    ((key, amount),) = metrics._counts.items()
    assert (key[1], amount) == ((("route", "/"), ("status", "200")), 2.0)
    for _ in range(2):
        with pytest.raises(ValueError, match="not in METRICS"):
            metrics.count("lakebus_http_requests_total", route="/")
        with pytest.raises(ValueError, match="not in METRICS"):
            metrics.observe("lakebus_http_requests_total", 1.0, route="/", status="200")
