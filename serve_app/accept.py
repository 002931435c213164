"""Which form of a result the caller accepts (RFC 9110, section 12.5.1, as far as it is needed)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lakebus.errors import MalformedRequest, UnsupportedMediaType
from storage.engine.plans import Integers, ResultFormat

JSON = "application/json"
NDJSON = "application/x-ndjson"
CSV = "text/csv"
ARROW_STREAM = "application/vnd.apache.arrow.stream"
PARQUET = "application/vnd.apache.parquet"
_FORMATS: dict[str, ResultFormat] = {
    JSON: "json",
    NDJSON: "ndjson",
    CSV: "csv",
    ARROW_STREAM: "arrow",
    PARQUET: "parquet",
}
SUPPORTED = tuple(_FORMATS)
_SENT_AS = {CSV: "text/csv; charset=utf-8; header=present"}
_RANGES_MAX = 32


@dataclass(frozen=True, slots=True)
class Accepted:
    result_format: ResultFormat
    media_type: str
    integers: Integers = "string"


DEFAULT = Accepted("json", JSON)


def accepted(header: str | None, supported: Sequence[str] = SUPPORTED) -> Accepted:
    """The best form of those supported (JSON always is). Raises UnsupportedMediaType,
    MalformedRequest."""

    if header is None or header in ("*/*", JSON):
        return DEFAULT
    ranges = [_range(text) for text in header.split(",")[:_RANGES_MAX] if text.strip()]
    ranges.sort(key=lambda one: one[0], reverse=True)
    for quality, kind, parameters in ranges:
        if quality <= 0:
            continue
        if kind in ("*/*", "application/*"):
            return DEFAULT
        if kind in supported:
            sent_as = _SENT_AS.get(kind, kind)
            return Accepted(_FORMATS[kind], sent_as, _integers(parameters))
        if kind == "text/*" and CSV in supported:
            return Accepted("csv", _SENT_AS[CSV], _integers(parameters))
    raise UnsupportedMediaType(
        f"this is not given as {header[:80]!r}; accept one of {', '.join(supported)}",
        supported=list(supported),
    )


def _range(text: str) -> tuple[float, str, dict[str, str]]:
    kind, *rest = (part.strip() for part in text.split(";"))
    parameters: dict[str, str] = {}
    for part in rest:
        name, _, value = part.partition("=")
        parameters[name.strip().lower()] = value.strip().strip('"').lower()
    try:
        quality = float(parameters.pop("q", "1"))
    except ValueError:
        raise MalformedRequest("the header accept has a q that is not a number") from None
    return quality, kind.lower(), parameters


def _integers(parameters: dict[str, str]) -> Integers:
    text = parameters.get("integers", "string")
    if text == "number":
        return "number"
    if text != "string":
        raise MalformedRequest("integers in the header accept must be string or number")
    return "string"
