"""What the HTTP layer stands on: components, made elsewhere, in one frozen container.

Composition happens in the composition root (`cluster`); a test composes its own. A server that only
answers one part of the API leaves the components of the other parts out (None).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from lakebus.errors import NotFound
from lakebus.telemetry import NO_METRICS, NO_TRACING, Metrics, Tracing
from lakebus.tokens import TokenCodec
from serve_app.direct import DirectDoor
from serve_app.direct_url import DoorPlace
from serve_app.limits import Admission
from serve_app.limits_bytes import ByteBudget
from serve_app.running import QueryDirectory, RunningQueries
from storage.bus.interface import IngestBus
from storage.bus.trace import Traces
from storage.catalog.interface import Catalog
from storage.ingesting.batches import BatchService
from storage.ingesting.deletes import DeleteService
from storage.ingesting.erasures import ErasureService
from storage.ingesting.keyring import KeyRing
from storage.ingesting.quarantine import QuarantineService
from storage.ingesting.service import IngestService
from storage.ingesting.table_service import TableService
from storage.maintenance.service import MaintenanceService
from storage.reading.changes import Changes
from storage.reading.manifest import Manifest
from storage.reading.predicates import Predicates
from storage.reading.query import QueryService
from storage.reading.resolve import Resolver

Component = TypeVar("Component")
ReadyCheck = Callable[[], Awaitable[object]]
_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """What an operator tunes of the HTTP layer. `body_bytes_max` counts after decompression."""

    body_bytes_max: int = 64 * _MIB
    inflight_bytes_max: int = 256 * _MIB
    ready_check_s: float = 2.0


class StatusSource(Protocol):
    """More for `GET /v1/admin/status`: leases, actors, replicas, jobs."""

    def __call__(self) -> Awaitable[Mapping[str, object]]: ...


@dataclass(frozen=True, slots=True)
class Dependencies:
    """`ready` are the checks of `/readyz` by name (catalog, bus, object store); `health` are those
    whose failure means that this process must be replaced (its SQL engine is gone). `running` holds
    the queries of this process; `directory` asks all processes, where there are several. `door` is
    this process's own, `query_place` where the query replicas have theirs."""

    keyring: KeyRing
    catalog: Catalog
    bus: IngestBus
    codec: TokenCodec
    resolver: Resolver
    manifest: Manifest
    limits: HttpLimits = HttpLimits()
    budget: ByteBudget = field(default_factory=lambda: ByteBudget(HttpLimits().inflight_bytes_max))
    admission: Admission = field(default_factory=Admission)
    ready: Mapping[str, ReadyCheck] = field(default_factory=dict)
    health: Mapping[str, ReadyCheck] = field(default_factory=dict)
    ingest: IngestService | None = None
    tables: TableService | None = None
    batches: BatchService | None = None
    quarantine: QuarantineService | None = None
    maintenance: MaintenanceService | None = None
    queries: QueryService | None = None
    changes: Changes | None = None
    deletes: DeleteService | None = None
    erasures: ErasureService | None = None
    predicates: Predicates | None = None
    running: RunningQueries = field(default_factory=RunningQueries)
    directory: QueryDirectory | None = None
    status: StatusSource | None = None
    traces: Traces | None = None
    door: DirectDoor | None = None
    query_place: DoorPlace | None = None
    metrics: Metrics = NO_METRICS
    tracing: Tracing = NO_TRACING


def present(component: Component | None) -> Component:
    """The component, on a server that has it. Raises NotFound on one that was made without."""

    if component is None:
        raise NotFound("this server does not answer this part of the API")
    return component
