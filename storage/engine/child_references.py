"""References that DuckDB cannot look up by themselves: AT, and `information_schema`.

DuckDB's in-memory catalogs know no time travel, and its own `information_schema` tells of all that
the process holds. So these references are rewritten, in the text, to names of catalogs that hold
what was resolved for them and nothing else (child_scopes):

    FROM flights AS f AT (VERSION => 12)     FROM "$s7r0"."main"."flights" AS f
    FROM information_schema.tables           FROM "$s7i"."$lists"."tables"

Why that is safe: the rewritten text is parsed again, and its tree must be the tree that was judged,
but for exactly these references. Whatever this module misunderstands about the text is refused, it
is never run. The rest of the text stays as it is, byte for byte.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from storage.engine.child_faults import Refusal, refuse_sql, refuse_statement
from storage.engine.child_sandbox import quote_name
from storage.engine.plans import SHAPES, At

#: The schema of lists in their catalog; DuckDB keeps the name `information_schema` to itself.
LISTS = "$lists"
TRAVELS_MAX = 16

_ELSEWHERE = "$elsewhere"
_NOWHERE = (1 << 64) - 1
_PLACES = frozenset({"query_location", "query_location_length"})
_NAMES = frozenset({"qualified_name", "schema_name", "catalog_name", "table_name", "at_clause"})
_TOKEN = re.compile(
    r"""(?P<space>(?:\s|--[^\n]*|/\*.*?\*/)+)|(?P<name>"(?:[^"]|"")*"|[^\W\d][\w$]*)"""
    r"""|(?P<text>'(?:[^']|'')*')|(?P<other>.)""",
    re.DOTALL,
)
_TIME_TYPES = frozenset(
    {"timestamp", "datetime", "timestamptz", "timestamp with time zone", "timestamp_us"}
)


@dataclass(frozen=True, slots=True)
class Rewriting:
    """A statement in pieces: text, and between the texts the sides whose catalogs are named there.

    `parameters`: the name of each parameter in the rewritten text, and its name in the original.
    """

    texts: tuple[str, ...]
    sides: tuple[str, ...]
    parameters: Mapping[str, str]

    def text(self, scope_catalog: str) -> str:
        parts = [self.texts[0]]
        for side, text in zip(self.sides, self.texts[1:], strict=True):
            parts += (quote_name(scope_catalog + catalog_of(side)), text)
        return "".join(parts)


def catalog_of(side: str) -> str:
    """What the name of a side's catalog has behind the name of the scope's."""

    return "" if side == SHAPES else side


def whole(before: str, side: str, schema: str, name: str, behind: str = "") -> Rewriting:
    """A statement that is about one relation of one side."""

    path = f".{quote_name(schema)}.{quote_name(name)}{behind}"
    return Rewriting((before, path), (side,), {})


# --- AT ------------------------------------------------------------------------------------


def read_at(clause: Mapping[str, Any]) -> At:
    """The snapshot that an AT names. Raises Refusal."""

    unit, value = str(clause.get("unit", "")).lower(), clause.get("expr") or {}
    if unit not in ("version", "timestamp"):
        raise refuse_sql("AT takes VERSION => a snapshot's id, or TIMESTAMP => a time")
    if value.get("class") == "PARAMETER":
        return At(unit, None, str(value.get("identifier")))
    if unit == "timestamp" and value.get("class") == "CAST" and _is_time_cast(value):
        value = value.get("child") or {}
    literal = value.get("literal") or {}
    if value.get("class") != "CONSTANT" or literal.get("kind") not in ("INTEGER", "STRING"):
        raise refuse_sql(
            "AT takes a literal or a parameter: AT (VERSION => 12), AT (TIMESTAMP => "
            "'2026-01-31T12:00:00Z'), AT (VERSION => $snapshot)"
        )
    return At(unit, str(literal.get("text", "")), None)


def _is_time_cast(value: Mapping[str, Any]) -> bool:
    kind = value.get("type_expr") or {}
    path = (kind.get("qualified_name") or {}).get("path") or [kind.get("type_name", "")]
    return (
        not value.get("try_cast")
        and len(path) == 1
        and str(path[0]).lower() in _TIME_TYPES
        and not kind.get("children")
    )


def tree_of_side(document: Mapping[str, Any], at: At | None) -> bytes:
    """The document in which only the mentions with this AT (None: without any) bear their name and
    have none, for those who ask what it says of them. Aliases stay, for they hide each other."""

    def part(node: Any) -> Any:
        if isinstance(node, list):
            return [part(item) for item in node]
        if not isinstance(node, dict):
            return node
        copy = {key: part(value) for key, value in node.items()}
        if node.get("type") == "BASE_TABLE" and "at_clause" in node:
            clause = node["at_clause"]
            mine = at == (None if clause is None else read_at(clause))
            if mine:
                copy["at_clause"] = None
            else:
                copy["alias"] = node.get("alias") or node.get("table_name", "")
                copy["table_name"] = _ELSEWHERE
                copy["qualified_name"] = {"path": [_ELSEWHERE]}
        return copy

    return msgspec.json.encode(part(document))


def has_place(node: Mapping[str, Any]) -> bool:
    """Whether DuckDB says where in the text the node stands."""

    return int(node.get("query_location", _NOWHERE)) < _NOWHERE


