"""Erasures by the client. Needs the scopes `admin` and `query` on the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol
from urllib.parse import quote

from lakebus.client_forms import (
    JSON,
    document_of,
    erased_of,
    json_text,
    milliseconds,
    write_headers,
)
from lakebus.client_http import Exchange
from lakebus.client_results import Erased


class _Calls(Protocol):
    """What `Client` has."""

    _timeout_s: float

    def _call(
        self,
        method: str,
        path: str,
        *,
        body: bytes = b"",
        headers: Mapping[str, str],
        timeout_s: float | None = None,
    ) -> Exchange: ...

    def _read(
        self, method: str, path: str, query: Mapping[str, str] | None = None
    ) -> dict[str, Any]: ...


class Erasures:
    """The part of `Client` that erases rows for good."""

    def erase(
        self: _Calls,
        table: str,
        where: str,
        parameters: Sequence[Any] | Mapping[str, Any] | None = None,
        *,
        key: str | None = None,
        dry_run: bool = False,
        timeout_s: float | None = None,
    ) -> Erased:
        """Erases the rows for which `where` is true and that were accepted before: from every
        snapshot, the bus and quarantine. They cannot be brought back.

        Waits for the end; when the time is up before it, `done` is False and it goes on: ask
        `erasure` about it. `dry_run` counts and erases nothing. Raises as `delete`.
        """

        budget_s = self._timeout_s if timeout_s is None else timeout_s
        document: dict[str, Any] = {
            "where": where,
            "parameters": parameters,
            "timeout_ms": milliseconds(budget_s),
            "dry_run": dry_run,
        }
        answer = self._call(
            "POST",
            f"/v1/tables/{quote(table, safe='')}/erase",
            body=json_text({name: v for name, v in document.items() if v is not None}),
            headers={"content-type": JSON, **write_headers(key)},
            timeout_s=budget_s,
        )
        return erased_of(document_of(answer))

    def erasure(self: _Calls, table: str, job_id: str, *, wait_s: float = 0.0) -> Erased:
        """What became of an erasure; waits up to `wait_s` for its end. Raises JobNotFound, and the
        error of an erasure that failed."""

        query = {"timeout_ms": str(round(wait_s * 1000))}
        path = f"/v1/tables/{quote(table, safe='')}/erasures/{quote(job_id, safe='')}"
        return erased_of(self._read("GET", path, query))
