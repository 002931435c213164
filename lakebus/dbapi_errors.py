"""The exceptions of PEP 249, and which of them each error of lakebus becomes.

::

    Warning
    Error
    ├── InterfaceError         the module was used wrongly
    └── DatabaseError
        ├── DataError          values that do not fit
        ├── OperationalError   not now, or no longer: connection, time, memory, history
        ├── IntegrityError     a key or a version says otherwise
        ├── InternalError      a bug or damage: report it
        ├── ProgrammingError   wrong SQL, names, parameters, permissions
        └── NotSupportedError

Each has `code` and `retryable` of the lakebus error, which is its `__cause__`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lakebus import errors
from lakebus.client_errors import AnswerTruncated


class Warning(Exception):  # noqa: A001 - the names are those of PEP 249
    pass


class Error(Exception):
    code: str | None = None
    retryable: bool = False


class InterfaceError(Error):
    pass


class DatabaseError(Error):
    pass


class DataError(DatabaseError):
    pass


class OperationalError(DatabaseError):
    pass


class IntegrityError(DatabaseError):
    pass


class InternalError(DatabaseError):
    pass


class ProgrammingError(DatabaseError):
    pass


class NotSupportedError(DatabaseError):
    pass


#: The first that fits. What stands in no line is a DatabaseError.
_KINDS: tuple[tuple[type[errors.LakebusError], type[Error]], ...] = (
    (errors.StatementNotAllowed, NotSupportedError),
    (errors.RowsInvalid, DataError),
    (errors.ResultTooLarge, DataError),
    (errors.BodyTooLarge, DataError),
    (errors.IdempotencyConflict, IntegrityError),
    (errors.SchemaVersionMismatch, IntegrityError),
    (errors.Unauthenticated, OperationalError),
    (errors.FixRequest, ProgrammingError),
    (errors.NotFound, ProgrammingError),
    (errors.Gone, OperationalError),
    (errors.RetryLater, OperationalError),
    (AnswerTruncated, OperationalError),
    (errors.OutcomeUnknown, OperationalError),
    (errors.Cancelled, OperationalError),
    (errors.Quarantined, DataError),
    (errors.Fault, InternalError),
)


def error_of(error: errors.LakebusError) -> Error:
    kind = next((kind for ours, kind in _KINDS if isinstance(error, ours)), DatabaseError)
    made = kind(str(error))
    made.code, made.retryable = error.code, error.retryable
    return made


@contextmanager
def translated() -> Iterator[None]:
    """Errors of lakebus leave as those of PEP 249."""

    try:
        yield
    except errors.LakebusError as error:
        raise error_of(error) from error
    except (TypeError, ValueError) as error:  # a parameter that has no form in JSON, no token
        raise InterfaceError(str(error)) from error
