"""The one edge where asyncpg's errors become ours.

"Failed" and "unknown" are different: an error the server answered with means the transaction was
rolled back, so nothing happened (Unavailable). A connection that broke while a write was under way
may have committed (OutcomeUnknown, contract A6 and C5).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import asyncpg

from lakebus.errors import Corrupt, OutcomeUnknown, Unavailable

#: The backend was told to end, or is ending: a commit may or may not have been written.
_ENDING = (
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    # asyncpg's word for a session that the server has ended but whose socket still looks open.
    asyncpg.InternalClientError,
    ConnectionError,
    EOFError,
)
_FATAL = ("FATAL", "PANIC")
_NOT_REACHED = (asyncpg.CannotConnectNowError, asyncpg.TooManyConnectionsError)
#: The server is away, or went away: nothing that the caller did.
AWAY: tuple[type[Exception], ...] = (*_ENDING, *_NOT_REACHED, OSError)
RETRY_AFTER_S = 1.0


@contextmanager
def connecting() -> Iterator[None]:
    """Around getting a connection: nothing has been asked yet, so a failure is Unavailable."""

    try:
        yield
    except (asyncpg.PostgresError, *_ENDING, OSError, TimeoutError) as error:
        raise Unavailable(
            "the catalog cannot be reached now", retry_after_s=RETRY_AFTER_S
        ) from error


@contextmanager
def reading() -> Iterator[None]:
    """Around a call that changes nothing, or whose change may safely be lost or repeated."""

    try:
        yield
    except asyncpg.DataCorruptedError as error:
        raise Corrupt("the database reports damaged data") from error
    except (asyncpg.PostgresError, *_ENDING, OSError, TimeoutError) as error:
        raise Unavailable("the catalog did not answer", retry_after_s=RETRY_AFTER_S) from error


@contextmanager
def writing() -> Iterator[None]:
    """Around a call whose commit matters."""

    try:
        yield
    except _NOT_REACHED as error:
        raise Unavailable(
            "the catalog cannot be reached now", retry_after_s=RETRY_AFTER_S
        ) from error
    except (*_ENDING, OSError, TimeoutError, asyncio.CancelledError) as error:
        if isinstance(error, asyncio.CancelledError):
            raise
        raise OutcomeUnknown(
            "the connection broke before the answer came; ask again with the same key",
            retry_after_s=RETRY_AFTER_S,
        ) from error
    except asyncpg.PostgresError as error:
        if getattr(error, "severity_en", None) in _FATAL:
            # The session was ended, by a timeout that may have struck just after the commit.
            raise OutcomeUnknown(
                "the database ended the session; ask again with the same key",
                retry_after_s=RETRY_AFTER_S,
            ) from error
        raise Unavailable(
            "the database refused the transaction; nothing was changed",
            retry_after_s=RETRY_AFTER_S,
        ) from error
