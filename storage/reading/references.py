"""From everything that a statement refers to, to the sources of one scan.

Besides the rows of tables at the query's snapshot a statement may read the columns of tables
(DESCRIBE), lists of tables (SHOW TABLES, `information_schema`), and rows at other snapshots (AT).
All of it is made from views of snapshots and from what the caller may see of them, so a list names
what a SELECT would find, and nothing else (contract D1, D10).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from storage.engine.plans import (
    LISTINGS,
    SHAPES,
    Parameters,
    ParsedStatement,
    SourceTable,
    rows_at,
    side_name,
)
from storage.reading.listings import Listings, shape_source
from storage.reading.manifest import SnapshotView
from storage.reading.planning import Planner, ScanPlan, Visible, find_table


def plan_statement(
    planner: Planner,
    listings: Listings,
    parsed: ParsedStatement,
    parameters: Parameters,
    views: Sequence[SnapshotView],
    *,
    visible: Visible,
    ordered: bool,
    pruning: bool,
) -> ScanPlan:
    """The sources of the whole statement. `views`: of the query's snapshot, then of each travel's.
    Raises TableNotFound, also for what the caller may not see."""

    view, *others = views

    def plan(statement: ParsedStatement, at: SnapshotView) -> ScanPlan:
        return planner.plan(
            at, statement, parameters, visible=visible, ordered=ordered, pruning=pruning
        )

    scan = plan(parsed, view)
    if not (parsed.described or parsed.listings or parsed.travels):
        return scan
    scans = [scan]
    sources = {**scan.sources, **_shapes(SHAPES, parsed.described, view, visible)}
    for number, (travel, at) in enumerate(zip(parsed.travels, others, strict=True)):
        # The planner knows plans by text: what it says of one side is not a plan of another.
        side = dataclasses.replace(
            parsed, sql=f"{parsed.sql}\0{number}", tables=travel.tables, tree=travel.tree
        )
        scans.append(plan(side, at))
        for name, source in scans[-1].sources.items():
            sources[side_name(rows_at(number), name)] = source
    if parsed.listings:
        mine = [schema for name, schema in view.schemas().items() if visible(name)]
        for listing in parsed.listings:
            sources[side_name(LISTINGS, listing)] = listings.source(listing, mine)
    return ScanPlan(
        sources,
        sum(scan.files_scanned for scan in scans),
        sum(scan.files_pruned for scan in scans),
        sum(scan.bytes_scanned for scan in scans),
        sum(scan.characters for scan in scans),
        tuple(file for scan in scans for file in scan.remote),
    )


def _shapes(
    side: str, names: Sequence[str], view: SnapshotView, visible: Visible
) -> Mapping[str, SourceTable]:
    return {
        side_name(side, name): shape_source(find_table(view, name, visible=visible))
        for name in names
    }


def erasures_of(parsed: ParsedStatement, views: Sequence[SnapshotView]) -> tuple[str, ...]:
    """The marks of what the statement read (E7); the caller may see its tables."""

    found: set[str] = set()
    for view, names in zip(
        views, (parsed.tables, *(travel.tables for travel in parsed.travels)), strict=True
    ):
        for name in names:
            schema = view.schema(name)
            if schema is not None:
                found.update(view.erasures(schema.table_id))
    return tuple(sorted(found))
