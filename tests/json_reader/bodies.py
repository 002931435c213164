"""Tables, and groups of bodies for them, as functions of a seed."""

from __future__ import annotations

import datetime as dt
import struct
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from lakebus.schemas import Column, TableSchema
from tests.json_reader.damage import damaged

_NAMES = (
    *("a", "ab", "abc", "a_", "id", "i", "ts", "value", "valu", "value_", "note", "_", "x1", "x10"),
    *("n" * 62, "n" * 63, "eightbys", "eightbyte"),
)
_INTEGERS = {
    "tinyint": (-(2**7), 2**7 - 1),
    "smallint": (-(2**15), 2**15 - 1),
    "integer": (-(2**31), 2**31 - 1),
    "bigint": (-(2**63), 2**63 - 1),
    "utinyint": (0, 2**8 - 1),
    "usmallint": (0, 2**16 - 1),
    "uinteger": (0, 2**32 - 1),
    "ubigint": (0, 2**64 - 1),
}
_KNOWN = (*_INTEGERS, "boolean", "double", "varchar", "date", "timestamp", "timestamptz")
#: Tables with one of these are not for the compiled reader.
OTHERS = ("float", "json", "uuid", "blob", "time", "integer[]", "decimal(38,18)", "struct(a int)")
_EPOCH = dt.datetime(1970, 1, 1)  # noqa: DTZ001 (as a column of local times has it)
_CHARACTERS = "aZ09 ~!:,{}[]\x7füß€漢\u2028\ufeff\ufffd😀\U0010ffff\ud7ff\ue000"
_ESCAPES = (
    *('\\"', "\\\\", "\\/", "\\b", "\\f", "\\n", "\\r", "\\t", "\\u0041", "\\u00fc", "\\u20AC"),
    *("\\ud83d\\ude00", "\\uDBFF\\uDFFF", "\\uffff", "\\u007f", "\\u0080", "\\u07ff", "\\u0800"),
)
_BAD_ESCAPES = (
    *("\\u0000", "\\ud800", "\\udc00", "\\ud800\\u0041", "\\ud800x", "\\u12", "\\u00g0", "\\x"),
    *("\\U0041", "\\udc00\\udc00", "\\", "\\ud83d\\", "\\ud83d\\u", "\\ud83d\\ud83d"),
)
_ODD_NUMBERS = (
    *("-0", "-0.0", "0", "0.0", "00", "01", "-", "+1", ".5", "1.", "1e", "1e+", "1E5", "1e-5"),
    *("0e0", "1e400", "-1e400", "1e-400", "1e22", "1e23", "9007199254740993", "NaN", "Infinity"),
    *("4.9e-324", "2.4e-324", "1.7976931348623157e308", "1.7976931348623159e308", "0x10", "1_0"),
    *("9223372036854775807", "9223372036854775808", "-9223372036854775808"),
    *("-9223372036854775809", "18446744073709551615", "18446744073709551616", "1.5", "1.0"),
    *("99999999999999999999", "1" * 100, "1" * 101, "0." + "0" * 99 + "1", "0." + "1" * 101),
    *("0." + "9" * 100, "9" * 309, "123456789012345678", "1234567890123456789", "1e99", "1e100"),
)
_ODD_MOMENTS = (
    *("0001-01-01", "0000-01-01", "9999-12-31", "10000-01-01", "1900-02-29", "2000-02-29"),
    *("2024-02-30", "2024-04-31", "2024-00-01", "2024-13-01", "2024-1-1", "20240101", "-001-01-01"),
    *("2024-01-01T24:00:00", "2024-01-01T23:59:60", "2024-01-01T12:00", "2024-01-01T12"),
    *("2024-01-01t12:00:00", "2024-01-01 12:00:00.", "2024-01-01 12:00:00.1234560"),
    *("2024-01-01 12:00:00.1234567", "0001-01-01T00:00:00+00:01", "9999-12-31T23:59:59-00:01"),
    *("0001-01-01T00:00:00Z", "9999-12-31T23:59:59.999999Z", "2024-01-01T12:00:00z"),
    *("2024-01-01T12:00:00+24:00", "2024-01-01T12:00:00+23:60", "2024-01-01T12:00:00+0530"),
    *("2024-01-01T12:00:00-23:59", "2024-01-01T12:00:00+05", "2024-01-01T12:00:00 Z", "infinity"),
)
_JUNK = ("null", "true", "false", "nul", "tru", "fals", "True", "[]", "{}", "[1]", '{"a":1}', "")
_SPACES = ("", "", "", "", " ", "\t", "\r", "  ", " " * 9)


