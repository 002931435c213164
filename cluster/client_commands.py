"""What the commands share that are clients of a running stack: which server, errors, exit codes.

A command of this kind speaks HTTP and nothing else, so it works from any machine with a key.

Exit codes (docs/cli.md): 0 done; 1 refused, change the call; 2 wrong usage; 3 not now, the same
command may succeed later; 4 it is not there; 5 it was there and is gone; 6 own rows were set aside;
130 interrupted; 141 whoever read the output has gone.
"""

from __future__ import annotations

import datetime as dt
import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from cluster.api_calls import Api
from cluster.stack_files import StackFiles
from cluster.text_table import text_table
from lakebus.client import TIMEOUT_S
from lakebus.clock import parse_time
from lakebus.errors import Gone, LakebusError, NotFound, Quarantined

REFUSED, LATER, NOT_THERE, GONE, SET_ASIDE = 1, 3, 4, 5, 6
Command = Callable[..., int]


def api_options(timeout_s: float = TIMEOUT_S) -> Callable[[Command], Command]:
    """Which server, and errors as exit codes. The command gets an `Api` as `api`."""

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(
            url: str | None, api_key: str | None, data_dir: Path, timeout_s: float, **given: Any
        ) -> int:
            try:
                with connected(url, api_key, data_dir, timeout_s) as api:
                    return command(api=api, **given)
            except LakebusError as error:
                say_error(error)
                return code_of(error)

        for option in (
            click.option("--timeout-s", type=click.FloatRange(0.001), default=timeout_s,
                         show_default=True, help="Budget of one request, retries included."),
            click.option("--data-dir", type=click.Path(path_type=Path), envvar="LAKEBUS_DATA_DIR",
                         default=Path(".lakebus"), show_default=True,
                         help="Folder of a local stack, which says URL and key."),
            click.option("--api-key", envvar="LAKEBUS_API_KEY", help="Key [LAKEBUS_API_KEY]."),
            click.option("--url", envvar="LAKEBUS_URL", help="Server [LAKEBUS_URL]."),
        ):  # fmt: skip
            run = option(run)
        return run

    return decorate


def client_options(command: Command) -> Command:
    """The same for a command that wants the Python client alone, as `client`."""

    @functools.wraps(command)
    def run(*, api: Api, **given: Any) -> int:
        return command(client=api.client, **given)

    return api_options()(run)


#: For commands whose answer is one document.
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document.")


def connected(url: str | None, api_key: str | None, data_dir: Path, timeout_s: float) -> Api:
    """Raises click.UsageError when nothing says which server."""

    ingest_url = query_url = None
    if url is None or api_key is None:
        found = StackFiles(data_dir).connection()
        if found is None:
            raise click.UsageError(
                f"No stack has run in {data_dir}. Start one with `lakebus up`, name its folder with"
                " --data-dir, or give --url and --api-key."
            )
        if url is None:
            url, api_key = found["url"], api_key or found["api_key"]
            ingest_url, query_url = found.get("ingest_url"), found.get("query_url")
        else:  # a key must never go to a server that it was not made for
            raise click.UsageError("With --url, give --api-key (or LAKEBUS_API_KEY) too.")
    return Api(url, api_key, timeout_s=timeout_s, ingest_url=ingest_url, query_url=query_url)


# --- words ---------------------------------------------------------------------------------


def parameter_value(text: str) -> Any:
    """The value that JSON says, or the text itself."""

    try:
        return json.loads(text)
    except ValueError:
        return text


def snapshot_choice(at: str | None) -> int | dt.datetime | None:
    """What `--at` names: a snapshot's id or a time. Raises click.UsageError."""

    if at is None:
        return None
    if re.fullmatch(r"[0-9]{1,18}", at):
        return int(at)
    try:
        return parse_time(at)
    except ValueError as error:
        raise click.UsageError(
            f"--at takes a snapshot's id, or a time like 2026-01-31T12:00:00Z ({error})"
        ) from None


def code_of(error: LakebusError) -> int:
    if isinstance(error, NotFound):
        return NOT_THERE
    if isinstance(error, Gone):
        return GONE
    if isinstance(error, Quarantined):
        return SET_ASIDE
    return LATER if error.retryable else REFUSED


def say_error(error: LakebusError) -> None:
    """One sentence on standard error."""

    again = " (try again)" if error.retryable else ""
    click.echo(f"lakebus: {error.code}: {error}{again}", err=True)


def counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def say_json(document: object) -> None:
    click.echo(json.dumps(document, ensure_ascii=False))


def say_table(names: Sequence[str], rows: Iterable[Sequence[Any]], *, cell_max: int = 60) -> None:
    for line in text_table(names, list(rows), cell_max=cell_max):
        click.echo(line)


def say_members(document: Mapping[str, Any], *, without: Sequence[str] = ()) -> None:
    """One line for each member that has a value: its name, then the value, aligned."""

    shown = {
        name.replace("_", " "): value
        for name, value in document.items()
        if name not in without and value is not None and value != []
    }
    width = max((len(name) for name in shown), default=0)
    for name, value in shown.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        click.echo(f"{name:{width}}  {text}")
