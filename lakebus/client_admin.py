"""Administration by the client: maintenance, its jobs, and tags. Needs the scope `admin`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Protocol
from urllib.parse import quote, urlencode

#: One look at a job waits so long on the server, at most.
_LOOK_S = 20.0


class _Calls(Protocol):
    """What `Client` has."""

    def _write(self, method: str, path: str, document: object) -> dict[str, Any]: ...

    def _read(
        self, method: str, path: str, query: Mapping[str, str] | None = None
    ) -> dict[str, Any]: ...


class Administration:
    """The part of `Client` for administrators."""

    def maintain(
        self: _Calls,
        kind: str,
        *,
        table: str | None = None,
        dry_run: bool = False,
        parameters: Mapping[str, Any] | None = None,
        wait_s: float = 0.0,
    ) -> dict[str, Any]:
        """Runs `compact`, `retain`, `collect` or `validate` now, and answers the job: as it is when
        it has ended, or after `wait_s`. What it did is its `report`; with `dry_run`, what it would
        do. Raises TableNotFound, Forbidden."""

        asked = {"dry_run": "true" if dry_run else "false", "timeout_ms": "0"}
        if table is not None:
            asked["table"] = table
        document = None if parameters is None else {"parameters": dict(parameters)}
        path = f"/v1/admin/maintenance/{quote(kind, safe='')}?{urlencode(asked)}"
        until_s = time.monotonic() + wait_s
        job = self._write("POST", path, document)
        while job["ended_at"] is None and (left_s := until_s - time.monotonic()) > 0:
            query = {"timeout_ms": str(max(1, round(min(left_s, _LOOK_S) * 1000)))}
            job = self._read("GET", f"/v1/admin/jobs/{job['job_id']}", query)
        return job

    def jobs(
        self: _Calls, *, kind: str | None = None, limit: int = 100, before: str | None = None
    ) -> list[dict[str, Any]]:
        """Jobs of maintenance, newest first; `before`: those older than the job of this id."""

        asked = {"kind": kind, "limit": str(limit), "before": before}
        query = urlencode({name: value for name, value in asked.items() if value is not None})
        return list(self._read("GET", f"/v1/admin/jobs?{query}")["jobs"])

    def job(self: _Calls, job_id: str) -> dict[str, Any]:
        """Raises JobNotFound."""

        return self._read("GET", f"/v1/admin/jobs/{quote(job_id, safe='')}")

    def tag(self: _Calls, name: str, snapshot_id: int | None = None) -> dict[str, Any]:
        """Keeps a snapshot (the newest, when none is given) for ever. Raises TagExists when the
        name is another one's, SnapshotExpired, SnapshotNotFound."""

        if snapshot_id is None:  # settled first, so that sending the tag twice means one snapshot
            snapshot_id = int(self._read("GET", "/v1/snapshots/latest")["snapshot_id"])
        document = {"name": name, "snapshot_id": snapshot_id}
        return self._write("POST", "/v1/admin/tags", document)

    def tags(self: _Calls) -> list[dict[str, Any]]:
        return list(self._read("GET", "/v1/admin/tags")["tags"])

    def drop_tag(self: _Calls, name: str) -> dict[str, Any]:
        """Raises NotFound; also when a reply was lost and the tag had been dropped."""

        return self._write("DELETE", f"/v1/admin/tags/{quote(name, safe='')}", None)
