"""lakebus as a database of Python: DB-API 2.0 (PEP 249), for reading with SQL.

::

    import lakebus.dbapi

    with lakebus.dbapi.connect("http://127.0.0.1:8350", api_key) as connection:
        cursor = connection.cursor()
        cursor.execute("SELECT id, note FROM events WHERE id > ?", [1])
        print(cursor.fetchall())

Every statement reads one snapshot of all tables. The statements of a connection never go back in
time: each sees at least what those before it saw (contract D6), and what `see` was given. There is
no INSERT, UPDATE or DELETE in SQL, so there is nothing to commit; rows go in by `Client.ingest`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NoReturn

from lakebus.client import TIMEOUT_S, Client
from lakebus.client_query import At
from lakebus.client_results import After, Result, tokens_of
from lakebus.client_values import python_rows
from lakebus.dbapi_errors import (
    DatabaseError,
    DataError,
    Error,
    IntegrityError,
    InterfaceError,
    InternalError,
    NotSupportedError,
    OperationalError,
    ProgrammingError,
    Warning,  # noqa: A004 - the names are those of PEP 249
    translated,
)
from lakebus.dbapi_types import (
    BINARY,
    DATETIME,
    NUMBER,
    ROWID,
    STRING,
    Binary,
    Date,
    DateFromTicks,
    Description,
    Time,
    TimeFromTicks,
    Timestamp,
    TimestampFromTicks,
    description_of,
)

__all__ = [
    "BINARY",
    "DATETIME",
    "NUMBER",
    "ROWID",
    "STRING",
    "Binary",
    "Connection",
    "Cursor",
    "DataError",
    "DatabaseError",
    "Date",
    "DateFromTicks",
    "Error",
    "IntegrityError",
    "InterfaceError",
    "InternalError",
    "NotSupportedError",
    "OperationalError",
    "ProgrammingError",
    "Time",
    "TimeFromTicks",
    "Timestamp",
    "TimestampFromTicks",
    "Warning",
    "apilevel",
    "connect",
    "paramstyle",
    "threadsafety",
]

apilevel = "2.0"
#: Threads may share the module and connections.
threadsafety = 2
#: `?` with a list; `$name` with an object works too.
paramstyle = "qmark"

_READ_ONLY = "rows go in by lakebus.Client.ingest or a writer, and out by Client.delete; SQL reads"


def connect(
    url: str,
    api_key: str,
    *,
    timeout_s: float = TIMEOUT_S,
    after: After = None,
    at: At | None = None,
) -> Connection:
    """A connection. `after`: what all its statements must see; `at`: the past snapshot, by id or
    time, that all of them read. Raises ProgrammingError for a bad URL."""

    with translated():
        return Connection(Client(url, api_key, timeout_s=timeout_s), after=after, at=at)


class Connection:
    """Made by `connect`, or around a `Client` that is there already (and is closed with it)."""

    Warning = Warning
    Error = Error
    InterfaceError = InterfaceError
    DatabaseError = DatabaseError
    DataError = DataError
    OperationalError = OperationalError
    IntegrityError = IntegrityError
    InternalError = InternalError
    ProgrammingError = ProgrammingError
    NotSupportedError = NotSupportedError

    def __init__(self, client: Client, *, after: After = None, at: At | None = None) -> None:
        self._client: Client | None = client
        self._after = tokens_of(after)
        self._read: str | None = None
        self._at = at

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def client(self) -> Client:
        """For everything that SQL cannot do. Raises InterfaceError when closed."""

        if self._client is None:
            raise InterfaceError("the connection is closed")
        return self._client

    def see(self, after: After) -> None:
        """What the next statements must see: receipts, answers or tokens."""

        with translated():
            self._after = [*self._after, *tokens_of(after)]

    def cursor(self) -> Cursor:
        """Raises InterfaceError when closed."""

        _ = self.client
        return Cursor(self)

    def execute(self, sql: str, parameters: Any = None) -> Cursor:
        """A new cursor that has executed a statement."""

        return self.cursor().execute(sql, parameters)

    def commit(self) -> None:
        """Does nothing: there is nothing that is not committed."""

        _ = self.client

    def rollback(self) -> NoReturn:
        """Raises NotSupportedError: there are no transactions."""

        raise NotSupportedError("there is nothing to roll back: SQL reads, and changes nothing")

    def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def run(self, sql: str, parameters: Any) -> Result:
        """For cursors: one statement, in the connection's line of snapshots."""

        with translated():
            if self._at is not None:
                return self.client.query(sql, parameters, at=self._at, after=self._after)
            tokens = [*self._after, *([] if self._read is None else [self._read])]
            result = self.client.query(sql, parameters, after=tokens)
            # A token of what was read covers what it was asked to cover (contract D6).
            self._after, self._read = [], result.token
            return result