@dataclass(frozen=True, slots=True)
class Group:
    """Bodies for one table, which are read at once. `lines[n]`: body n has an object a line."""

    schema: TableSchema
    bodies: tuple[bytes, ...]
    lines: tuple[bool, ...]
    rows_max: int


def group(seed: int, number: int) -> Group:
    """The same for the same numbers, in every process."""

    chance = Random(f"{seed}:{number}")
    schema = _table(chance)
    crowd = chance.random()
    count = 1 if crowd < 0.3 else chance.randint(2, 12)
    if crowd > 0.997:
        count = chance.choice((60, 300, 1024, 1025))
    writer = _Writer(chance, schema, tidy=chance.random() < 0.5)
    made = []
    for _ in range(count):
        lines = chance.random() < 0.4
        body = writer.body(lines=lines, small=count > 20)
        if chance.random() < 0.3:
            body = damaged(body, chance)
        made.append((body, lines))
    return Group(
        schema=schema,
        bodies=tuple(body for body, _ in made),
        lines=tuple(lines for _, lines in made),
        rows_max=chance.choice((1, 5, 100, 10**6, 10**6, 10**6)),
    )


def _table(chance: Random) -> TableSchema:
    most = 64 if chance.random() < 0.03 else 8
    names = [*_NAMES, *(f"c{n}" for n in range(64))]
    columns = []
    for number in range(1, chance.randint(1, most) + 1):
        kind = chance.choice(_KNOWN) if chance.random() < 0.8 else _decimal(chance)
        if chance.random() < 0.005:
            kind = chance.choice(OTHERS)
        name = names.pop(chance.randrange(len(names)))
        columns.append(Column(number, name, kind, chance.random() < 0.8))
    return TableSchema(1, "t", 1, tuple(columns))


def _decimal(chance: Random) -> str:
    precision = chance.choice((1, 4, 9, 10, 17, 18, 19, 20, 38))
    return f"decimal({precision},{chance.randint(0, min(precision, 17))})"


