"""All markers of the product, in Python and SQL, in one place."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

from tests.failpoints.hook import PACKAGES, holds_markers
from tests.failpoints.rewriting import BadMarker, check_name, markers_in

ROOT = Path(__file__).parents[2]
_SQL_MARKER = re.compile(r"^(?P<indentation>\s*)-- failpoint: (?P<name>\S+)[ \t]*$", re.MULTILINE)
_SQL_LOOSE = re.compile(r"--\s*failpoint\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Marker:
    """One place; `path` is relative to the repository."""

    name: str
    path: str
    line: int

    @property
    def in_sql(self) -> bool:
        return self.path.endswith(".sql")


@functools.cache
def all_markers() -> dict[str, Marker]:
    """By name, in order of file and line. Raises BadMarker for a name that is there twice."""
    found: dict[str, Marker] = {}
    for marker in (*_in_python(), *_in_sql()):
        if marker.name in found:
            other = found[marker.name]
            raise BadMarker(
                f"the failpoint {marker.name} is at {other.path}:{other.line} and"
                f" {marker.path}:{marker.line}; each name may be there once"
            )
        found[marker.name] = marker
    return found


def markers_of(prefix: str) -> list[str]:
    """The names of one role or function, in the order in which they stand in its file."""
    names = [name for name in all_markers() if name.startswith(f"{prefix}.")]
    assert names, f"no marker begins with {prefix}."
    return names


def require_known(name: str) -> None:
    if name not in all_markers():
        raise ValueError(
            f"the product holds no marker `failpoint: {name}`; it has: {', '.join(all_markers())}"
        )


def sql_with_calls(script: str) -> str:
    """A script with each marker turned into a call.

    As the condition of an IF, because that leaves FOUND alone: PERFORM would set it, and so break
    the function that asks for it next.
    """
    call = r"\g<indentation>IF lakebus.reach_failpoint('\g<name>') THEN END IF;"
    return _SQL_MARKER.sub(call, script)


def _in_python() -> list[Marker]:
    return [
        Marker(name, path.relative_to(ROOT).as_posix(), line)
        for package in sorted(PACKAGES)
        for path in sorted((ROOT / package).rglob("*.py"))
        if holds_markers(str(path))
        for line, name in markers_in(path.read_text(), filename=str(path)).items()
    ]


def _in_sql() -> list[Marker]:
    found = []
    for path in sorted((ROOT / "storage" / "sql").rglob("*.sql")):
        name = path.relative_to(ROOT).as_posix()
        for line, text in enumerate(path.read_text().splitlines(), start=1):
            match = _SQL_MARKER.match(text)
            if match is not None:
                found.append(Marker(check_name(match["name"], where=f"{name}:{line}"), name, line))
            elif _SQL_LOOSE.search(text):
                raise BadMarker(
                    f"{name}:{line}: write the marker as `-- failpoint: name` on its own line"
                )
    return found