class Cursor:
    """Holds one answer, whole: use `Client.query_batches` for more than memory takes."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.arraysize = 1
        self.description: list[Description] | None = None
        self.rowcount = -1
        self.rownumber: int | None = None
        #: The answer itself: its snapshot, token and statistics.
        self.result: Result | None = None
        self._rows: list[tuple[Any, ...]] = []
        self._closed = False

    def __enter__(self) -> Cursor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return iter(self.fetchone, None)

    def execute(
        self, operation: str, parameters: Sequence[Any] | Mapping[str, Any] | None = None
    ) -> Cursor:
        """Runs one statement; itself. `parameters`: a list for `?`, an object for `$name`."""

        self._check_open()
        self._forget()
        changes = _changing(operation)
        if changes is not None:
            raise NotSupportedError(f"there is no {changes} in SQL here: {_READ_ONLY}")
        given = None if parameters is None or not len(parameters) else parameters
        result = self.connection.run(operation, given)
        self.result = result
        self._rows = python_rows(result.columns, result.rows)
        self.description = [description_of(name, kind) for name, kind in result.columns]
        self.rowcount, self.rownumber = len(self._rows), 0
        return self

    def executemany(self, operation: str, seq_of_parameters: Iterable[Any]) -> NoReturn:
        """Raises NotSupportedError: it is made for INSERT."""

        self._check_open()
        raise NotSupportedError(f"executemany is not supported: {_READ_ONLY}")

    def callproc(self, procname: str, parameters: Sequence[Any] = ()) -> NoReturn:
        raise NotSupportedError("there are no procedures")

    def fetchone(self) -> tuple[Any, ...] | None:
        rows = self._fetch(1)
        return rows[0] if rows else None

    def fetchmany(self, size: int | None = None) -> list[tuple[Any, ...]]:
        return self._fetch(self.arraysize if size is None else size)

    def fetchall(self) -> list[tuple[Any, ...]]:
        return self._fetch(len(self._rows))

    def nextset(self) -> bool | None:
        """None: a statement has one answer."""

        return None

    def setinputsizes(self, sizes: Sequence[Any]) -> None:
        """Does nothing, as PEP 249 allows."""

    def setoutputsize(self, size: int, column: int | None = None) -> None:
        """Does nothing, as PEP 249 allows."""

    def close(self) -> None:
        self._closed = True
        self._forget()

    def _fetch(self, size: int) -> list[tuple[Any, ...]]:
        self._check_open()
        if self.rownumber is None:
            raise ProgrammingError("there is no answer: execute a statement first")
        if size < 0:
            raise ProgrammingError(f"a number of rows cannot be {size}")
        rows = self._rows[self.rownumber : self.rownumber + size]
        self.rownumber += len(rows)
        return rows

    def _forget(self) -> None:
        self.description, self.rownumber, self.rowcount = None, None, -1
        self.result, self._rows = None, []

    def _check_open(self) -> None:
        if self._closed:
            raise InterfaceError("the cursor is closed")
        _ = self.connection.client


def _changing(operation: str) -> str | None:
    """The word of a statement that would change something: the server refuses it too, but does not
    know that a client is there for it."""

    word = operation.split(None, 1)[0].upper() if operation.strip() else ""
    return word if word in ("INSERT", "UPDATE", "DELETE", "MERGE", "COPY") else None