# --- rewriting -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reference:
    """A node of the tree that is to name something else: `path` in the catalog of `side`, or, for
    a column of a list (`side` is empty), the first part of its path anew."""

    node: Mapping[str, Any]
    side: str
    path: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Edit:
    start: int
    end: int
    side: str
    text: str


def rewrite(
    text: str,
    before: str,
    tree: Mapping[str, Any],
    references: list[Reference],
    parse: Callable[[str], Mapping[str, Any]],
) -> Rewriting:
    """The statement `before + text` with `references` renamed; `tree` is that of `text`, and
    `parse` makes such trees. Raises Refusal when the text cannot be rewritten with certainty."""

    raw = text.encode()
    edits = sorted(
        (edit for reference in references for edit in _edits(raw, reference)),
        key=lambda edit: edit.start,
    )
    texts, sides, at = [before], [], 0
    for edit in edits:
        if edit.start < at:
            raise _unclear()
        texts[-1] += raw[at : edit.start].decode()
        at = edit.end
        if edit.side:
            sides.append(edit.side)
            texts.append(edit.text)
        else:
            texts[-1] += edit.text
    texts[-1] += raw[at:].decode()
    made = Rewriting(tuple(texts), tuple(sides), {})
    renamed = {id(reference.node): reference for reference in references}
    parameters: dict[str, str] = {}
    if not _same(tree, parse(made.text("")[len(before) :]), renamed, parameters):
        raise _unclear()
    return Rewriting(made.texts, made.sides, parameters)


def _edits(raw: bytes, reference: Reference) -> list[_Edit]:
    start = int(reference.node.get("query_location", _NOWHERE))
    length = int(reference.node.get("query_location_length", 0))
    if start + length > len(raw):
        raise _unclear()
    tokens = _tokens(raw[start : start + length].decode(errors="replace"), start)
    if not reference.side:
        first = tokens[:1]
        if not first or first[0].kind != "name":
            raise _unclear()
        return [_Edit(first[0].start, first[0].end, "", quote_name(LISTS))]
    end = _end_of_name(tokens)
    path = "".join(f".{quote_name(part)}" for part in reference.path)
    edits = [_Edit(start, end, reference.side, path)]
    clause = reference.node.get("at_clause")
    if clause is not None:
        edits.append(_at_edit(tokens, int((clause.get("expr") or {}).get("query_location", 0))))
    return edits


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    start: int
    end: int


def _tokens(text: str, start: int) -> list[_Token]:
    """What is no space, with places in bytes."""

    found = []
    for match in _TOKEN.finditer(text):
        end = start + len(match.group().encode())
        if match.lastgroup != "space":
            found.append(_Token(str(match.lastgroup), match.group(), start, end))
        start = end
    return found


def _end_of_name(tokens: list[_Token]) -> int:
    """Where the path ends that the tokens begin with."""

    last = 0
    if not tokens or tokens[0].kind != "name":
        raise _unclear()
    while (
        len(tokens) > last + 2 and tokens[last + 1].text == "." and tokens[last + 2].kind == "name"
    ):
        last += 2
    return tokens[last].end


def _at_edit(tokens: list[_Token], value: int) -> _Edit:
    """AT and its parentheses, in which the value stands, make room for a space."""

    opening = max(
        (
            number
            for number, token in enumerate(tokens)
            if token.start < value
            and token.text.lower() == "at"
            and tokens[number + 1 : number + 2]
            and tokens[number + 1].text == "("
        ),
        default=None,
    )
    if opening is None:
        raise _unclear()
    depth = 0
    for token in tokens[opening + 1 :]:
        depth += {"(": 1, ")": -1}.get(token.text, 0)
        if depth == 0:
            return _Edit(tokens[opening].start, token.end, "", " ")
    raise _unclear()


def _unclear() -> Refusal:
    return refuse_statement(
        "this reference cannot be read here: write the table's name plainly, and AT right behind "
        "it or its alias",
        "reference",
    )


def _same(old: Any, new: Any, renamed: Mapping[int, Reference], parameters: dict[str, str]) -> bool:
    """Whether `new` is `old` but for the places and for what was renamed."""

    if isinstance(old, list):
        return (
            isinstance(new, list)
            and len(old) == len(new)
            and all(_same(a, b, renamed, parameters) for a, b in zip(old, new, strict=True))
        )
    if not isinstance(old, dict):
        return bool(old == new)
    if not isinstance(new, dict) or old.keys() != new.keys():
        return False
    apart = _PLACES
    reference = renamed.get(id(old))
    if reference is not None:
        if not _is_renamed(reference, new):
            return False
        apart = apart | (_NAMES if reference.side else {"column_names"})
    elif old.get("class") == "PARAMETER":
        name, was = str(new.get("identifier")), str(old.get("identifier"))
        apart = apart | {"identifier"}
        if parameters.setdefault(name, was) != was:
            return False
    return all(_same(old[k], new[k], renamed, parameters) for k in old if k not in apart)


def _is_renamed(reference: Reference, new: Mapping[str, Any]) -> bool:
    if not reference.side:
        return new.get("column_names") == [LISTS, *reference.node["column_names"][1:]]
    path = (new.get("qualified_name") or {}).get("path")
    return path == [catalog_of(reference.side), *reference.path] and new.get("at_clause") is None
