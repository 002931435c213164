"""The two Ray Serve applications: `api` at `/` and `query` at `/v1/query`. All of Serve is here.

A replica is told two things: the dotted path of a factory (the composition root may not be imported
from here) and the path of a settings file. It opens its components on the loop that serves, in the
lifespan of the ASGI application, and closes them at its end. Secrets are never arguments: Serve
keeps arguments and shows them.

`/v1/queries` cannot share the prefix `/v1/query` (Serve's prefixes end at a slash), and no single
replica knows what runs on the others, so it is served by `api`, which asks all query replicas by a
broadcast.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol, cast

from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.exceptions import RayServeException

from actors.ray_metrics import RayMetrics
from lakebus.client_ray_calls import API, QUERY, QUERY_PATH
from lakebus.errors import ConfigurationError, LakebusError, Unavailable
from lakebus.settings_table import HttpSettings
from lakebus.telemetry import Metrics
from serve_app.app import create_api_app, create_query_app
from serve_app.collector import calm_collector
from serve_app.dependencies import Dependencies
from serve_app.handle_calls import answer_call
from serve_app.progress import ProgressLimits, StandsStill, assert_progress
from serve_app.replica_load import count_in
from serve_app.replica_ports import keep_replica_ports_on_loopback, replica
from serve_app.replica_stops import when_stopping
from serve_app.routing import HttpApplication
from storage.reading.changes import ChangesPage, ChangesRequest
from storage.reading.predicates import PredicateRequest

QUERY_PREFIX = QUERY_PATH

#: User code and router on the replica's main loop: measured 1.1 to 1.5 times the requests. Not
#: needed where all of Ray's processes have these in their environment already.
MAIN_LOOP_ENV: Mapping[str, str] = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}

_RETRY_AFTER_S = 1.0
_HEALTH_PERIOD_S = 5.0
_HEALTH_TIMEOUT_S = 15.0
_SHUTDOWN_MARGIN_S = 5.0
_BROADCAST_S = 5.0
#: Queries that a replica may have going before another one is started.
_QUERIES_TARGET = 4
#: With fewer, a second query replica takes from the first what it needs.
_PROCESSORS_FOR_TWO = 4
_UPSCALE_DELAY_S, _DOWNSCALE_DELAY_S = 5.0, 120.0


class Factory(Protocol):
    """Opens the components described by a settings file, on the running loop."""

    def __call__(
        self, path: str, *, metrics: Metrics
    ) -> AbstractAsyncContextManager[Dependencies]: ...


def load_factory(path: str) -> Factory:
    """The factory at `module:function`. Raises ConfigurationError when it cannot be imported."""

    module, _, name = path.partition(":")
    try:
        return cast(Factory, getattr(importlib.import_module(module), name))
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(
            f"the factory {path!r} cannot be imported ({error}); give module:function"
        ) from error


class _Replica:
    """What both deployments share: one application, and the health of its process."""

    make: Callable[..., HttpApplication]

    def __init__(self, factory: str, settings_path: str) -> None:
        keep_replica_ports_on_loopback()
        when_stopping(self._stopping)
        self._factory = factory
        self._settings_path = settings_path
        self._limits = ProgressLimits()
        self._application: HttpApplication | None = None

    def __serve_build_asgi_app__(self) -> HttpApplication:
        self._application = type(self).make(self._opened)
        self._application.ids_echoed = True
        return self._application

    async def check_health(self) -> None:
        """Raises StandsStill when Serve should replace this replica."""

        dependencies = self._dependencies()
        if dependencies is not None:
            await assert_progress(dependencies, self._limits)
            ended = None if dependencies.door is None else dependencies.door.ended()
            if ended is not None:
                raise StandsStill(ended)

    async def answer_call(self, head: Any, body: Any) -> AsyncIterator[Any]:
        """A call of a job inside the cluster, as `lakebus.client_ray_calls` describes it."""

        async with contextlib.aclosing(answer_call(self._application, head, body)) as items:
            async for item in items:
                yield item

    @asynccontextmanager
    async def _opened(self) -> AsyncIterator[Dependencies]:
        metrics = RayMetrics()
        flushing = asyncio.create_task(metrics.keep_flushing())
        try:
            async with load_factory(self._factory)(self._settings_path, metrics=metrics) as opened:
                calm_collector()
                yield self._adapted(opened)
        finally:
            flushing.cancel()
            await asyncio.wait((flushing,))

    def _adapted(self, opened: Dependencies) -> Dependencies:
        return opened

    def _stopping(self) -> None:
        dependencies = self._dependencies()
        if dependencies is not None and dependencies.door is not None:
            dependencies.door.stopping()

    def _dependencies(self) -> Dependencies | None:
        return None if self._application is None else self._application.dependencies


class ApiReplica(_Replica):
    """Everything but SQL."""

    make = staticmethod(create_api_app)

    def _adapted(self, opened: Dependencies) -> Dependencies:
        return dataclasses.replace(
            opened,
            directory=ReplicaQueries(),
            changes=ReplicaChanges(),
            predicates=ReplicaPredicates(),
        )


class QueryReplica(_Replica):
    """SQL. Its own queries are asked for by `running` and `cancel`, which `api` calls."""

    make = staticmethod(create_query_app)

    def __init__(self, factory: str, settings_path: str) -> None:
        super().__init__(factory, settings_path)
        # They are scaled by what they have going.
        count_in(replica.ReplicaMetricsManager, self._at_the_door)

    def _at_the_door(self) -> int:
        dependencies = self._dependencies()
        return 0 if dependencies is None or dependencies.door is None else dependencies.door.working

    async def running(self, principal_id: int) -> list[dict[str, object]]:
        dependencies = self._dependencies()
        return [] if dependencies is None else await dependencies.running.running(principal_id)

    async def cancel(self, principal_id: int, query_id: str) -> bool:
        dependencies = self._dependencies()
        if dependencies is None:
            return False
        return await dependencies.running.cancel(principal_id, query_id)

    async def changes(self, request: ChangesRequest) -> ChangesPage | LakebusError:
        """A page of changes; typed errors are answers, so that they cross as they are."""

        dependencies = self._dependencies()
        if dependencies is None or dependencies.changes is None:
            return Unavailable("the query replica is starting; try again", retry_after_s=1.0)
        try:
            return await dependencies.changes.page(request)
        except LakebusError as error:
            return error

    async def check_predicate(self, request: PredicateRequest) -> LakebusError | None:
        """Judges a delete's predicate; typed errors are answers."""

        dependencies = self._dependencies()
        if dependencies is None or dependencies.predicates is None:
            return Unavailable("the query replica is starting; try again", retry_after_s=1.0)
        try:
            await dependencies.predicates.check(request)
        except LakebusError as error:
            return error
        return None


