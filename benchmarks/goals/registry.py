"""All benchmarks, in the order they run, and how a person names some of them."""

from __future__ import annotations

from benchmarks.goals import (
    bulk,
    bystander,
    freshness,
    growth,
    history,
    ingest,
    inside,
    queries,
    resources,
)
from benchmarks.goals.rows import Benchmark

BENCHMARKS: tuple[Benchmark, ...] = (
    ingest.BENCHMARK,
    freshness.BENCHMARK,
    queries.BENCHMARK,
    bulk.BENCHMARK,
    resources.BENCHMARK,
    history.BENCHMARK,
    growth.BENCHMARK,
    inside.BENCHMARK,
    bystander.BENCHMARK,
)


def goals_of(only: str, among: tuple[Benchmark, ...] = BENCHMARKS) -> frozenset[str] | None:
    """The goals that such a list names, by the name of a benchmark all of its; None for an empty
    list."""

    words = {word.strip().lower() for word in only.split(",") if word.strip()}
    if not words:
        return None
    return frozenset(
        goal
        for one in among
        for goal in one.goals
        if goal.lower() in words or one.name.lower() in words
    )


class UnknownGoal(Exception):
    pass


def chosen(only: str, among: tuple[Benchmark, ...] = BENCHMARKS) -> list[Benchmark]:
    """Those that have one of the goals, or the name, of a list with commas; all for an empty one.
    Raises UnknownGoal with what there is."""

    wanted = [word.strip() for word in only.split(",") if word.strip()]
    found = []
    for benchmark in among:
        names = {benchmark.name.lower(), *(goal.lower() for goal in benchmark.goals)}
        if not wanted or any(word.lower() in names for word in wanted):
            found.append(benchmark)
    known = {name for one in among for name in (one.name.lower(), *map(str.lower, one.goals))}
    unknown = [word for word in wanted if word.lower() not in known]
    if unknown:
        raise UnknownGoal(
            f"there is no benchmark for {', '.join(unknown)}; there are: "
            + "; ".join(f"{one.name} ({', '.join(one.goals)})" for one in among)
        )
    return found
