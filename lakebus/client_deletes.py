"""Deletes by the client (contract E7). Needs the scopes `ingest` and `query` on the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from lakebus.client_calls import Calls
from lakebus.client_forms import (
    JSON,
    deleted_of,
    document_of,
    json_text,
    milliseconds,
    write_headers,
)
from lakebus.client_results import After, Deleted, tokens_of


class Deletes(Calls):
    """The part of `Client` that deletes rows."""

    def delete(
        self,
        table: str,
        where: str,
        parameters: Sequence[Any] | Mapping[str, Any] | None = None,
        *,
        after: After = None,
        key: str | None = None,
        dry_run: bool = False,
        timeout_s: float | None = None,
    ) -> Deleted:
        """Deletes the rows for which `where` is true, of one snapshot that covers `after`.

        Waits for the end; when the time is up before it, `done` is False and the delete goes on:
        ask `deletion` about it. `dry_run` counts and deletes nothing. Raises SqlError,
        StatementNotAllowed, TableNotFound, IdempotencyConflict, VisibilityTimeout.
        """

        budget_s = self._timeout_s if timeout_s is None else timeout_s
        document: dict[str, Any] = {
            "where": where,
            "parameters": parameters,
            "timeout_ms": milliseconds(budget_s),
            "dry_run": dry_run,
        }
        if after is not None:
            document["min_visibility_token"] = tokens_of(after)
        answer = self._call(
            "POST",
            f"/v1/tables/{quote(table, safe='')}/delete",
            body=json_text({name: v for name, v in document.items() if v is not None}),
            headers={"content-type": JSON, **write_headers(key)},
            timeout_s=budget_s,
        )
        return deleted_of(document_of(answer))

    def deletion(self, table: str, job_id: str, *, wait_s: float = 0.0) -> Deleted:
        """What became of a delete; waits up to `wait_s` for its end. Raises JobNotFound, and the
        error of a delete that failed."""

        path = f"/v1/tables/{quote(table, safe='')}/deletes/{quote(job_id, safe='')}"
        return deleted_of(self._read("GET", path, {"timeout_ms": str(round(wait_s * 1000))}))
