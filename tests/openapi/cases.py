"""Requests made from the description: each boundary of each schema once, and random ones.

A request of nothing but random values fails at the first look-up, so half of those that are valid
name what the lake really has.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet
import schemathesis
from hypothesis import strategies as st
from schemathesis.config import SchemathesisConfig
from schemathesis.core.parameters import ParameterLocation
from schemathesis.core.result import Err
from schemathesis.generation import GenerationMode
from schemathesis.generation.drivers import CoverageGenerator
from schemathesis.generation.feedback import NO_FEEDBACK
from schemathesis.generation.overrides import Override
from schemathesis.schemas import APIOperation, BaseSchema

from tests.unit.http_rig import ARROW, EVENTS, NDJSON

AnyCase = schemathesis.Case[Any]
AnyOperation = APIOperation[Any, Any, Any, Any]
Draw = Callable[[st.SearchStrategy[Any]], Any]

PARQUET: Final = "application/vnd.apache.parquet"
CSV: Final = "text/csv"
MODES: Final = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
_CONFIG: Final = {
    "checks": {
        # Refusals that are part of the contract: a time that ran out, a table that is going.
        "not_a_server_error": {"expected-statuses": ["2xx", "4xx", "503", "504"]},
        "negative_data_rejection": {"expected-statuses": ["4xx", "503", "504"]},
    },
    "generation": {"with-security-parameters": False, "allow-x00": True},
}

# --- rows ---------------------------------------------------------------------------------------

_IDS: Final = st.integers(-(2**63), 2**63 - 1)
_VALUES: Final = {
    "note": st.none() | st.text(max_size=20),
    "amount": st.none() | st.sampled_from(["1.50", "-0.01", "99999999.99"]),
    "at": st.none() | st.sampled_from(["2026-01-31T12:00:00Z", "1970-01-01T00:00:00.000001Z"]),
}
_ODD: Final = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
GOOD_ROW: Final = st.fixed_dictionaries({"id": _IDS}, optional=_VALUES)
ODD_ROW: Final = st.dictionaries(
    st.sampled_from([*_VALUES, "id", "ID", "other", "", "\x00"]) | st.text(max_size=5),
    _ODD,
    max_size=4,
)
ROWS: Final = st.lists(GOOD_ROW, min_size=1, max_size=3) | st.lists(
    GOOD_ROW | ODD_ROW, min_size=1, max_size=3
)
_SOME_ROWS: Final = st.sampled_from([[{"id": 1}], {"id": 2, "note": "n"}, [{"id": 3}, {"id": "x"}]])
STATEMENTS: Final = st.sampled_from(
    [
        "select 1",
        "select id, note, amount, at from events order by id",
        "from events",
        "select * from Events where id > ?",
        "select $a",
        "select * from events at (version => 2)",
        "select * from events at (timestamp => '2999-01-01T00:00:00Z')",
        "select cast('x' as integer)",
        "select * from range(100000)",
        "select 'nan'::double, 1::hugeint, 1.5::decimal(4,1), blob '\\x00', [1], {'a': 1}, uuid()",
        "show tables",
        "summarize events",
        "explain select * from events",
        "drop table events",
        "select * from nothing",
        "select * from read_csv('/etc/passwd')",
        "select 1; select 2",
        "select '\x00'",
        "select " + "(" * 200 + "1" + ")" * 200,
        "-- nothing",
        "",
    ]
)
#: Bodies that can be carried out, by the operation.
_GOOD: Final[Mapping[str, st.SearchStrategy[Any]]] = {
    "post_table_rows": _SOME_ROWS | ROWS,
    "replay_quarantined": _SOME_ROWS | ROWS,
    "post_rows": st.sampled_from([{"events": {"id": 1}}, {"no": {"id": 1}}])
    | st.dictionaries(st.sampled_from(["events", "no"]), ROWS, min_size=1),
    "post_table": st.sampled_from([EVENTS | {"if_not_exists": True}, EVENTS | {"name": "a.b"}]),
    "post_key": st.sampled_from(
        [
            {"principal": "p", "scopes": ["query"]},
            {
                "principal": "p",
                "scopes": [{"scope": "ingest", "tables": ["a*"]}, "admin"],
                "label": "\x00",
                "quotas": {"requests_per_s": 0.5},
            },
        ]
    ),
    "post_tag": st.sampled_from(
        [{"name": "v1", "snapshot_id": 2}, {"name": "v2", "snapshot_id": 2}]
    ),
    "post_delete": st.sampled_from([{"where": "id = 1"}, {"where": "id = 2", "dry_run": True}]),
    "post_erase": st.sampled_from([{"where": "id = 1"}, {"where": "id = 2", "dry_run": True}]),
    "patch_table": st.sampled_from(
        [{"add_columns": [{"name": "more", "type": "date"}]}, {"drop_columns": ["more"]}]
    ),
}
#: Parameters that are enough for an operation; it refuses most of what it is given beside them.
_ENOUGH: Final = {"get_changes": ("after",), "find_trace": ("key", "target")}
CONDITIONS: Final = st.sampled_from(["id = 1", "id = ?", "id = $a", "true", "", "id", "\x00", "a)"])


def _arrow(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    return pa.table(
        {
            "id": pa.array([row["id"] for row in rows], pa.int64()),
            "note": pa.array([row.get("note") for row in rows], pa.string()),
        }
    )


def _arrow_stream(rows: Sequence[Mapping[str, Any]]) -> bytes:
    sink = io.BytesIO()
    table = _arrow(rows)
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(_arrow(rows), sink)
    return sink.getvalue()


def _damaged(whole: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """As it is, cut short, or with some bytes of it changed."""

    def hurt(given: tuple[bytes, float, int, bytes]) -> bytes:
        body, share, how, other = given
        place = int(len(body) * share)
        if how == 0:
            return body
        return body[:place] if how == 1 else body[:place] + other + body[place + len(other) :]

    chances = st.sampled_from([0, 0, 0, 1, 2])
    parts = st.tuples(whole, st.floats(0, 1), chances, st.binary(min_size=1, max_size=8))
    return parts.map(hurt)


def register_media_types() -> None:
    """How bodies are made that JSON Schema cannot speak of."""

    good = st.lists(GOOD_ROW, min_size=1, max_size=3)
    lines = ROWS.map(lambda rows: b"\n".join(_json(row) for row in rows))
    fields = st.sampled_from(["1", "", '""', "x", '"a,b"', "1.5", "\x00", '"', "é", "2026-01-31"])
    csv_lines = st.lists(st.lists(fields, min_size=1, max_size=3), max_size=3)
    csv = csv_lines.map(lambda rows: "\n".join(["id,note", *map(",".join, rows)]).encode())
    schemathesis.openapi.media_type(NDJSON, _damaged(lines))
    schemathesis.openapi.media_type(CSV, _damaged(csv))
    schemathesis.openapi.media_type(ARROW, _damaged(good.map(_arrow_stream)))
    schemathesis.openapi.media_type(PARQUET, _damaged(good.map(_parquet)))


def _json(value: object) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


# --- cases --------------------------------------------------------------------------------------


def schema_of(document: dict[str, Any]) -> BaseSchema:
    """The description as a source of requests. Answers may not have members it does not name."""

    closed = {**document, "paths": _closed_answers(document["paths"])}
    shapes = document["components"]["schemas"]
    closed["components"] = {
        **document["components"],
        "schemas": {name: _closed(shape) for name, shape in shapes.items()},
    }
    return schemathesis.openapi.from_dict(closed, config=SchemathesisConfig.from_dict(_CONFIG))


def operations(schema: BaseSchema) -> list[AnyOperation]:
    found = []
    for one in schema.get_all_operations():
        if isinstance(one, Err):
            raise one.err()
        found.append(one.ok())
    return found


def boundaries(operation: AnyOperation) -> Iterator[AnyCase]:
    """Every boundary that the description of an operation has, valid ones and beyond."""

    yield from CoverageGenerator(
        operation=operation,
        generation_modes=list(MODES),
        generation_config=operation.schema.config.generation,
        auth_storage=None,
        override=Override(),
        feedback=NO_FEEDBACK,
    )


def is_valid(case: AnyCase) -> bool:
    return case.meta is None or case.meta.generation.mode is GenerationMode.POSITIVE


def choices(strategy: st.SearchStrategy[Any]) -> Sequence[Any]:
    """What one of the strategies of `ground` may give, where that is a list."""

    branches = getattr(strategy, "original_strategies", None)
    if branches is not None:
        return choices(branches[0])
    return list(getattr(strategy, "elements", (False, True)))


def ground(case: AnyCase, known: Mapping[str, Sequence[Any]], draw: Draw) -> None:
    """Lets half of the valid values be those that the lake has."""

    if _valid(case, ParameterLocation.PATH) and draw(st.booleans()):
        for name in case.path_parameters:
            values = known.get(f"{_name(case)} {name}", known.get(name))
            if values is not None:
                case.path_parameters[name] = draw(st.sampled_from(values))
    if case.headers.get("Idempotency-Not-Before") and draw(st.booleans()):
        del case.headers["Idempotency-Not-Before"]
    if _valid(case, ParameterLocation.QUERY):
        _ground_query(case, known, draw)
    if _valid(case, ParameterLocation.BODY) and case.media_type == "application/json":
        _ground_body(case, known, draw)


def _ground_query(case: AnyCase, known: Mapping[str, Sequence[Any]], draw: Draw) -> None:
    name = _name(case)
    if name in _ENOUGH and draw(st.booleans()):
        case.query = {what: known[what][0] for what in _ENOUGH[name]}
    for what in ("token", "min_visibility_token"):
        if what in case.query and draw(st.booleans()):
            case.query[what] = list(known["token"])
    if "sql" in case.query and draw(st.booleans()):
        case.query["sql"] = draw(STATEMENTS)


def _ground_body(case: AnyCase, known: Mapping[str, Sequence[Any]], draw: Draw) -> None:
    name, body = _name(case), case.body
    if name in _GOOD and draw(st.booleans()):
        case.body = draw(_GOOD[name])
        return
    if not isinstance(body, dict):
        return
    if "sql" in body and draw(st.booleans()):
        body["sql"] = draw(STATEMENTS)
    if "where" in body and draw(st.booleans()):
        body["where"] = draw(CONDITIONS)
    for member in ("token", "min_visibility_token"):
        if member in body and draw(st.booleans()):
            body[member] = list(known["token"])


def _name(case: AnyCase) -> str:
    return str(case.operation.definition.raw["operationId"])


def _valid(case: AnyCase, location: ParameterLocation) -> bool:
    if case.meta is None:
        return True
    info = case.meta.components.get(location)
    return info is None or info.mode is GenerationMode.POSITIVE


def _closed_answers(paths: Mapping[str, Any]) -> dict[str, Any]:
    return {
        path: {
            method: {**operation, "responses": _closed(operation["responses"])}
            for method, operation in methods.items()
        }
        for path, methods in paths.items()
    }


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {name: _closed(value) for name, value in schema.items()}
    if schema.get("type") in ("object", ["object", "null"]) and "properties" in schema:
        inner.setdefault("additionalProperties", False)
    return inner
