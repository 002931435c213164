"""Which code runs a kind of job: by name, so that who only schedules jobs imports none of it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from lakebus.errors import Fault
from storage.maintenance.jobs import JobBody, JobKind

_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class BodyPlace:
    """`memory_bytes`: what a job of this kind needs at most, on top of the settings' memory of one
    rewrite where it `rewrites`."""

    path: str
    rewrites: bool = False
    memory_bytes: int = 256 * _MIB


_PLACES: Mapping[JobKind, BodyPlace] = {
    JobKind.COMPACT: BodyPlace("storage.maintenance.compaction:compact", rewrites=True),
    JobKind.RETAIN: BodyPlace("storage.maintenance.retention:retain", rewrites=True),
    JobKind.COLLECT: BodyPlace("storage.maintenance.collection:collect"),
    JobKind.VALIDATE: BodyPlace("storage.maintenance.validation:validate"),
    JobKind.DELETE: BodyPlace("storage.maintenance.deletion:delete", rewrites=True),
    JobKind.ERASE: BodyPlace("storage.maintenance.erasure:erase", rewrites=True),
}

#: The kinds that can be run.
RUNNABLE: tuple[JobKind, ...] = tuple(_PLACES)

#: Kinds that do not wait for those of another lane. A validation of many files takes minutes, in
#: which small files would pile up and deletes would wait.
LANES: tuple[tuple[JobKind, ...], ...] = (
    tuple(kind for kind, place in _PLACES.items() if place.rewrites),
    tuple(kind for kind, place in _PLACES.items() if not place.rewrites),
)


def body_of(kind: JobKind) -> JobBody:
    """Imports the body of a kind; heavy. Raises Fault for a kind without one."""

    place = _place(kind)
    module, _, name = place.path.partition(":")
    return cast(JobBody, getattr(importlib.import_module(module), name))


def memory_bytes_of(kind: JobKind, *, rewrite_memory_bytes: int) -> int:
    """What the machine has to have free for a job of this kind."""

    place = _place(kind)
    return place.memory_bytes + (rewrite_memory_bytes if place.rewrites else 0)


def _place(kind: JobKind) -> BodyPlace:
    place = _PLACES.get(kind)
    if place is None:
        raise Fault(f"this version has no code for jobs of the kind {kind}")
    return place