class ReplicaPredicates:
    """Asks a query replica to judge a predicate, because `api` has no SQL engine."""

    def __init__(self) -> None:
        self._handle: Any = None

    async def check(self, request: PredicateRequest) -> None:
        """Raises what the replica's check raises, and Unavailable."""

        try:
            if self._handle is None:
                self._handle = serve.get_deployment_handle(QUERY, QUERY)
            async with asyncio.timeout(request.timeout_ms / 1000 + _BROADCAST_S):
                found = await self._handle.check_predicate.remote(request)
        except (RayServeException, RayError, TimeoutError) as error:
            raise Unavailable("the query replicas do not answer; try again") from error
        if found is not None:
            raise cast(LakebusError, found)


class ReplicaChanges:
    """Asks a query replica for pages of changes, because `api` has no SQL engine."""

    def __init__(self) -> None:
        self._handle: Any = None

    async def page(self, request: ChangesRequest) -> ChangesPage:
        """Raises what the replica's reader raises, and Unavailable."""

        try:
            if self._handle is None:
                self._handle = serve.get_deployment_handle(QUERY, QUERY)
            asked = self._handle.changes.remote(request)
            try:
                async with asyncio.timeout(request.timeout_ms / 1000 + _BROADCAST_S):
                    found = await asked
            except (asyncio.CancelledError, TimeoutError):
                asked.cancel()  # the client left, or nobody waits any more: the work stops (D9)
                raise
        except (RayServeException, RayError, TimeoutError) as error:
            raise Unavailable("the query replicas do not answer; try again") from error
        if isinstance(found, LakebusError):
            raise found
        return cast(ChangesPage, found)


