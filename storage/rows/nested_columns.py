"""Lists, structs and maps from JSON values, the fast way: as `columns.py` does for scalars.

`field_type` tells msgspec what to decode, a struct class for each struct. The builder takes the
values of all rows apart, level by level, and gives the scalars of each place to the vectorised
builder of their type, so a nested column costs little more than its scalars would.

A row's keys are checked by counting (`decode_json.py`), and keys inside of nested values count too:
so a builder tells how many it has seen, and which JSON texts may hold keys of their own.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
import pyarrow as pa

from storage.rows import columns as scalars
from storage.rows import nested_arrays as arrays
from storage.rows.text_columns import text_builder
from storage.rows.types import ColumnType, Family

_UNSET = msgspec.UNSET
_RAW_FAMILIES = (Family.DECIMAL, Family.JSON)
_PLANS_MAX = 512


@dataclass(slots=True)
class KeysSeen:
    """`present`: keys of objects inside of values. `raws`: JSON texts that were not looked into."""

    present: int = 0
    raws: list[Any] = field(default_factory=list)


class _Builder(Protocol):
    def build(self, values: Sequence[Any], seen: KeysSeen) -> pa.Array:
        """Raises one of `columns.REFUSALS`."""


@dataclass(frozen=True, slots=True)
class NestedPlan:
    """All that is derived from one nested type. `decoder`: of one value or null."""

    kind: ColumnType
    field_type: Any
    builder: _Builder
    decoder: msgspec.json.Decoder[Any]

    def build(self, values: Sequence[Any], seen: KeysSeen) -> pa.Array:
        """The array for values decoded as `field_type`, None or UNSET; the latter are no keys."""

        if _UNSET in values:
            values = [None if value is _UNSET else value for value in values]
        return self.builder.build(values, seen)


@functools.lru_cache(maxsize=_PLANS_MAX)
def nested_plan(kind: ColumnType) -> NestedPlan:
    decoded, builder = _plan(kind)
    return NestedPlan(kind, decoded, builder, msgspec.json.Decoder(decoded | None))


def _plan(kind: ColumnType) -> tuple[Any, _Builder]:
    match kind.family:
        case Family.LIST:
            decoded, element = _plan(kind.children[0])
            return list[_optional(kind.children[0], decoded)], _List(kind, element)  # type: ignore[misc]
        case Family.STRUCT:
            return _struct(kind)
        case Family.MAP:
            return _map(kind)
        case _:
            return scalars.field_type(kind), _Leaf(kind, scalars.builder_of(kind))


def _optional(kind: ColumnType, decoded: Any) -> Any:
    """Raw text may be null anyway, and is in no union with it."""

    return decoded if kind.family in _RAW_FAMILIES else decoded | None


def _struct(kind: ColumnType) -> tuple[Any, _Builder]:
    fields, getters, builders = [], [], []
    rename: dict[str, str] = {}
    for number, (name, child) in enumerate(zip(kind.names, kind.children, strict=True)):
        attribute = f"f{number}"
        rename[attribute] = name
        decoded, builder = _plan(child)
        fields.append((attribute, _optional(child, decoded) | msgspec.UnsetType, _UNSET))
        getters.append(operator.attrgetter(attribute))
        builders.append(builder)
    decoded = msgspec.defstruct(
        "Value", fields, kw_only=True, rename=rename, forbid_unknown_fields=True, gc=False
    )
    return decoded, _Struct(kind, tuple(zip(getters, builders, strict=True)))


def _map(kind: ColumnType) -> tuple[Any, _Builder]:
    key, value = kind.children
    key_decoded, key_builder = _plan(key)
    value_decoded, value_builder = _plan(value)
    held = _optional(value, value_decoded)
    pair = msgspec.defstruct(
        "Pair",
        [("key", key_decoded), ("value", held | msgspec.UnsetType, _UNSET)],
        kw_only=True,
        forbid_unknown_fields=True,
        gc=False,
    )
    decoded = dict[str, held] | list[pair]  # type: ignore[valid-type]
    return decoded, _Map(kind, key_builder, text_builder(key), value_builder)


@dataclass(frozen=True, slots=True)
class _Leaf:
    kind: ColumnType
    scalar: scalars.Builder

    def build(self, values: Sequence[Any], seen: KeysSeen) -> pa.Array:
        if not values:
            return pa.nulls(0, self.kind.arrow)
        array = self.scalar(values)
        if self.kind.family is Family.JSON:
            seen.raws += [value for value in values if value is not None]
        return array


@dataclass(frozen=True, slots=True)
class _List:
    kind: ColumnType
    element: _Builder

    def build(self, values: Sequence[Any], seen: KeysSeen) -> pa.Array:
        offsets, items, mask = arrays.flatten(values)
        return arrays.list_array(self.kind, offsets, self.element.build(items, seen), mask)


@dataclass(frozen=True, slots=True)
class _Struct:
    kind: ColumnType
    fields: Sequence[tuple[Callable[[Any], Any], _Builder]]

    def build(self, values: Sequence[Any], seen: KeysSeen) -> pa.Array:
        mask = arrays.null_mask(values)
        present = len(values) if mask is None else len(values) - int(mask.sum())
        seen.present += present * len(self.fields)
        children = []
        for value_of, builder in self.fields:
            if mask is None:
                column = list(map(value_of, values))
            else:
                column = [None if value is None else value_of(value) for value in values]
            absent = sum(value is _UNSET for value in column) if _UNSET in column else 0
            if absent:
                seen.present -= absent
                column = [None if value is _UNSET else value for value in column]
            children.append(builder.build(column, seen))
        return arrays.struct_array(self.kind, children, mask)


@dataclass(frozen=True, slots=True)
class _Map:
    """Written as objects, whose keys are texts, or as lists of pairs; all rows in one way, else the
    exact pass reads them."""

    kind: ColumnType
    key: _Builder
    key_of_text: Callable[[Sequence[str | None]], pa.Array]
    value: _Builder

    def build(self, values: Sequence[Any], seen: KeysSeen) -> pa.Array:
        kinds = {type(value) for value in values if value is not None}
        if len(kinds) > 1:
            raise TypeError("maps are written as objects and as lists of pairs")
        as_objects = kinds == {dict}
        if as_objects:
            values = [None if value is None else list(value.items()) for value in values]
        offsets, items, mask = arrays.flatten(values)
        key_type = self.kind.children[0]
        if as_objects:
            seen.present += len(items)
            texts, held = [pair[0] for pair in items], [pair[1] for pair in items]
            keys = self.key_of_text(texts) if texts else pa.nulls(0, key_type.arrow)
        else:
            held = [None if pair.value is _UNSET else pair.value for pair in items]
            seen.present += 2 * len(items) - sum(pair.value is _UNSET for pair in items)
            keys = self.key.build([pair.key for pair in items], seen)
        if keys.null_count:
            raise ValueError("a key is null")
        # Texts of one object differ, but two may spell one value.
        told_apart = as_objects and key_type.family is Family.VARCHAR
        if not told_apart and len(arrays.repeated_keys(key_type, offsets, keys)):
            raise ValueError("a key comes twice")
        return arrays.map_array(self.kind, offsets, keys, self.value.build(held, seen), mask)


# --- from the exact pass --------------------------------------------------------------------------


def array_of_cells(kind: ColumnType, values: Sequence[Any]) -> pa.Array:
    """The array for values that `cells.cell_of` or `nested_cells.nested_cell` accepted."""

    match kind.family:
        case Family.LIST:
            offsets, items, mask = arrays.flatten(values)
            return arrays.list_array(kind, offsets, array_of_cells(kind.children[0], items), mask)
        case Family.STRUCT:
            fields = [
                array_of_cells(child, [None if v is None else v[place] for v in values])
                for place, child in enumerate(kind.children)
            ]
            return arrays.struct_array(kind, fields, arrays.null_mask(values))
        case Family.MAP:
            offsets, items, mask = arrays.flatten(values)
            keys, held = (
                array_of_cells(child, [pair[place] for pair in items])
                for place, child in enumerate(kind.children)
            )
            return arrays.map_array(kind, offsets, keys, held, mask)
        case _:
            return scalars.array_of_cells(kind, values)


__all__ = ["KeysSeen", "NestedPlan", "array_of_cells", "nested_plan"]
