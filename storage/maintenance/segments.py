"""Cuts the inputs of a rewrite into runs that follow each other in the order of arrival.

Files that ingest wrote hold ranges of positions that hardly overlap, and their footers say which
(hidden columns always have bounds). Sorting such runs one after another gives the order of the
whole, and a run that fits into memory is sorted there: no row is spilled to disk and read again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow.parquet as pq

from lakebus.schemas import HIDDEN_COLUMNS
from storage.maintenance.rewriting import RewriteInput

_Place = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """An input and places (shard, position, row) that enclose all of its rows."""

    input: RewriteInput
    first: _Place
    last: _Place


def span_of(one: RewriteInput, metadata: pq.FileMetaData) -> Span | None:
    """None when the footer does not tell, or the file has no row."""

    names = [metadata.schema.column(number).name for number in range(metadata.num_columns)]
    first: list[int] = []
    last: list[int] = []
    for hidden in HIDDEN_COLUMNS:
        place = names.index(hidden)
        found = [
            metadata.row_group(number).column(place).statistics
            for number in range(metadata.num_row_groups)
        ]
        if not found or any(one is None or not one.has_min_max for one in found):
            return None
        first.append(min(one.min for one in found))
        last.append(max(one.max for one in found))
    return Span(one, tuple(first), tuple(last))


def runs_of(spans: Sequence[Span], *, rows_max: int) -> list[tuple[RewriteInput, ...]]:
    """The inputs in groups, each wholly before the next. A group has at most `rows_max` rows,
    unless files that overlap each other have more."""

    runs: list[list[RewriteInput]] = []
    rows = 0
    for block in _overlapping(spans):
        added = sum(one.file.rows for one in block)
        if runs and rows + added <= rows_max:
            runs[-1].extend(block)
            rows += added
        else:
            runs.append(block)
            rows = added
    return [tuple(run) for run in runs]


def _overlapping(spans: Sequence[Span]) -> list[list[RewriteInput]]:
    blocks: list[list[RewriteInput]] = []
    last: _Place = ()
    for span in sorted(spans, key=lambda span: span.first):
        if blocks and span.first <= last:
            blocks[-1].append(span.input)
        else:
            blocks.append([span.input])
        last = max(last, span.last)
    return blocks
