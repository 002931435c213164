"""What the demo asks of the joined tables, and the same asked of the source files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb

from cluster.demo_data import Source


@dataclass(frozen=True, slots=True)
class Question:
    """`parameters` are made from the number of flights that were sent. Averages are quotients of
    exact sums, so that the answer does not depend on the order of rows."""

    name: str
    title: str
    sql: str
    parameters: Callable[[int], Sequence[Any]] = lambda flights: ()


QUESTIONS = (
    Question(
        "delays_by_weather",
        "Departures by visibility at the airport, in that hour",
        """
        SELECT CASE WHEN w.visib < 1 THEN 'below 1 mile' WHEN w.visib < 5 THEN '1 to 5 miles'
                    ELSE '5 miles and more' END AS visibility,
               count(*) AS flights,
               round(sum(f.dep_delay) / count(f.dep_delay), 1) AS minutes_late,
               round(100 * (count(*) - count(f.dep_time)) / count(*), 1) AS percent_cancelled
        FROM flights f JOIN weather w ON w.origin = f.origin AND w.time_hour = f.time_hour
        GROUP BY ALL ORDER BY minutes_late DESC, visibility""",
    ),
    Question(
        "worst_destinations",
        "Destinations with the latest arrivals",
        """
        SELECT a.name AS airport, count(*) AS flights,
               round(sum(f.arr_delay) / count(f.arr_delay), 1) AS minutes_late
        FROM flights f JOIN airports a ON a.faa = f.dest
        GROUP BY ALL HAVING count(*) >= ?
        ORDER BY minutes_late DESC, airport LIMIT 5""",
        lambda flights: (flights // 400,),
    ),
)


def answer_of_source(source: Source, sql: str, parameters: Sequence[Any]) -> list[list[Any]]:
    """The rows that a DuckDB of our own gives for the source, in the form of the HTTP API."""

    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        for name in ("flights", "weather", "airports"):
            connection.register(name, getattr(source, name))
        rows = connection.execute(sql, list(parameters)).fetchall()
    answer: list[list[Any]] = json.loads(json.dumps(rows))
    return answer
