"""How Serve is told to run us, and when it is told to replace a replica. No Ray is started."""

from __future__ import annotations

import asyncio
import dataclasses
import warnings
from collections.abc import AsyncIterator
from typing import Any

import pytest

from lakebus.client_ray_calls import API, QUERY
from lakebus.errors import ConfigurationError, Unavailable
from lakebus.settings_table import HttpSettings
from lakebus.telemetry import MemoryMetrics
from serve_app.progress import ProgressLimits, StandsStill, assert_progress
from tests.unit.http_rig import Server, server

with warnings.catch_warnings():
    # Ray Serve's own modules use what pydantic has deprecated.
    warnings.simplefilter("ignore", DeprecationWarning)
    from serve_app import replica_stops
    from serve_app.deployments import build, load_factory

QUICK = ProgressLimits(answer_s=0.05, append_s=0.05)


@pytest.fixture
async def lake() -> AsyncIterator[Server]:
    async with server() as made:
        await made.create()
        yield made


def test_deployments_are_bounded_and_told_a_path_only() -> None:
    http = HttpSettings(query_replicas_min=1, query_replicas_max=3, ingest_replicas=2)
    targets = build(http, settings_path="/some/path", api_factory="a:b", query_factory="c:d")
    assert [(t.name, t.route_prefix) for t in targets] == [(QUERY, "/v1/query"), (API, "/")]
    for target, factory in zip(targets, ("c:d", "a:b"), strict=True):
        bound = target.target._bound_deployment
        assert list(bound.init_args) == [factory, "/some/path"]
        assert bound.max_ongoing_requests == http.ongoing_requests_max
        assert bound.max_queued_requests == http.queued_requests_max
        config = bound._deployment_config
        assert config.backpressure_config.status_code == 429
        assert config.graceful_shutdown_timeout_s > http.drain_s
    query, api = (target.target._bound_deployment for target in targets)
    assert api.num_replicas == 2
    scale = query._deployment_config.autoscaling_config
    assert scale is not None
    assert (scale.min_replicas, scale.max_replicas) == (1, 3)


@pytest.mark.parametrize(
    ("processors", "low", "most"), [(2, 1, 1), (3, 2, 2), (4, 1, 2), (64, 1, 2), (64, 3, 3)]
)
def test_unless_told_a_second_query_replica_needs_processors(
    monkeypatch: pytest.MonkeyPatch, processors: int, low: int, most: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(processors)))
    http = HttpSettings(query_replicas_min=low)
    query, _ = build(http, settings_path="/some/path", api_factory="a:b", query_factory="c:d")
    bound = query.target._bound_deployment
    scale = bound._deployment_config.autoscaling_config
    assert (bound.num_replicas if scale is None else scale.max_replicas) == most


def test_a_factory_that_cannot_be_imported_is_named() -> None:
    for path in ("nothing", "no_such_module:x", "serve_app.app:nothing", ""):
        with pytest.raises(ConfigurationError):
            load_factory(path)


async def test_a_replica_hears_of_its_end_before_it_drains(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert hasattr(replica_stops.replica.Replica, replica_stops._METHOD)  # this version has it
    said = []

    class Replica:
        async def _perform_graceful_shutdown(self) -> None:
            said.append("drained")

    monkeypatch.setattr(replica_stops.replica, "Replica", Replica)
    replica_stops.when_stopping(lambda: said.append("told"))
    await Replica()._perform_graceful_shutdown()
    assert said == ["told", "drained"]


# --- progress ------------------------------------------------------------------------------------


async def test_a_replica_whose_database_is_away_is_well(lake: Server) -> None:
    assert lake.app.dependencies is not None
    await assert_progress(lake.app.dependencies, QUICK)
    lake.lake.faults.unreachable = True
    await assert_progress(lake.app.dependencies, QUICK)


async def test_a_replica_that_stands_still_is_ill(
    lake: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = lake.app.dependencies
    assert app is not None

    async def silent(*_: object) -> Any:
        await asyncio.Event().wait()

    async def gone() -> None:
        raise Unavailable("the child is gone")

    for check in (silent, gone):
        with pytest.raises(StandsStill, match="engine"):
            await assert_progress(dataclasses.replace(app, health={"engine": check}), QUICK)
    monkeypatch.setattr(lake.bus, "append", silent)
    sending = asyncio.create_task(lake.send([{"id": 1}], query="?timeout_ms=5000"))
    await asyncio.sleep(0.1)
    with pytest.raises(StandsStill, match="append"):
        await assert_progress(app, QUICK)
    sending.cancel()
    await asyncio.wait((sending,))
    await assert_progress(app, QUICK)
    monkeypatch.setattr(lake.catalog, "head", silent)
    with pytest.raises(StandsStill, match="catalog"):
        await assert_progress(app, QUICK)


async def test_requests_are_counted_by_route_and_status(lake: Server) -> None:
    assert lake.app.dependencies is not None
    metrics = MemoryMetrics()
    lake.app.dependencies = dataclasses.replace(lake.app.dependencies, metrics=metrics)
    await lake.send([{"id": 1}, {"id": 2}], key="k")
    await lake.send([{"id": 1}, {"id": 2}], key="k")
    await lake.send([{"id": "x"}])
    await lake.get("/v1/nothing")
    route = "/v1/tables/{table}/rows"
    name = "lakebus_http_requests_total"
    assert metrics.value(name, route=route, status="202") == 2
    assert metrics.value(name, route=route, status="422") == 1
    assert metrics.value(name, route="none", status="404") == 1
    assert metrics.value("lakebus_accepted_rows_total") == 2
    assert len(metrics.observations("lakebus_http_seconds", route=route)) == 3
