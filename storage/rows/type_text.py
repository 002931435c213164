"""How nested types are written: `integer[]`, `struct(a integer)`, `map(varchar, integer)`.

The grammar is DuckDB's, without what no column can be: lists of a fixed length, unions. Reading
ends at the first thing that is too deep, so a hostile text costs no more than its length. What
comes out is only shape; `types.py` knows what the words mean.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from lakebus.errors import SchemaInvalid
from lakebus.schemas import fold_name

#: Lists, structs and maps inside of each other.
DEPTH_MAX: Final = 8
#: Scalars in one column's type.
LEAVES_MAX: Final = 256
#: Enough for the most leaves with the longest names.
TYPE_TEXT_MAX: Final = 32_768

_TOKEN = re.compile(r'\s*(?:("(?:[^"]|"")*")|([A-Za-z_][A-Za-z0-9_]*)|([0-9]+)|([()\[\],]))')
_SHOWN = 60


@dataclass(frozen=True, slots=True)
class ListText:
    element: TypeText


@dataclass(frozen=True, slots=True)
class StructText:
    """Names are folded and differ; order as declared."""

    names: tuple[str, ...]
    types: tuple[TypeText, ...]


@dataclass(frozen=True, slots=True)
class MapText:
    key: TypeText
    value: TypeText


#: A scalar type is its words.
TypeText = str | ListText | StructText | MapText


def read_type(text: str) -> TypeText:
    """The shape of a type. Raises SchemaInvalid for what is not written like one."""

    reader = _Reader(text)
    found = reader.type(0)
    reader.expect_end()
    return found


class _Reader:
    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens: list[str] = []
        self._at = 0
        self._leaves = 0
        position, end = 0, len(text.rstrip())
        while position < end:
            match = _TOKEN.match(text, position)
            if match is None:
                raise self._refusal(
                    f"{text[position : position + 20].strip()!r} cannot stand there"
                )
            self._tokens.append(match[0].strip())
            position = match.end()

    def type(self, depth: int) -> TypeText:
        if depth > DEPTH_MAX:
            raise self._too_deep()
        match self._peek().lower():
            case "struct" | "row":
                found: TypeText = self._struct(depth)
            case "map":
                found = self._map(depth)
            case "union" | "list" | "array" | "enum" as word:
                raise SchemaInvalid(
                    f"the type {self._shown()} is not supported: there is no {word} type here; "
                    "use a list like integer[], struct(name type, …), map(key, value), or json"
                )
            case _:
                found = self._scalar()
        lists = 0
        while self._peek() == "[":
            self._take()
            if self._peek() != "]":
                raise self._refusal("lists have no fixed length, write []")
            self._take()
            found = ListText(found)
            lists += 1
            if depth + lists > DEPTH_MAX:
                raise self._too_deep()
        if lists and depth + _depth_of(found) > DEPTH_MAX:
            raise self._too_deep()
        return found

    def expect_end(self) -> None:
        if self._at != len(self._tokens):
            raise self._refusal(f"{self._peek()!r} stands behind the end of the type")

    def _struct(self, depth: int) -> StructText:
        self._take()
        self._expect("(", "a struct names its fields, like struct(a integer, b varchar)")
        names: list[str] = []
        types: list[TypeText] = []
        while True:
            name = self._name()
            if name in names:
                raise self._refusal(f"the struct has two fields named {name}")
            names.append(name)
            types.append(self.type(depth + 1))
            if self._peek() != ",":
                break
            self._take()
        self._expect(")", "a struct ends with )")
        return StructText(tuple(names), tuple(types))

    def _map(self, depth: int) -> MapText:
        self._take()
        self._expect("(", "a map names two types, like map(varchar, integer)")
        key = self.type(depth + 1)
        self._expect(",", "a map names two types, like map(varchar, integer)")
        value = self.type(depth + 1)
        self._expect(")", "a map ends with )")
        return MapText(key, value)

    def _scalar(self) -> str:
        words: list[str] = []
        while self._peek() not in ("", ",", ")", "["):
            token = self._take()
            words.append(token)
            if token == "(":
                while words[-1] != ")":
                    if self._peek() in ("", "(", "["):
                        raise self._refusal("a ) is missing")
                    words.append(self._take())
        if not words:
            raise self._refusal("a type is missing")
        self._leaves += 1
        if self._leaves > LEAVES_MAX:
            raise SchemaInvalid(f"the type of a column has at most {LEAVES_MAX} scalars in it")
        return " ".join(words)

    def _name(self) -> str:
        token = self._take()
        if not token or token in "()[],":
            raise self._refusal("the name of a field is missing")
        if token.startswith('"'):
            token = token[1:-1].replace('""', '"')
        return fold_name(token)

    def _peek(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _take(self) -> str:
        token = self._peek()
        self._at += 1
        return token

    def _expect(self, token: str, otherwise: str) -> None:
        if self._take() != token:
            raise self._refusal(otherwise)

    def _refusal(self, reason: str) -> SchemaInvalid:
        return SchemaInvalid(f"the type {self._shown()} cannot be read: {reason}")

    @staticmethod
    def _too_deep() -> SchemaInvalid:
        return SchemaInvalid(f"types are nested at most {DEPTH_MAX} deep; use json for more")

    def _shown(self) -> str:
        text = self._text.strip()
        return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "…")


def _depth_of(found: TypeText) -> int:
    match found:
        case ListText():
            return 1 + _depth_of(found.element)
        case StructText():
            return 1 + max(map(_depth_of, found.types))
        case MapText():
            return 1 + max(_depth_of(found.key), _depth_of(found.value))
        case _:
            return 0
