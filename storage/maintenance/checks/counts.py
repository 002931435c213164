"""Rows of snapshots: their summary against their files, and against what the bus accepted."""

from __future__ import annotations

from storage.maintenance.findings import Findings
from storage.maintenance.inspection import AddedFiles, InspectedSnapshot, View

_BATCH = 1_000
_NOTHING = AddedFiles(0, 0, 0)


class CountCheck:
    """Gathers snapshots that added rows, and judges them by batches."""

    def __init__(self, view: View, findings: Findings) -> None:
        self._view = view
        self._findings = findings
        self._waiting: list[InspectedSnapshot] = []

    async def look_at(self, snapshot: InspectedSnapshot) -> None:
        # Files that only an expired snapshot needed may be gone, and the sum with them.
        if snapshot.retained:
            self._waiting.append(snapshot)
            if len(self._waiting) >= _BATCH:
                await self.finish()

    async def finish(self) -> None:
        snapshots, self._waiting = self._waiting, []
        if not snapshots:
            return
        await self._against_files(snapshots)
        await self._against_bus([s for s in snapshots if s.operation == "append"])

    async def _against_files(self, snapshots: list[InspectedSnapshot]) -> None:
        added = await self._view.added([s.snapshot_id for s in snapshots])
        found: dict[int, dict[int, AddedFiles]] = {}
        for (snapshot_id, table_id), files in added.items():
            found.setdefault(snapshot_id, {})[table_id] = files
        for snapshot in snapshots:
            told = _told(snapshot)
            mine = found.get(snapshot.snapshot_id, {})
            for table_id in sorted(told.keys() | mine.keys()):
                wanted, got = told.get(table_id, _NOTHING), mine.get(table_id, _NOTHING)
                if wanted != got:
                    self._findings.add(
                        "count_differs",
                        f"snapshot {snapshot.snapshot_id}",
                        f"it added {_words(wanted)} to table {table_id} by its summary, and"
                        f" {_words(got)} by its files",
                    )

    async def _against_bus(self, snapshots: list[InspectedSnapshot]) -> None:
        accepted = await self._view.accepted([s.snapshot_id for s in snapshots])
        for snapshot in snapshots:
            known = accepted.get(snapshot.snapshot_id)
            if known is None or known.logged != known.positions:
                continue  # the log was trimmed
            told = sum(files.rows for files in _told(snapshot).values())
            if told != known.rows:
                self._findings.add(
                    "count_differs",
                    f"snapshot {snapshot.snapshot_id}",
                    f"it added {told} rows by its summary, and the bus accepted {known.rows} at"
                    " its positions",
                )


def _told(snapshot: InspectedSnapshot) -> dict[int, AddedFiles]:
    """By table id, where anything was added."""

    found = {}
    for table_id, summary in snapshot.tables.items():
        files = AddedFiles(
            int(summary.get("files_added", 0)),
            int(summary.get("rows_added", 0)),
            int(summary.get("bytes_added", 0)),
        )
        if files != _NOTHING:
            found[int(table_id)] = files
    return found


def _words(files: AddedFiles) -> str:
    return f"{files.files} files with {files.rows} rows and {files.size_bytes} bytes"
