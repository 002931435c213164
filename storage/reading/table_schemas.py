"""Which tables exist at a snapshot, under which names and in which shape.

Names are resolved at the snapshot, not now: a table that was dropped later is there in earlier
snapshots, one that was created later is not, and a name that was given again means the table that
bore it then (contract D1, F of the words *snapshot*).
"""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Mapping

from lakebus.schemas import TableSchema
from storage.catalog.interface import SchemaLife

_KEPT_LISTS = 64


class TableSchemas:
    """Every schema version that a retained snapshot can show."""

    def __init__(self) -> None:
        self._by_name: dict[str, dict[tuple[int, int], SchemaLife]] = {}
        self._changes: list[int] = []
        self._lists: OrderedDict[int, Mapping[str, TableSchema]] = OrderedDict()

    def put(self, life: SchemaLife) -> None:
        """Adds a schema version, or what became of one."""

        schema = life.schema
        self._by_name.setdefault(schema.name, {})[schema.table_id, schema.version] = life
        for change in (life.first_snapshot, life.last_snapshot, life.table_last_snapshot):
            if change is None:
                continue
            place = bisect.bisect_left(self._changes, change)
            if place == len(self._changes) or self._changes[place] != change:
                self._changes.insert(place, change)

    def find(self, name: str, snapshot_id: int) -> TableSchema | None:
        for life in reversed(self._by_name.get(name, {}).values()):
            if _holds(life, snapshot_id):
                return life.schema
        return None

    def first_snapshot(self, schema: TableSchema) -> int:
        """The snapshot with which this version began."""

        return self._by_name[schema.name][schema.table_id, schema.version].first_snapshot

    def version(self, schema: TableSchema, version: int) -> TableSchema | None:
        """Another version of the same table, if a retained snapshot can show it."""

        life = self._by_name[schema.name].get((schema.table_id, version))
        return None if life is None else life.schema

    def all_at(self, snapshot_id: int) -> Mapping[str, TableSchema]:
        """Every table by name, in order of names. Do not change it: it is shared."""

        epoch = bisect.bisect_right(self._changes, snapshot_id)
        found = self._lists.get(epoch)
        if found is None:
            found = {
                name: schema
                for name in sorted(self._by_name)
                if (schema := self.find(name, snapshot_id)) is not None
            }
            self._lists[epoch] = found
            if len(self._lists) > _KEPT_LISTS:
                self._lists.popitem(last=False)
        return found


def _holds(life: SchemaLife, snapshot_id: int) -> bool:
    return life.first_snapshot <= snapshot_id and all(
        last is None or snapshot_id < last
        for last in (life.last_snapshot, life.table_last_snapshot)
    )
