"""The types of an answer's columns: their spelling in the API, taken apart."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

_WORD = re.compile(r"[a-z_][a-z0-9_]*")
_QUOTED = re.compile(r'"((?:[^"]|"")*)"')
_NUMBERS = re.compile(r"\(\s*(\d+)\s*(?:,\s*(\d+)\s*)?\)")
_ARRAY = re.compile(r"\[(\d*)\]")
#: Values of an enum: texts with doubled quotes inside.
_VALUES = re.compile(r"\(\s*'(?:[^']|'')*'(?:\s*,\s*'(?:[^']|'')*')*\s*\)")


@dataclass(frozen=True, slots=True)
class SqlType:
    """`name`: the type's word, or `list`. `children`: of lists one, of maps two, of structs,
    tuples and unions each member's; `names`: of structs and unions. `precision` and `scale`: of
    decimals."""

    name: str
    children: tuple[SqlType, ...] = ()
    names: tuple[str, ...] = ()
    precision: int | None = None
    scale: int | None = None
    size: int | None = None

    def holds(self, name: str) -> bool:
        """True when this type or one inside it has the name."""

        return self.name == name or any(child.holds(name) for child in self.children)


@functools.lru_cache(maxsize=1024)
def parse_type(text: str) -> SqlType:
    """The type that a text spells. What is not known is a type of its whole text, without parts:
    its values are then taken as they come."""

    try:
        found, end = _parse(text, 0)
    except (ValueError, IndexError):
        return SqlType(text)
    return found if end == len(text) else SqlType(text)


def _parse(text: str, at: int) -> tuple[SqlType, int]:
    word = _match(_WORD, text, at)
    name, at = word.group(), word.end()
    found = SqlType(name)
    if text[at : at + 1] == "(":
        if name == "decimal":
            numbers = _match(_NUMBERS, text, at)
            scale = int(numbers.group(2) or 0)
            found, at = SqlType(name, precision=int(numbers.group(1)), scale=scale), numbers.end()
        elif name == "enum":
            at = _match(_VALUES, text, at).end()
        else:
            found, at = _members(name, text, at + 1)
    while (array := _ARRAY.match(text, at)) is not None:
        found = SqlType("list", (found,), size=int(array.group(1)) if array.group(1) else None)
        at = array.end()
    return found, at


def _members(name: str, text: str, at: int) -> tuple[SqlType, int]:
    names: list[str] = []
    children: list[SqlType] = []
    if text.startswith(")", at):
        return SqlType(name), at + 1
    while True:
        if name in ("struct", "union"):
            label, at = _label(text, at)
            names.append(label)
        child, at = _parse(text, at)
        children.append(child)
        if text[at] == ")":
            return SqlType(name, tuple(children), tuple(names)), at + 1
        if not text.startswith(", ", at):
            raise ValueError(text)
        at += 2


def _label(text: str, at: int) -> tuple[str, int]:
    """A member's name and where its type begins."""

    quoted = _QUOTED.match(text, at)
    if quoted is not None:
        label, at = quoted.group(1).replace('""', '"'), quoted.end()
    else:
        end = text.index(" ", at)
        label, at = text[at:end], end
    if text[at] != " ":
        raise ValueError(text)
    return label, at + 1


def _match(pattern: re.Pattern[str], text: str, at: int) -> re.Match[str]:
    found = pattern.match(text, at)
    if found is None:
        raise ValueError(text)
    return found
