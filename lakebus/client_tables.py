"""Tables by the client: made, changed, looked at, dropped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal
from urllib.parse import quote

from lakebus.client_calls import Calls
from lakebus.client_forms import change_document, retention_document


class Tables(Calls):
    """The part of `Client` for tables."""

    def create_table(
        self,
        name: str,
        columns: Mapping[str, str] | Sequence[Mapping[str, Any]],
        *,
        partition_by: Sequence[str] = (),
        sort_by: Sequence[str] = (),
        keep_rows: tuple[str, str] | None = None,
        if_not_exists: bool = False,
    ) -> dict[str, Any]:
        """`columns`: name → type, or objects as in the HTTP API. `partition_by`: like `day(ts)`,
        `bucket(16, id)`; `sort_by`: columns, or `zorder(a, b)`; `keep_rows`: a time column and how
        long, like `("ts", "90 days")`. Raises TableExists, SchemaInvalid."""

        if isinstance(columns, Mapping):
            columns = [{"name": column, "type": kind} for column, kind in columns.items()]
        document = {
            "name": name,
            "columns": list(columns),
            "partition_by": list(partition_by),
            "sort_by": list(sort_by),
            "retention": retention_document(keep_rows),
            "if_not_exists": if_not_exists,
        }
        return self._write("POST", "/v1/tables", document)

    def alter_table(
        self,
        name: str,
        *,
        drop_columns: Sequence[str] = (),
        rename_columns: Mapping[str, str] | None = None,
        widen_columns: Mapping[str, str] | None = None,
        relax_columns: Sequence[str] = (),
        add_columns: Mapping[str, str] | None = None,
        partition_by: Sequence[str] | None = None,
        sort_by: Sequence[str] | None = None,
        keep_rows: tuple[str, str] | Literal["forever"] | None = None,
        schema_version: int | None = None,
    ) -> dict[str, Any]:
        """Changes a table; what is None stays. `add_columns` and `widen_columns`: name → type. An
        empty `partition_by` or `sort_by` removes it, and so does `keep_rows="forever"`.

        With `schema_version` only a table at that version is changed. Raises SchemaChangeInvalid,
        SchemaInvalid, SchemaVersionMismatch, TableNotFound; the first and third also when a reply
        was lost and the change had been made, so look at the table then.
        """

        document = change_document(
            dropped=drop_columns,
            renamed=rename_columns,
            widened=widen_columns,
            relaxed=relax_columns,
            added=add_columns,
            partition_by=partition_by,
            sort_by=sort_by,
            keep_rows=keep_rows,
        )
        expected = {} if schema_version is None else {"if-match": str(schema_version)}
        path = f"/v1/tables/{quote(name, safe='')}"
        return self._write("PATCH", path, document, headers=expected)

    def drop_table(self, name: str) -> dict[str, Any]:
        """Raises TableNotFound."""

        return self._write("DELETE", f"/v1/tables/{quote(name, safe='')}", None)

    def tables(self) -> list[dict[str, Any]]:
        found = self._read("GET", "/v1/tables")
        return list(found["tables"])

    def table(self, name: str) -> dict[str, Any]:
        """Raises TableNotFound."""

        return self._read("GET", f"/v1/tables/{quote(name, safe='')}")