class ReplicaQueries:
    """The QueryDirectory that asks all query replicas."""

    def __init__(self) -> None:
        self._handle: Any = None

    async def running(self, principal_id: int) -> list[dict[str, object]]:
        return [query for found in await self._ask("running", principal_id) for query in found]

    async def cancel(self, principal_id: int, query_id: str) -> bool:
        return any(await self._ask("cancel", principal_id, query_id))

    async def _ask(self, method: str, *arguments: object) -> list[Any]:
        try:
            if self._handle is None:
                self._handle = serve.get_deployment_handle(QUERY, QUERY)
            answers = self._handle.broadcast(method, *arguments)
            return cast(list[Any], await answers.results_async(timeout_s=_BROADCAST_S))
        except (RayServeException, TimeoutError) as error:
            raise Unavailable("the query replicas do not answer; try again") from error


def build(
    http: HttpSettings,
    *,
    settings_path: str,
    api_factory: str,
    query_factory: str,
    cpus_per_replica: float = 0.0,
    env: Mapping[str, str] = MAIN_LOOP_ENV,
) -> list[serve.RunTarget]:
    """What `serve.run_many` runs.

    :param settings_path: a file that the factories read; the only thing replicas are told.
    :param api_factory: `module:function`, a `Factory` without a query service.
    :param query_factory: `module:function`, a `Factory` with one.
    :param cpus_per_replica: what Ray books for a replica; 0 on one machine, where they share.
    :param env: environment of the replicas beyond what Ray's processes have; never a secret.
    """

    actor: dict[str, Any] = {"num_cpus": cpus_per_replica}
    if env:
        actor["runtime_env"] = {"env_vars": dict(env)}
    api = _deployment(ApiReplica, API, http, actor, num_replicas=http.ingest_replicas)
    query = _deployment(QueryReplica, QUERY, http, actor, **_query_scale(http))
    return [
        serve.RunTarget(query.bind(query_factory, settings_path), QUERY, QUERY_PREFIX),
        serve.RunTarget(api.bind(api_factory, settings_path), API, "/"),
    ]


def _deployment(
    replica: type[_Replica], name: str, http: HttpSettings, actor: dict[str, Any], **scale: Any
) -> Any:
    return serve.deployment(
        name=name,
        ray_actor_options=actor,
        max_ongoing_requests=http.ongoing_requests_max,
        # Serve has no word for "no queue"; one is as near as it gets.
        max_queued_requests=max(1, http.queued_requests_max),
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=_RETRY_AFTER_S),
        health_check_period_s=_HEALTH_PERIOD_S,
        health_check_timeout_s=_HEALTH_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=http.drain_s + _SHUTDOWN_MARGIN_S,
        **scale,
    )(serve.ingress()(replica))


def _query_scale(http: HttpSettings) -> dict[str, Any]:
    low = http.query_replicas_min
    processors = len(os.sched_getaffinity(0))
    high = http.query_replicas_max or max(low, 2 if processors >= _PROCESSORS_FOR_TWO else 1)
    if low == high:
        return {"num_replicas": low}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=low,
            max_replicas=high,
            initial_replicas=low,
            target_ongoing_requests=_QUERIES_TARGET,
            upscale_delay_s=_UPSCALE_DELAY_S,
            downscale_delay_s=_DOWNSCALE_DELAY_S,
        )
    }
