"""`lakebus query` without a statement: a prompt on a terminal, a script from a pipe.

Every statement of a session sees what those before it saw: the token of each answer goes with the
next question, so that answers never go back in time, whichever replica gives them (contract D6).
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import click

from cluster.api_calls import Api
from cluster.client_commands import code_of, say_error, say_table, snapshot_choice
from cluster.query_output import Question, answer, words_of
from lakebus.errors import LakebusError

_PROMPT, _MORE = "lakebus> ", "    ...> "
_HISTORY_MAX = 2_000
_HELP = r"""
\dt            tables            \at ID|TIME  read a past snapshot; \at latest: the newest again
\d TABLE       one table         \timing      say how long each statement took
\q             end (or Ctrl-D)   \?           this

A statement ends with a semicolon and may take several lines. Ctrl-C drops what is typed, or
cancels what runs. Tab completes names.""".strip()
_KEYWORDS = re.findall(
    r"\w+",
    """
    ALL AND AS ASC BETWEEN BY CASE CAST COUNT CROSS DESC DESCRIBE DISTINCT ELSE END EXCEPT EXISTS
    EXPLAIN FALSE FILTER FROM FULL GROUP HAVING IN INNER INTERSECT INTERVAL IS JOIN LAST LEFT LIKE
    LIMIT MAX MIN NOT NULL NULLS OFFSET ON OR ORDER OUTER OVER PARTITION QUALIFY RIGHT SELECT SUM
    SUMMARIZE THEN TRUE UNION USING VALUES WHEN WHERE WINDOW WITH""",
)
# Quoted text, comments, the semicolon; each may lack its end.
_TOKEN = re.compile(
    r"""'(?:[^']|'')*(?:'|\Z) | "(?:[^"]|"")*(?:"|\Z) | --[^\n]* | /\*.*?(?:\*/|\Z)
      | \$\$.*?(?:\$\$|\Z) | (?P<end>;) | [^'"/$;-]+ | .""",
    re.DOTALL | re.VERBOSE,
)


def split(text: str) -> tuple[list[str], str]:
    """(whole statements without their semicolons, what is left)."""

    statements: list[str] = []
    begin = 0
    for token in _TOKEN.finditer(text):
        if token.group("end"):
            statements.append(text[begin : token.start()].strip())
            begin = token.end()
    return [one for one in statements if has_words(one)], text[begin:]


def has_words(text: str) -> bool:
    """Whether there is more than space and comments."""

    return any(
        token.group().strip() and not token.group().startswith(("--", "/*"))
        for token in _TOKEN.finditer(text)
    )


class Session:
    """Statements one after another, with what a person has set."""

    def __init__(
        self, api: Api, template: Question, *, form: str, out: IO[bytes], say: Callable[[str], None]
    ) -> None:
        self._api, self._template = api, template
        self._form, self._out, self._say = form, out, say
        self._timing = False

    def run(self, sql: str) -> None:
        """Raises the typed error of the answer."""

        began_s = time.monotonic()
        found = answer(self._api, self._template.of(sql), form=self._form, out=self._out)
        if self._template.snapshot is None:
            self._template = replace(self._template, after=(found.token,))
        took = f" {1000 * (time.monotonic() - began_s):,.0f} ms" if self._timing else ""
        self._say(words_of(found) + took)

    def command(self, line: str) -> bool:
        """A line that begins with a backslash; False: the session ends."""

        name, *rest = line.split()
        if name in (r"\q", r"\quit"):
            return False
        known: dict[str, Callable[[Sequence[str]], None]] = {
            r"\?": lambda _: self._say(_HELP),
            r"\dt": self._tables,
            r"\d": self._table,
            r"\at": self._at,
            r"\timing": self._toggle_timing,
        }
        act = known.get(name)
        if act is None:
            self._say(rf"{name} is no command; \? lists them")
        else:
            act(rest)
        return True

    def _tables(self, _: Sequence[str]) -> None:
        tables = self._api.client.tables()
        names = ("name", "rows", "bytes", "files")
        say_table(names, [[table[name] for name in names] for table in tables])

    def _table(self, names: Sequence[str]) -> None:
        if not names:
            self._tables(names)
            return
        table = self._api.client.table(names[0])
        say_table(("column", "type", "null"), columns_of(table))

    def _at(self, words: Sequence[str]) -> None:
        text = " ".join(words)
        if text in ("", "latest"):
            self._template = replace(self._template, snapshot=None)
            self._say("reading the newest snapshot")
            return
        try:
            chosen = snapshot_choice(text)
        except click.UsageError as error:
            self._say(error.message)
            return
        # A token and a past snapshot that does not cover it are a conflict (contract D7).
        self._template = replace(self._template, snapshot=chosen, after=())
        self._say(f"reading snapshot {text}" if isinstance(chosen, int) else f"reading at {text}")

    def _toggle_timing(self, _: Sequence[str]) -> None:
        self._timing = not self._timing
        self._say(f"timing is {'on' if self._timing else 'off'}")


def columns_of(table: dict[str, Any]) -> list[list[str]]:
    return [
        [column["name"], column["type"], "" if column["nullable"] else "no"]
        for column in table["columns"]
    ]


def statements_of(text: str) -> list[str]:
    """The statements of a script; the last may lack its semicolon. Raises click.UsageError."""

    statements, rest = split(text)
    if has_words(rest):
        statements.append(rest.strip())
    if not statements:
        raise click.UsageError("There is no statement in what was piped in.")
    return statements


def run_script(session: Session, statements: Sequence[str]) -> int:
    """One after another, until the first that fails."""

    for sql in statements:
        try:
            session.run(sql)
        except LakebusError as error:
            say_error(error)
            return code_of(error)
    return 0


def run_prompt(session: Session, api: Api, *, read: Callable[[str], str] | None = None) -> int:
    """A person at a terminal. `read` stands for `input` in tests."""

    ask = read or _line_editor(api)
    click.echo(r"\? for help, \q to end", err=True)
    typed = ""
    while True:
        try:
            line = ask(_MORE if has_words(typed) else _PROMPT)
        except KeyboardInterrupt:
            click.echo(err=True)
            typed = ""
            continue
        except EOFError:
            click.echo(err=True)
            return 0
        try:
            if not has_words(typed) and line.lstrip().startswith("\\"):
                if not session.command(line.strip()):
                    return 0
                continue
            statements, typed = split(f"{typed}{line}\n")
            for sql in statements:
                session.run(sql)
        except LakebusError as error:
            say_error(error)
        except KeyboardInterrupt:  # the connection is closed, and that cancels the query
            click.echo("cancelled", err=True)


# --- the terminal ----------------------------------------------------------------------------


def _line_editor(api: Api) -> Callable[[str], str]:
    """`input` with history and completion, where the system has readline."""

    try:
        import readline  # not in every Python
    except ImportError:
        return input
    path = Path(os.environ.get("LAKEBUS_HISTORY", "~/.lakebus_history")).expanduser()
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(_HISTORY_MAX)
    readline.set_completer(Completer(api).complete)
    readline.set_completer_delims(" \t\n\"'`@$><=;|&{(,+-*/%")
    readline.parse_and_bind("tab: complete")

    def ask(prompt: str) -> str:
        line = input(prompt)
        with contextlib.suppress(OSError):  # a home that cannot be written to
            readline.write_history_file(path)
            path.chmod(0o600)
        return line

    return ask


class Completer:
    """Names of tables and columns, keywords, and the commands of the prompt. Names are asked for
    at the first use and again after a minute."""

    _KEEP_S = 60.0

    def __init__(self, api: Api) -> None:
        self._api = api
        self._names: list[str] = []
        self._known_until_s = -1.0

    def complete(self, text: str, state: int) -> str | None:
        found = self.candidates(text)
        return found[state] if state < len(found) else None

    def candidates(self, text: str) -> list[str]:
        if text.startswith("\\"):
            return _beginning(text, (r"\?", r"\at", r"\d", r"\dt", r"\q", r"\timing"))
        names = _beginning(text.lower(), self._known())
        lower = text.islower()
        keywords = (f"{word.lower() if lower else word} " for word in _KEYWORDS)
        return names + (_beginning(text if lower else text.upper(), keywords) if text else [])

    def _known(self) -> list[str]:
        if time.monotonic() > self._known_until_s:
            with contextlib.suppress(LakebusError):  # no names, then
                tables = self._api.client.tables()
                columns = (column["name"] for table in tables for column in table["columns"])
                self._names = sorted({table["name"] for table in tables} | set(columns))
            self._known_until_s = time.monotonic() + self._KEEP_S
        return self._names


def _beginning(text: str, words: Iterable[str]) -> list[str]:
    return [word for word in words if word.startswith(text)]


def is_terminal() -> bool:
    return sys.stdin.isatty()