class _Writer:
    """Writes bodies for one table; what is `tidy` is mostly what the table takes."""

    def __init__(self, chance: Random, schema: TableSchema, *, tidy: bool) -> None:
        self._chance = chance
        self._schema = schema
        self._odd = 0.001 if tidy else chance.choice((0.01, 0.1))
        self._spaces = chance.random() < 0.3

    def body(self, *, lines: bool, small: bool) -> bytes:
        chance = self._chance
        many = chance.random()
        count = chance.randint(0, 2) if small or many < 0.4 else chance.randint(1, 20)
        if not small and many > 0.998:
            count = chance.choice((1_000, 1_000, 1_000, 17_000))
        rows = [self._row(lines) for _ in range(min(count, 20))]
        rows *= 1 if count <= 20 else count // max(1, len(rows))
        if lines:
            ends = ("\n", "\n", "\n", "\r\n", " \n", "\n\n", "", ",")
            text = (chance.choice(ends) if self._is_odd(20) else "\n").join(rows)
            text += chance.choice(("", "\n", "\n", "\r\n", "\n\n", " "))
        elif len(rows) == 1 and chance.random() < 0.3:
            text = self._space() + rows[0] + self._space()
        else:
            joint = chance.choice(("", ";", ",,", "\n")) if self._is_odd(5) else ","
            parts = (self._space(), "[", joint.join(rows), self._space(), "]", self._space())
            text = "".join(parts)
        if self._is_odd(2):
            text = chance.choice(("\ufeff", "\0", "[", "x", "\n")) + text
        if self._is_odd(2):
            text += chance.choice(("\0", "]", "x", ",", "[]", "\n", "\0" * 70))
        return text.encode("utf-8", "surrogatepass")

    def _is_odd(self, times: float = 1) -> bool:
        return self._chance.random() < self._odd * times

    def _space(self) -> str:
        return self._chance.choice(_SPACES) if self._spaces else ""

    def _row(self, lines: bool) -> str:
        chance = self._chance
        members = []
        for column in self._schema.columns:
            if column.nullable and chance.random() < 0.1:
                continue
            for _ in range(2 if self._is_odd(0.3) else 1):
                members.append(self._member(column))
        if chance.random() < 0.2:
            chance.shuffle(members)
        if self._is_odd(0.3):
            members.append(f'"{chance.choice(_NAMES)}":1')
        space = "\n" if self._spaces and not lines and chance.random() < 0.1 else self._space()
        return "{" + space + ("," + self._space()).join(members) + self._space() + "}"

    def _member(self, column: Column) -> str:
        chance = self._chance
        name = column.name
        if self._is_odd(0.3):
            name = chance.choice((name.upper(), f"\\u{ord(name[0]):04x}{name[1:]}", name[:-1], ""))
        if column.nullable and chance.random() < 0.05:
            value = "null"
        elif self._is_odd():
            value = self._strange()
        else:
            value = self._fitting(column.type)
        return f'"{name}"{self._space()}:{self._space()}{value}{self._space()}'

    def _strange(self) -> str:
        chance = self._chance
        if chance.random() < 0.05:
            depth = chance.choice((3, 100, 20_000))
            return chance.choice(("[" * depth, '{"a":' * depth, "[" * depth + "]" * depth))
        odd = chance.choice((_ODD_NUMBERS, _ODD_MOMENTS, _JUNK, _BAD_ESCAPES, _ESCAPES))
        value = chance.choice(odd)
        return value if chance.random() < 0.4 else f'"{value}"'

    def _fitting(self, kind: str) -> str:
        chance = self._chance
        if kind in _INTEGERS:
            return self._integer(*_INTEGERS[kind], quoted=kind in ("bigint", "ubigint"))
        if kind.startswith("decimal"):
            return self._number(*map(int, kind[8:-1].split(",")))
        if kind == "boolean":
            return chance.choice(("true", "false"))
        if kind == "double":
            return self._double()
        if kind in _MOMENTS:
            odd = self._is_odd(5)
            return f'"{chance.choice(_ODD_MOMENTS) if odd else _MOMENTS[kind](chance)}"'
        return f'"{self._text()}"'

    def _integer(self, low: int, high: int, *, quoted: bool) -> str:
        chance = self._chance
        near = chance.randint(-2, 2)
        value = chance.choice((low + near, high + near, near, chance.randint(low, high)))
        if not self._is_odd(5):
            # The least of 64 bits, and what only fits without a sign, is for other readers.
            value = min(max(value, low, 1 - 2**63), high, 2**63 - 1)
        return f'"{value}"' if quoted and chance.random() < 0.3 else str(value)

    def _number(self, precision: int, scale: int) -> str:
        chance = self._chance
        whole = chance.randint(0, 10 ** max(0, min(precision, 18) - scale) - 1)
        digits = chance.randint(0, scale + (1 if self._is_odd(5) else 0))
        text = f"{whole}.{chance.randrange(10**digits):0{digits}}" if digits else str(whole)
        if chance.random() < 0.3:
            text = f"-{text}"
        return f'"{text}"' if chance.random() < 0.5 else text

    def _double(self) -> str:
        chance = self._chance
        if chance.random() < 0.3:
            return chance.choice(_ODD_NUMBERS) if self._is_odd(20) else str(chance.randint(1, 99))
        (value,) = struct.unpack("<d", chance.randbytes(8))
        if not self._is_odd(5):
            value = chance.uniform(-1, 1) * 10.0 ** chance.randint(-99, 99)
        if chance.random() < 0.3 or value != value or abs(value) == float("inf"):
            value = chance.uniform(-1e6, 1e6)
        return repr(value) if chance.random() < 0.7 else f"{value:.25e}"

    def _text(self) -> str:
        chance = self._chance
        length = chance.choice((0, 1, 7, 8, 9, 15, 16, 17, chance.randint(0, 60)))
        if chance.random() < 0.0005:
            length = 200_000
        if chance.random() < 0.5:
            return "x" * length
        parts = []
        for _ in range(min(length, 60)):
            way = chance.random()
            parts.append(chance.choice(_ESCAPES) if way < 0.15 else chance.choice(_CHARACTERS))
        if self._is_odd(0.5):
            parts.append(chance.choice(_BAD_ESCAPES))
        return "".join(parts)


def _date(chance: Random) -> str:
    return str(dt.date.fromordinal(chance.randint(1, 3652059)))


def _timestamp(chance: Random) -> str:
    moment = _EPOCH + dt.timedelta(seconds=chance.randint(-(2**35), 2**37))
    text = moment.isoformat(sep=chance.choice("T "))
    digits = chance.choice((0, 0, 1, 3, 6))
    return f"{text}.{chance.randrange(10**digits):0{digits}}" if digits else text


def _timestamptz(chance: Random) -> str:
    zone = f"{chance.choice('+-')}{chance.randint(0, 23):02}:{chance.randint(0, 59):02}"
    return _timestamp(chance) + chance.choice(("Z", "Z", zone))


_MOMENTS: dict[str, Callable[[Random], str]] = {
    "date": _date,
    "timestamp": _timestamp,
    "timestamptz": _timestamptz,
}
