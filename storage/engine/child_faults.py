"""Turns DuckDB's and pyarrow's errors into failures that may be shown to strangers.

The one edge where foreign errors are mapped. A message is shown only when it is about the caller's
statement; anything that names a path, our views or our catalogs is replaced, and the original goes
to our log.
"""

from __future__ import annotations

import re

import duckdb
import msgspec

from storage.engine.wire import Failure

MEMORY_DETAIL = (
    "the query needs more memory than it may use; read fewer rows or columns, group by fewer "
    "values, or run it when fewer queries are running"
)
NESTING_DETAIL = "the statement is nested too deeply; flatten it"
_UNAVAILABLE_DETAIL = (
    "the data could not be read just now; try again, and if it stays so have an operator run "
    "`lakebus maintain validate`, which names data files that are missing or damaged"
)
_ABOUT_STATEMENT = {
    "Parser", "Syntax", "Binder", "Catalog", "Conversion", "Out of Range", "Invalid Input",
    "Invalid type", "Mismatch Type", "Decimal", "Divide by Zero", "Expression", "Constraint",
    "Not implemented", "Invalid", "Parameter Not Allowed", "Parameter Not Resolved", "Sequence",
    "Unresolved", "Index", "Value",
}  # fmt: skip
_OURS = re.compile(
    r"\$s\d+|\$fixed|\$lists|\$now|\$shard|\$position|\$row|read_parquet|\.parquet|/[\w.$-]+/"
)
#: What reading a damaged footer says, without a word about files.
_DAMAGED = re.compile(r"don't know what type|TProtocolException|TTransportException")
_TOO_DEEP = re.compile("max_expression_depth|Recursion level")
_HINT = re.compile(
    r"\s*(LINE \d+:|Candidate functions:|Possible solutions:|See also http|Use SET |"
    r"For more information, see http).*",
    re.DOTALL,
)
_SUGGESTION = re.compile(r"\n?Did you mean .*", re.DOTALL)
_TYPED = re.compile(r"^([A-Za-z ]+?) Error: (.*)", re.DOTALL)


class Refusal(Exception):
    """A failure that is already in its final form."""

    def __init__(self, code: str, detail: str, **members: object) -> None:
        super().__init__(detail)
        self.failure = Failure(code, detail, members)


class Interrupted(Exception):
    """The parent asked for the end of this query."""


class SourceBroken(Exception):
    """A view over a source could not be made: a file is missing or not as recorded."""


def refuse_sql(detail: str, position: int | None = None) -> Refusal:
    if position is None:
        return Refusal("sql_error", detail)
    return Refusal("sql_error", detail, position=position)


def refuse_statement(detail: str, kind: str) -> Refusal:
    return Refusal("statement_not_allowed", detail, kind=kind)


def character_position(sql: str, offset_bytes: int) -> int | None:
    """DuckDB counts bytes of UTF-8; people count characters. None outside the text."""

    raw = sql.encode()
    if not 0 <= offset_bytes <= len(raw):
        return None
    return len(raw[:offset_bytes].decode("utf-8", "ignore"))


def failure_of(error: BaseException, sql: str, *, positions_hold: bool) -> Failure:
    """The failure to send for `error`.

    `positions_hold` is False when the text that DuckDB saw is not `sql` itself.
    """

    if isinstance(error, Refusal):
        return error.failure
    if isinstance(error, Interrupted | duckdb.InterruptException | KeyboardInterrupt):
        return Failure("cancelled", "the query was cancelled", {})
    if isinstance(error, MemoryError | duckdb.OutOfMemoryException):
        return Failure("result_too_large", MEMORY_DETAIL, {}, str(error)[:2000])
    if isinstance(error, SourceBroken):
        return Failure("unavailable", _UNAVAILABLE_DETAIL, {}, str(error)[:4000])
    if isinstance(error, RecursionError) or _TOO_DEEP.search(str(error)):
        return Failure("sql_error", NESTING_DETAIL, {})
    kind, message, position = _read(str(error))
    internal = f"{type(error).__name__}: {error}"[:4000]
    if kind == "INTERRUPT":
        return Failure("cancelled", "the query was cancelled", {}, internal)
    if kind == "Out of Memory" or "bad_alloc" in message or "malloc of size" in message:
        return Failure("result_too_large", MEMORY_DETAIL, {}, internal)
    if kind in ("FATAL", "INTERNAL"):
        return Failure("internal_error", "the engine failed on this statement", {}, internal)
    about_statement = kind in _ABOUT_STATEMENT or isinstance(error, UnicodeError)
    if not about_statement or _OURS.search(message) or _DAMAGED.match(message):
        return _hidden(kind, message, internal)
    members: dict[str, object] = {}
    if positions_hold and position is not None:
        where = character_position(sql, position)
        if where is not None:
            members["position"] = where
    return Failure("sql_error", message, members)


def is_fatal(error: BaseException) -> bool:
    """True when DuckDB has declared its database unusable: the process must be replaced."""

    return isinstance(error, duckdb.FatalException | duckdb.InternalException) or (
        "database has been invalidated" in str(error)
    )


def _hidden(kind: str, message: str, internal: str) -> Failure:
    """For errors whose text is not for strangers."""

    if kind == "Permission":
        return Failure("statement_not_allowed", "files cannot be read", {"kind": "file"}, internal)
    about_files = ".parquet" in message or "read_parquet" in message or _DAMAGED.match(message)
    if kind in ("IO", "HTTP") or about_files:
        return Failure("unavailable", _UNAVAILABLE_DETAIL, {}, internal)
    if kind in _ABOUT_STATEMENT:
        return Failure("sql_error", "the statement cannot be run on these tables", {}, internal)
    return Failure("internal_error", "the engine failed on this statement", {}, internal)


def _read(text: str) -> tuple[str, str, int | None]:
    """(exception type, message without our hints, byte position) of a DuckDB error text."""

    typed = _TYPED.match(text)
    kind, body = (typed.group(1), typed.group(2)) if typed else ("", text)
    position = None
    if body.startswith("{"):
        try:
            document = msgspec.json.decode(body)
        except msgspec.DecodeError:
            document = {}
        kind = str(document.get("exception_type", kind))
        body = str(document.get("exception_message", body))
        found = str(document.get("position", ""))
        position = int(found) if found.isdigit() else None
    message = _HINT.sub("", body).strip()
    if kind == "Catalog":
        message = _SUGGESTION.sub("", message).strip()
    return kind, " ".join(message.split("\n")), position
