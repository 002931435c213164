"""Plots of a report's JSON files, as SVG: `plots.py FOLDER`. Prints the names as a JSON list.

Runs in the peers' environment, which has matplotlib. A dot is a median, a line goes from the least
to the greatest repetition. No bars: on a logarithmic axis they have no length. A contender without
a figure is not drawn; the report's table names it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.peers import growth_plots

Turns = dict[str, list[dict[str, Any]]]


def main(folder: Path) -> list[str]:
    import matplotlib

    matplotlib.use("svg")
    # The same figures give the same file.
    matplotlib.rcParams["svg.hashsalt"] = "lakebus"
    made = []
    plots: tuple[tuple[str, str, Callable[[Any, Turns, str], bool]], ...] = (
        ("ingest", "ingest_rows.svg", _dots("rows_per_s", "published rows/s (log)")),
        ("ingest", "ingest_latency.svg", _dots("ack_ms_p99", "p99 until acknowledged, ms (log)")),
        ("freshness", "freshness.svg", _dots("visible_ms_p99", "p99, write to visible, ms (log)")),
        ("bulk", "bulk_rows.svg", _dots("rows_per_s", "published rows/s in bulk (log)")),
    )
    for benchmark, name, draw in plots:
        path = folder / f"{benchmark}.json"
        if not path.exists():
            continue
        document = json.loads(path.read_text(encoding="utf-8"))
        if draw(folder / name, document["turns"], _caption(document)):
            made.append(name)
    growth = folder / "growth.json"
    if growth.exists():
        document = json.loads(growth.read_text(encoding="utf-8"))
        made += growth_plots.draw(folder, document["turns"], _caption(document))
    return made


def _caption(document: dict[str, Any]) -> str:
    about = document["machine"]
    quick = "QUICK RUN, not for quoting; " if document["quick"] else ""
    return (
        f"{quick}{about['cores']} cores ({about['cpu']}), commit {about['commit']}, load average"
        f" {about['load_average_at_start']} at the start\ndot: median, line: least to greatest"
    )


def _dots(figure: str, label: str) -> Callable[[Any, Turns, str], bool]:
    def draw(path: Path, turns: Turns, caption: str) -> bool:
        from matplotlib import pyplot

        found = {
            contender: [run[figure] for run in runs if run.get(figure)]
            for contender, runs in turns.items()
            if "(pairs)" not in contender
        }
        found = {contender: values for contender, values in found.items() if values}
        if not found:
            return False
        names = list(found)[::-1]
        drawing, axes = pyplot.subplots(figsize=(9, 1.2 + 0.42 * len(names)), layout="constrained")
        colors = ["#2f6fab" if name.startswith("lakebus") else "#6a6a6a" for name in names]
        for place, (name, color) in enumerate(zip(names, colors, strict=True)):
            values = found[name]
            axes.plot([min(values), max(values)], [place, place], color=color, linewidth=2)
            axes.plot([median(values)], [place], "o", color=color)
            axes.annotate(
                f"{median(values):,.4g}" if median(values) < 1_000 else f"{median(values):,.0f}",
                (median(values), place), xytext=(0, 6), textcoords="offset points", fontsize=7,
                ha="center",
            )  # fmt: skip
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(-0.6, len(names) - 0.3)
        axes.set_xscale("log")
        axes.set_xlabel(f"{label}\n{caption}", fontsize=8)
        axes.grid(axis="x", alpha=0.3)
        drawing.savefig(path, metadata={"Date": None})
        pyplot.close(drawing)
        return True

    return draw


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
