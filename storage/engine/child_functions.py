"""Which functions a statement may call: DuckDB's own list, minus what we refuse by category.

The list is read from the running DuckDB when the child starts, so that an upgrade cannot silently
turn a refused function into an unknown one; a test pins the resulting list, so that an upgrade
cannot silently allow a new one either.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import duckdb

#: Table functions that make rows out of nothing but their arguments.
TABLE_FUNCTIONS = frozenset(
    {"range", "generate_series", "unnest", "repeat", "repeat_row", "json_each", "json_tree"}
)

#: Answered from the query's pinned start (contract D8); see child_sandbox for the macros.
CLOCK_FUNCTIONS = frozenset(
    {
        "now", "current_timestamp", "get_current_timestamp", "transaction_timestamp",
        "current_date", "today", "current_time", "get_current_time", "localtime",
        "current_localtime", "localtimestamp", "current_localtimestamp", "age", "ago",
    }
)  # fmt: skip

#: Built into the grammar or the binder and therefore missing in duckdb_functions().
_UNLISTED = frozenset({"unnest", "unlist", "grouping", "grouping_id", "coalesce", "try", "struct"})

_REFUSED = frozenset(
    {
        # session, catalog and settings
        "current_setting", "current_connection_id", "current_transaction_id", "txid_current",
        "current_query", "current_query_id", "current_database", "current_schema",
        "current_schemas", "current_catalog", "current_user", "current_role", "session_user",
        "user", "in_search_path", "getvariable", "setseed", "nextval", "currval", "setval",
        "get_block_size", "format_pg_type", "format_type", "map_to_pg_oid", "col_description",
        "obj_description", "shobj_description", "inet_client_addr", "inet_client_port",
        "inet_server_addr", "inet_server_port", "can_cast_implicitly",
        # statements and plans as values
        "json_serialize_sql", "json_deserialize_sql", "json_serialize_plan",
        "json_execute_serialized_sql", "query", "query_table", "get_table_names",
        # time and logs of the server
        "sleep_ms", "pg_sleep", "write_log", "parse_duckdb_log_message",
        # storage internals
        "stats", "vector_type", "index_key", "hive_partition_component",
        "variant_bytes_to_variant", "variant_to_parquet_variant", "variant_comparator",
        "remap_struct", "finalize", "combine", "combine_aggr", "to_aggregate_state",
        "invoke", "replace_type", "make_type", "get_type", "cast_to_type", "geomtry_type",
        # ends the process: DuckDB 2.0 allocates the sample before it looks at its size
        "reservoir_quantile",
        # files
        "read_text", "read_blob", "getenv", "add_parquet_key",
    }
)  # fmt: skip
_REFUSED_PATTERN = re.compile(
    r"^(__internal|pg_(?!typeof|size_pretty)|duckdb_|pragma_|has_.*_privilege$|json_copy_|icu_collate_|collate_)"
)


@dataclass(frozen=True, slots=True)
class FunctionRules:
    """`allowed` may be called; `known` exist in DuckDB; `internal_relations` are its own views."""

    allowed: frozenset[str]
    known: frozenset[str]
    internal_relations: frozenset[str]


def read_rules(connection: duckdb.DuckDBPyConnection) -> FunctionRules:
    """Builds the rules from the running DuckDB."""

    listed = connection.execute(
        "SELECT DISTINCT lower(function_name), function_type FROM duckdb_functions()"
    ).fetchall()
    callable_names = {
        name for name, kind in listed if kind in ("scalar", "aggregate", "macro", "window")
    }
    allowed = {name for name in callable_names if not is_refused(name)} | _UNLISTED
    views = connection.execute("SELECT lower(view_name) FROM duckdb_views()").fetchall()
    tables = connection.execute("SELECT lower(table_name) FROM duckdb_tables()").fetchall()
    return FunctionRules(
        allowed=frozenset(allowed),
        known=frozenset(name for name, _ in listed) | _UNLISTED,
        internal_relations=frozenset(row[0] for row in views + tables),
    )


def is_refused(name: str) -> bool:
    return name in _REFUSED or _REFUSED_PATTERN.match(name) is not None
