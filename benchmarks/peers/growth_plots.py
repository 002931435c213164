"""Plots of `growth.json`: cost by size on two logarithmic axes, one picture an axis.

Runs in the peers' environment. A dot is the median of a size's repetitions, a bar goes from the
least to the greatest. In brackets: the slope of the last two decades. What costs nothing at some
size has no dot there, because a logarithmic axis has no zero.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.growth.slopes import end_slope

Curve = dict[int, list[float]]
#: File, beginning of its contenders' names, what the axis counts, and the panels of one picture:
#: title and the names of the curves.
PICTURES: Sequence[tuple[str, str, str, Sequence[tuple[str, Sequence[str]]]]] = (
    (
        "growth_files.svg", "files", "live files",
        (
            ("ms", (
                "publish, ms", "append, ms", "advance the manifest, ms", "load the manifest, ms",
                "resolve a snapshot and prune, p99 ms", "prune, all files in one table, ms",
            )),
            ("counted in PostgreSQL, a publication", (
                "publish, rows read", "publish, blocks", "publish, WAL bytes",
                "advance the manifest, rows read",
            )),
        ),
    ),
    (
        "growth_snapshots.svg", "snapshots", "snapshots",
        (
            ("ms", (
                "publish, ms", "resolve by id, ms", "resolve AS OF a time, ms",
                "list the newest 100, ms", "list 100 before an old one, ms",
                "plan an expiry of all, ms",
            )),
            ("rows read in PostgreSQL, a call", (
                "publish, rows read", "resolve by id, rows read", "resolve AS OF a time, rows read",
                "list the newest 100, rows read", "plan an expiry of all, rows read",
            )),
        ),
    ),
    (
        "growth_tables.svg", "tables", "tables",
        (
            ("ms", (
                "publish, ms", "plan a query, ms", "list the tables, ms", "make a table, ms",
                "add a column, ms", "drop a table, ms", "load the manifest, ms",
            )),
            ("rows read in PostgreSQL, a call", (
                "publish, rows read", "list the tables, rows read", "make a table, rows read",
                "add a column, rows read", "drop a table, rows read",
            )),
        ),
    ),
    (
        "growth_clients.svg", "clients", "clients",
        (
            ("rows/s", ("rows/s",)),
            ("ms until acknowledged", ("ack, p50 ms", "ack, p99 ms")),
            ("CPU of a request, µs", ("CPU of a request, all of ours, µs",)),
        ),
    ),
)  # fmt: skip


def draw(folder: Path, turns: Mapping[str, Sequence[Mapping[str, Any]]], caption: str) -> list[str]:
    """The names of the pictures that were made."""

    return [
        name
        for name, axis, label, panels in PICTURES
        if _picture(folder / name, curves_of(turns, axis), label, panels, caption)
    ]


def curves_of(turns: Mapping[str, Sequence[Mapping[str, Any]]], axis: str) -> dict[str, Curve]:
    """By name; several doors tell theirs apart: "Serve: rows/s"."""

    found: dict[str, Curve] = {}
    for contender, runs in turns.items():
        before, _, _ = contender.rpartition(" ")
        begin, _, door = before.partition(", ")
        if begin != axis:
            continue
        for run in runs:
            for what, values in run.get("curves", {}).items():
                name = f"{door}: {what}" if door else what
                found.setdefault(name, {}).setdefault(run["size"], []).extend(values)
    return found


def _picture(
    path: Path,
    curves: Mapping[str, Curve],
    label: str,
    panels: Sequence[tuple[str, Sequence[str]]],
    caption: str,
) -> bool:
    pyplot: Any = importlib.import_module("matplotlib.pyplot")  # the peers' environment has it
    shown = [(title, _of_panel(curves, names)) for title, names in panels]
    shown = [(title, found) for title, found in shown if found]
    if not shown:
        return False
    drawing, grid = pyplot.subplots(
        1, len(shown), figsize=(5.6 * len(shown), 5.4), layout="constrained", squeeze=False
    )
    for axes, (title, found) in zip(grid[0], shown, strict=True):
        for name, curve in found.items():
            _line(axes, name, curve)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(label, fontsize=8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=6, loc="upper left", bbox_to_anchor=(0.0, -0.12))
    drawing.suptitle(caption, fontsize=7)
    drawing.savefig(path, metadata={"Date": None})
    pyplot.close(drawing)
    return True


def _of_panel(curves: Mapping[str, Curve], names: Sequence[str]) -> dict[str, Curve]:
    return {
        name: curve
        for name, curve in curves.items()
        if name in names or name.partition(": ")[2] in names
    }


def _line(axes: Any, name: str, curve: Curve) -> None:
    medians = {float(size): median(values) for size, values in sorted(curve.items()) if values}
    medians = {size: value for size, value in medians.items() if value > 0}
    if not medians:
        return
    end = end_slope(medians)
    text = name if end is None else f"{name} [{end + 0.0:.2f}]"
    line = axes.plot(list(medians), list(medians.values()), "o-", markersize=3, label=text)[0]
    for size in medians:
        values = [value for value in curve[int(size)] if value > 0]
        axes.plot([size, size], [min(values), max(values)], color=line.get_color(), linewidth=3,
                  alpha=0.4)  # fmt: skip
