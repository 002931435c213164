"""The validator (contract E6): whether what the lake promises is true, asked in production.

What is authoritative: the catalog says what there should be; objects and rows are compared with it.
The validator changes nothing and holds no lock. Beside ingest and maintenance it raises no false
alarm, because each finding rests on one of three grounds:

* One consistent view of the database: rows of the catalog against each other (line of snapshots,
  ranges, watermarks, counts, references, tags, pins).
* A reference that is still there after its object was missed: collection takes the reference away
  before it deletes an object, so who misses an object looks at the reference once more.
* Facts that never change: the bytes of a published file, and which ranges a snapshot published.

It reports; it never repairs (`storage.maintenance.repair` does, when asked for a named finding).
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lakebus.errors import ConfigurationError, MalformedRequest
from storage.maintenance.checks.bus import check_marker, check_payloads
from storage.maintenance.checks.places import PlaceTable
from storage.maintenance.checks.references import check_objects, check_references
from storage.maintenance.checks.sampling import SampleBudget, Sampler, first_start
from storage.maintenance.checks.snapshots import check_line
from storage.maintenance.checks.strays import check_strays
from storage.maintenance.findings import Findings
from storage.maintenance.inspection import Inspection
from storage.maintenance.jobs import Job, JobContext

_NOTE_EVERY_S = 5.0
_FINDINGS_MAX = 100
#: Memory for sorting the places of rows; beyond it they spill.
_PLACES_BYTES = 128 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class ValidationParameters:
    """Parameters of a job: `full` (contents of every file; else a sample of `files`, by default the
    setting), `bytes_max` and `seconds_max` (of reading contents), `objects` (false: nothing is
    asked of the object store, neither are contents read), `findings_max` (kept of each code)."""

    full: bool = False
    files: int | None = None
    bytes_max: int | None = None
    seconds_max: float | None = None
    objects: bool = True
    findings_max: int = _FINDINGS_MAX

    @classmethod
    def of(cls, parameters: Mapping[str, Any]) -> ValidationParameters:
        """Raises MalformedRequest."""

        kinds: dict[str, tuple[type, ...]] = {
            "full": (bool,),
            "files": (int,),
            "bytes_max": (int,),
            "seconds_max": (int, float),
            "objects": (bool,),
            "findings_max": (int,),
        }
        for name, value in parameters.items():
            allowed = kinds.get(name)
            if allowed is None:
                raise MalformedRequest(
                    f"validate has no parameter {name}: use {', '.join(sorted(kinds))}"
                )
            fits = isinstance(value, allowed) and (bool in allowed or not isinstance(value, bool))
            if not fits or (not isinstance(value, bool) and value < 0):
                raise MalformedRequest(
                    f"the parameter {name} must be "
                    + ("true or false" if bool in allowed else "a number, zero or more")
                )
        return cls(**parameters)


async def validate(context: JobContext, job: Job) -> Mapping[str, Any]:
    """The body of a `validate` job. Findings are its report and not a failure of it. A dry run is
    the same: nothing is ever changed. Raises MalformedRequest, Unavailable, LeaseLost."""

    inspection = context.inspection
    if inspection is None:
        raise ConfigurationError("this worker was made without an inspection of the catalog")
    wanted = ValidationParameters.of(job.parameters)
    began_s = context.clock.monotonic_s()
    findings = Findings(limit=wanted.findings_max)
    report: dict[str, Any] = {}

    async def note(stage: str) -> None:
        report["seconds"] = round(context.clock.monotonic_s() - began_s, 3)
        await context.note({"stage": stage, **report, **findings.report()})

    await note("catalog")
    report |= await check_catalog(inspection, findings, table_id=job.table_id)
    await note("bus")
    report["payloads"] = await check_payloads(
        inspection, context.store, findings, contents=wanted.objects
    )
    if wanted.objects:
        await check_marker(inspection, context.store, findings)
        await note("objects")
        report["objects"] = await check_objects(
            inspection, context.store, findings, table_id=job.table_id
        )
        report["listed"] = await check_strays(inspection, context.store, findings)
        await note("contents")
        report["sample"] = await _check_contents(
            context, inspection, job, wanted, findings, note=note
        )
    report["seconds"] = round(context.clock.monotonic_s() - began_s, 3)
    told = findings.report()
    context.metrics.count("lakebus_validations_total")
    for severity in ("errors", "warnings", "infos"):
        if told[severity]:
            context.metrics.count(
                "lakebus_validation_findings_total",
                told[severity],
                severity=severity.removesuffix("s"),
            )
    return {**report, **told}


async def check_catalog(
    inspection: Inspection, findings: Findings, *, table_id: int | None = None
) -> dict[str, int]:
    """What one consistent view of the database tells by itself; answers how much was looked at."""

    async with inspection.look() as view:
        head = await view.head()
        counts = await check_line(view, head, findings)
        counts["files"] = await check_references(view, head, findings, table_id=table_id)
    return counts


async def _check_contents(
    context: JobContext,
    inspection: Inspection,
    job: Job,
    wanted: ValidationParameters,
    findings: Findings,
    *,
    note: Any,
) -> dict[str, Any]:
    start = uuid.UUID(int=0)
    files = None
    if not wanted.full:
        start = await inspection.sampled_until() or first_start(job.job_id)
        files = context.settings.sample_files if wanted.files is None else wanted.files
    places = PlaceTable(
        context.temp_dir,
        memory_bytes=_PLACES_BYTES,
        threads=context.settings.rewrite_threads,
    )
    sampler = Sampler(
        inspection=inspection,
        catalog=context.catalog,
        store=context.store,
        clock=context.clock,
        temp_dir=context.temp_dir,
        places=places,
        findings=findings,
    )
    noted_s = context.clock.monotonic_s()
    told: dict[str, Any] = {}
    try:
        budget = SampleBudget(files, wanted.bytes_max, wanted.seconds_max)
        async for sample in sampler.run(start, budget, table_id=job.table_id):
            told = sample.to_json()
            if context.clock.monotonic_s() - noted_s >= _NOTE_EVERY_S:
                noted_s = context.clock.monotonic_s()
                await note("contents")
    finally:
        places.close()
    if wanted.full:
        told["next"] = None  # the rotation of the samples stays where it was
    return told
