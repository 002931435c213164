"""`lakebus ingest`: rows of files, folders and pipes into a table, once however often it is run."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from cluster.api_calls import Api
from cluster.client_commands import (
    api_options,
    code_of,
    counted,
    json_option,
    say_error,
    say_json,
)
from cluster.ingest_chunks import MEDIA_TYPES, require_form
from cluster.ingest_run import Report, Run, Target
from cluster.ingest_sources import Source, sources_of
from lakebus.clock import format_time, parse_time
from lakebus.errors import LakebusError, RowsInvalid

_TIMEOUT_S = 120.0
_ERRORS_SHOWN = 10
_INTERRUPTED = 130
_STDIN = Path("-")


@click.command()
@api_options(timeout_s=_TIMEOUT_S)
@click.argument("files", nargs=-1, type=click.Path(exists=True, allow_dash=True, path_type=Path))
@click.option("--table", required=True, help="Where the rows go.")
@click.option("--create", is_flag=True, help="Make a table that is missing from the first rows.")
@click.option(
    "--format", "form", type=click.Choice(list(MEDIA_TYPES)), help="Default: by the file's name."
)
@click.option("--key", help="Idempotency key of your own; default: made from table and content.")
@click.option(
    "--on-invalid",
    type=click.Choice(["reject", "quarantine"]),
    default="reject",
    show_default=True,
    help="Rows that do not fit: refuse their request, or set them aside.",
)
@click.option(
    "--parallel",
    type=click.IntRange(1, 32),
    default=4,
    show_default=True,
    help="Requests at a time; 1 keeps the order of the rows.",
)
@click.option("--ordering-key", help="Requests with one key keep their order (one shard).")
@click.option(
    "--first-attempt",
    metavar="TIME",
    help="When this was first run: later than the idempotency window it is refused, not doubled.",
)
@click.option("--wait", is_flag=True, help="Return when the rows can be read.")
@click.option("--quiet", is_flag=True, help="No progress, no summary.")
@json_option
def ingest(
    api: Api,
    files: tuple[Path, ...],
    table: str,
    create: bool,
    form: str | None,
    key: str | None,
    on_invalid: str,
    parallel: int,
    ordering_key: str | None,
    first_attempt: str | None,
    wait: bool,
    quiet: bool,
    as_json: bool,
) -> int:
    """Send the rows of FILES: JSON, NDJSON, CSV, Arrow or Parquet, plain, gzip or zstd.

    A folder stands for the files in it; - or nothing for standard input. Rows go in requests of
    about 8 MiB, each of which is all or nothing. Prints a token for `lakebus query --after`.

    \b
    Started again after a crash or an error, the same command goes on:
    each request carries a key made from the table and its content, so
    what is stored already is not stored twice. That holds for the
    server's idempotency window, 24 hours or more after the rows became
    visible (setting bus.idempotency_window_hours; --json says until
    when). LATER THE SAME CONTENT IS NEW CONTENT, AND IS STORED AGAIN;
    with --first-attempt it is refused instead. To store equal content
    twice on purpose, give it a --key of its own.

    Exit codes: 0 all is durable; 1 refused; 2 wrong usage; 3 not now, run it again; 4 there is
    no such table; 5 older than the window; 130 interrupted, run it again.
    """
    paths = files or (_STDIN,)
    if not files and sys.stdin.isatty():
        raise click.UsageError("Name the files, or pipe the rows in.")
    sources, skipped = sources_of(paths, form)
    for source in sources:
        require_form(form or source.form, source.name)
    target = Target(table, on_invalid, ordering_key, _time(first_attempt), create)
    progress = _Progress(sources, shown=not quiet and sys.stderr.isatty())
    report = Run(api, target, key=key, parallel=parallel).send(
        sources, form=form, watch=progress.show
    )
    progress.end()
    code = _ended(report)
    visible = False
    if code == 0 and wait:
        visible = _wait(api, report)
        code = 0 if visible else 3
    if as_json:
        say_json(_document(report, table, skipped, visible=visible))
    else:
        _say(report, skipped, visible=visible, quiet=quiet)
    return code


def _time(text: str | None) -> str | None:
    if text is None:
        return None
    try:
        return format_time(parse_time(text))
    except ValueError as error:
        raise click.UsageError(
            f"--first-attempt takes a time like 2026-01-31T12:00:00Z ({error})"
        ) from None


def _ended(report: Report) -> int:
    """The exit code of what was sent, and the error in words."""

    if report.failure is not None:
        say_error(report.failure)
        if isinstance(report.failure, RowsInvalid):
            _say_rows(report.failure, report.failed_file, report.rows_before or 0)
    elif report.interrupted:
        click.echo("lakebus: interrupted; the same command goes on", err=True)
        return _INTERRUPTED
    elif not report.requests:
        click.echo("lakebus: there are no rows in what was given", err=True)
        return 1
    else:
        return 0
    if report.requests:
        click.echo(
            f"  {counted(report.requests, 'request')} with {counted(report.rows, 'row')}"
            " stored; the same command goes on from there",
            err=True,
        )
    return code_of(report.failure)


def _wait(api: Api, report: Report) -> bool:
    try:
        api.client.wait_visible(report.tokens(), timeout_s=min(api.timeout_s, 100.0))
    except LakebusError as error:
        say_error(error)
        click.echo("  the rows are durable; do not send them again", err=True)
        return False
    return True


def _document(
    report: Report, table: str, skipped: Sequence[Path], *, visible: bool
) -> dict[str, Any]:
    failure = report.failure
    return {
        "table": table,
        "rows": report.rows,
        "rows_rejected": report.rejected,
        "rows_replayed": report.replayed_rows,
        "requests": report.requests,
        "replayed": report.replayed,
        "visible": visible,
        "complete": failure is None and not report.interrupted,
        "error": None if failure is None else {"code": failure.code, "detail": failure.detail},
        "idempotency_expires_at": report.known_until,
        "visibility_tokens": report.tokens(),
        "seconds": round(report.seconds, 3),
        "files": [file.as_json() for file in report.files],
        "skipped": [str(path) for path in skipped],
        "receipts": report.receipts,
    }


def _say(report: Report, skipped: Sequence[Path], *, visible: bool, quiet: bool) -> None:
    if skipped and not quiet:
        names = ", ".join(path.name for path in skipped[:3])
        more = ", …" if len(skipped) > 3 else ""
        click.echo(
            f"{counted(len(skipped), 'file')} left out, whose name tells no format: {names}{more}",
            err=True,
        )
    if report.failure is None and not report.interrupted and report.requests:
        if not quiet:
            click.echo(_summary(report, visible=visible), err=True)
        for token in report.tokens():
            click.echo(token)


def _summary(report: Report, *, visible: bool) -> str:
    files = f" of {len(report.files)} files" if len(report.files) > 1 else ""
    state = "visible" if visible else "durable"
    text = f"{counted(report.rows, 'row')}{files} {state} in {counted(report.requests, 'request')}"
    if report.replayed:
        which = "" if report.replayed == report.requests else f"{report.replayed} of them "
        text += f"; {which}stored before, nothing is doubled"
    if report.rejected:
        text += f"; {counted(report.rejected, 'row')} set aside (lakebus quarantine list)"
    return text


def _say_rows(error: RowsInvalid, file: str, before: int) -> None:
    """Rows are counted from 0 within the file, like those of the API within a request."""

    where = "" if file == "standard input" else f"{file}: "
    shown = error.members.get("errors", [])[:_ERRORS_SHOWN]
    for one in shown:
        value = "" if one.get("value") in (None, "null") else f" ({one['value']})"
        click.echo(
            f"  {where}row {before + one['row']}, column {one['column']}: {one['reason']}{value}",
            err=True,
        )
    more = int(error.members.get("error_count", len(shown))) - len(shown)
    if more > 0:
        click.echo(f"  and {more} more", err=True)


class _Progress:
    """One line on a terminal, written over a few times a second."""

    _EVERY_S = 0.2

    def __init__(self, sources: Sequence[Source], *, shown: bool) -> None:
        self._shown = shown
        self._sizes = {id(source): source.size_bytes for source in sources}
        known = [source.size_bytes for source in sources]
        self._total = None if None in known else sum(size or 0 for size in known)
        self._before = 0
        self._current: Source | None = None
        self._began_s = self._last_s = time.monotonic()
        self._written = False

    def show(self, source: Source, taken_bytes: int, report: Report) -> None:
        if not self._shown:
            return
        if self._current is not None and self._current is not source:
            self._before += self._current.size_bytes or 0
        self._current = source
        now_s = time.monotonic()
        if now_s - self._last_s < self._EVERY_S:
            return
        self._last_s = now_s
        click.echo(f"\r\033[K{self._line(taken_bytes, report, now_s)}", err=True, nl=False)
        self._written = True

    def _line(self, taken_bytes: int, report: Report, now_s: float) -> str:
        done = self._before + taken_bytes
        rate = report.rows / max(0.001, now_s - self._began_s)
        words = [f"{report.rows:,} rows", f"{rate:,.0f} rows/s", f"{done / 1e6:,.1f} MB read"]
        if self._total:
            words[-1] += f" of {self._total / 1e6:,.1f} ({100 * done // self._total} %)"
        if report.replayed:
            words.append(f"{report.replayed_rows:,} known before")
        return ", ".join(words)

    def end(self) -> None:
        if self._written:
            click.echo("\r\033[K", err=True, nl=False)
