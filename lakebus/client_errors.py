"""Errors that the client itself raises: they never cross HTTP, and so have no row in its table.

Each stands in the group of `lakebus.errors` that says what to do next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lakebus.errors import FixRequest, OutcomeUnknown, RetryLater

if TYPE_CHECKING:
    from lakebus.writer_batches import Batch


class PackageMissing(FixRequest, ImportError):
    """An optional package is not installed. Member `package`."""

    local = True
    code, title = "package_missing", "An optional package is not installed"


class AnswerTruncated(RetryLater):
    """An answer broke off before its end mark (contract D9): nothing of it is to be trusted."""

    local = True
    code, title = "answer_truncated", "The answer broke off before its end"


class WriterFull(RetryLater):
    """A writer held as much as it may for as long as the call would wait.

    Member `rows_taken`: the first so many rows of this call are in the writer and will be sent; the
    rest are not. Write those again, later.
    """

    local = True
    code, title = "writer_full", "The writer holds as much as it may"


class RowsUnacknowledged(OutcomeUnknown):
    """Some batches of a writer have no receipt. Nothing of them is lost: `batches` holds them.

    A batch with an `error` was given up for it; one without was not answered yet, or not sent.
    `Client.resend` sends them again, each with its own key, so that none is stored twice. It is
    `retryable` when every error is.
    """

    local = True
    code, title = "rows_unacknowledged", "Some rows have no receipt"

    @property
    def batches(self) -> tuple[Batch, ...]:
        return tuple(self.members.get("batches", ()))

    @property
    def rows(self) -> int:
        return sum(batch.rows for batch in self.batches)


def unacknowledged(detail: str, batches: tuple[Batch, ...]) -> RowsUnacknowledged:
    error = RowsUnacknowledged(detail, batches=batches)
    given_up = [batch.error for batch in batches if batch.error is not None]
    error.retryable = all(one.retryable for one in given_up)  # type: ignore[misc]
    return error


def package_missing(package: str, what: str) -> PackageMissing:
    return PackageMissing(
        f"{what} needs the package {package}: install it (pip install {package})", package=package
    )
