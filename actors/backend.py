"""What roles run on, and how a process of its own comes by it.

The composition root (`cluster/`) is the only place that names a backend, and this package may not
import it. So a role process is told the import path of a factory, `module:function`, and the path
of a settings file; the factory reads that file. No secret is ever an argument.
"""

from __future__ import annotations

import importlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from actors.hints import HintDirectory
from actors.settings import MaintainerSettings, RoleSettings
from lakebus.errors import ConfigurationError
from lakebus.telemetry import NO_TRACING, Tracing
from storage.bus.interface import IngestBus
from storage.catalog.interface import Catalog
from storage.engine.settings import EngineSettings
from storage.files.objects import ObjectStore
from storage.maintenance.erasing import Erasing
from storage.maintenance.inspection import Inspection
from storage.maintenance.interface import Upkeep
from storage.maintenance.jobs import JobStore
from storage.maintenance.settings import MaintenanceSettings


async def _nothing() -> None:
    return


@dataclass(frozen=True, slots=True)
class Backend:
    """One process's view of the lake. `stack` names it in hints; `hint_host` is the address that
    other processes of the stack reach this one at. Maintenance needs `upkeep`, `jobs`, `engine`
    (the temporary folder in it is replaced by the job's) and `jobs_dir`, where jobs have their
    folders; the validator also `inspection`. Without `jobs` there is none."""

    bus: IngestBus
    catalog: Catalog
    store: ObjectStore
    hints: HintDirectory
    stack: str
    settings: RoleSettings
    hint_host: str = "127.0.0.1"
    tracing: Tracing = NO_TRACING
    upkeep: Upkeep | None = None
    inspection: Inspection | None = None
    erasing: Erasing | None = None
    jobs: JobStore | None = None
    engine: EngineSettings | None = None
    jobs_dir: Path | None = None
    maintainer: MaintainerSettings = field(default_factory=MaintainerSettings)
    maintenance: MaintenanceSettings = field(default_factory=MaintenanceSettings)
    close: Callable[[], Awaitable[None]] = _nothing


#: Opens the backend described by a settings file. Raises Unavailable, StartRefused,
#: ConfigurationError.
BackendFactory = Callable[[str], Awaitable[Backend]]


def load_factory(path: str) -> BackendFactory:
    """The factory at `module:function`. Raises ConfigurationError when it cannot be imported."""

    module, _, name = path.partition(":")
    try:
        return cast(BackendFactory, getattr(importlib.import_module(module), name))
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(
            f"the backend factory {path!r} cannot be imported ({error}); give module:function"
        ) from error
