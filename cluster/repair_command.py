"""`lakebus repair`: repairs findings of the validator that are named, after asking (contract E6).

Works on the external database, on the embedded one of a running stack, or on the embedded one that
is started for the command. It needs the database's DSN, which is more than any API key gives.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from cluster import components
from cluster.history_command import database_of
from lakebus.settings import Settings
from storage.files.objects import OpenedStore
from storage.maintenance.findings import KINDS
from storage.postgres.lake import PostgresLake

_BY = "operator"


@dataclass(slots=True)
class RepairReport:
    """`plans` and, of those that were made, `done`, by finding. `found`: without names, what the
    last validation reported."""

    plans: list[dict[str, Any]] = field(default_factory=list)
    done: dict[str, str] = field(default_factory=dict)
    found: list[dict[str, Any]] | None = None

    @property
    def exit_code(self) -> int:
        """1 when something that was named could not be repaired, or was not agreed to."""

        return 0 if all(plan["finding"] in self.done for plan in self.plans) else 1

    def to_json(self) -> dict[str, Any]:
        if self.found is not None:
            return {"findings": self.found}
        return {"plans": self.plans, "done": self.done}


async def run(
    settings: Settings,
    names: Sequence[str],
    *,
    copies: Path | None,
    agreed: Callable[[list[dict[str, Any]]], bool],
) -> RepairReport:
    """Plans all, asks once, and makes those that change anything. Raises MalformedRequest before
    anything is planned, Unavailable."""

    # DuckDB and Arrow, which no other command waits for.
    from storage.maintenance.repair import FindingName, Repairer

    findings = [FindingName.parse(name) for name in names]
    store = components.object_store(settings)
    report = RepairReport()
    async with database_of(settings) as dsn, _lake(dsn, settings, store) as lake:
        if not findings:
            report.found = _of_last(await lake.inspection.last_report())
            return report
        with tempfile.TemporaryDirectory(prefix="lakebus-repair-") as folder:
            repairer = Repairer(
                inspection=lake.inspection,
                repairs=lake.repairs,
                catalog=lake.catalog,
                upkeep=lake.upkeep,
                store=store,
                temp_dir=Path(folder),
                by=_BY,
                copies=copies,
            )
            plans = [await repairer.plan(finding) for finding in findings]
            report.plans = [plan.to_json() for plan in plans]
            if any(plan.changes for plan in plans) and agreed(report.plans):
                for plan in plans:
                    if plan.apply is not None:
                        report.done[str(plan.finding)] = await plan.apply()
    return report


@asynccontextmanager
async def _lake(dsn: str, settings: Settings, store: OpenedStore) -> AsyncIterator[PostgresLake]:
    lake = await PostgresLake.open(
        dsn, bus_settings=components.bus_settings(settings), object_store=store
    )
    try:
        yield lake
    finally:
        await lake.close()
        store.close()


def _of_last(report: Any) -> list[dict[str, Any]]:
    found = [] if report is None else report.get("findings", [])
    return [
        {
            "finding": f"{one['code']}:{one['subject'].rpartition(' ')[2]}",
            "repairable": one["code"] in KINDS and KINDS[one["code"]].repairable,
            **one,
        }
        for one in found
    ]


def lines(report: RepairReport) -> list[str]:
    """For people: what was found, or what was done."""

    if report.found is not None:
        if not report.found:
            return ["The last validation found nothing (or there was none: lakebus maintain)."]
        return [
            f"{one['finding']}  {'can be repaired' if one['repairable'] else one['hint']}"
            for one in report.found
        ]
    return [f"{finding}: {words}" for finding, words in report.done.items()]


def plan_lines(plans: Sequence[dict[str, Any]]) -> list[str]:
    told = []
    for plan in plans:
        told.append(f"{plan['finding']}:")
        told += [f"  would {change}" for change in plan["changes"]] or [f"  {plan['reason']}"]
    return told


@click.command()
@click.argument("findings", nargs=-1, metavar="[FINDING]...")
@click.option(
    "--from",
    "copies",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder with copies of lost objects.",
)
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--json", "as_json", is_flag=True, help="For programs; only --yes changes anything.")
def repair(
    findings: tuple[str, ...],
    copies: Path | None,
    yes: bool,
    as_json: bool,
    data_dir: Path | None,
    profile: str | None,
    config: Path | None,
) -> int:
    """Repair findings of the validator, by name (CODE:NAME), after asking.

    Without a name it lists what the last validation found. Exit code 1: something that was named
    was not repaired.
    """

    def agreed(plans: list[dict[str, Any]]) -> bool:
        if not as_json:
            click.echo("\n".join(plan_lines(plans)))
        return yes or (not as_json and click.confirm("Do it?", default=False))

    settings = Settings.load(
        environ=os.environ, config=config, flags={"data_dir": data_dir, "profile": profile}
    )
    report = asyncio.run(run(settings, findings, copies=copies, agreed=agreed))
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=1))
    else:
        if report.plans and not any(plan["changes"] for plan in report.plans):
            click.echo("\n".join(plan_lines(report.plans)))
        click.echo("\n".join(lines(report)))
    return report.exit_code
