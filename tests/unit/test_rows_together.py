"""Bodies decoded together: each gets what it would get alone, and nobody suffers from another."""

from __future__ import annotations

import asyncio
import decimal
import json
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lakebus.errors import LakebusError
from lakebus.schemas import Column, TableSchema
from storage.ingesting import together as grouping
from storage.ingesting.together import GroupDecoder
from storage.rows.decode import JSON, NDJSON, DecodedRows, decode_rows
from storage.rows.decode_together import IdentifiedRows, JsonBody, decode_together, goes_together
from storage.rows.fingerprint import fingerprint, fingerprints
from storage.rows.segment import EntryPart
from storage.rows.types import parse_type
from tests.json_reader.judge import storage_of
from tests.unit import compiled_rig
from tests.unit.http_rig import problem, server
from tests.unit.test_rows_agreement import FITTING

ROWS_MAX = 50


@pytest.fixture(scope="module", autouse=True)
def through_objects() -> Iterator[None]:
    """Whether or not the compiled reader was built; its own tests are elsewhere."""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("storage.rows.decode_together.plan_of", compiled_rig.plan_without)
        yield


def table(*columns: tuple[str, str] | tuple[str, str, bool], table_id: int = 7) -> TableSchema:
    named = (Column(10 + place, *column) for place, column in enumerate(columns))
    return TableSchema(table_id, "events", 1, tuple(named))


def array(*rows: object) -> JsonBody:
    return JsonBody(json.dumps(rows).encode(), lines=False)


def lines(*rows: object) -> JsonBody:
    return JsonBody("\n".join(map(json.dumps, rows)).encode(), lines=True)


def alone(schema: TableSchema, body: JsonBody) -> DecodedRows | None:
    """What the body is by itself, None when it is refused."""

    media_type = NDJSON if body.lines else JSON
    try:
        return decode_rows(schema, media_type, body.content, rows_max=ROWS_MAX)
    except LakebusError:
        return None


def assert_like_alone(
    schema: TableSchema, bodies: Sequence[JsonBody], found: Sequence[IdentifiedRows | None]
) -> None:
    assert len(found) == len(bodies)
    for body, rows in zip(bodies, found, strict=True):
        if rows is None:
            continue
        single = alone(schema, body)
        assert single is not None, "together never accepts more"
        assert rows.batch.schema == single.batch.schema
        for got, wanted in zip(rows.batch.columns, single.batch.columns, strict=True):
            assert storage_of(got).equals(storage_of(wanted))
        assert rows.fingerprint == fingerprint([EntryPart(schema.table_id, 1, single.batch)])
        rows.batch.validate(full=True)


EVENTS = table(
    ("id", "bigint", False),
    ("note", "varchar"),
    ("amount", "decimal(10,2)"),
    ("at", "timestamptz"),
    ("doc", "json"),
)


def event(number: int, **more: object) -> dict[str, object]:
    whole = {"note": f"ü{number}", "amount": "1.50", "at": "2026-01-31T12:00:00Z", "doc": {"a": 1}}
    return {"id": number} | whole | more


GOOD = [
    array(event(1), event(2)),
    lines(event(3), event(4), event(5)),
    array({"id": 6}),
    JsonBody(json.dumps(event(7)).encode(), lines=False),
    array(event(8, note=None, amount=None, at=None, doc=None), {"id": 9, "note": "x"}),
    lines(event(10, at="2026-01-31T12:00:00.5+02:00")),
    array(event(11, note='{"k": "v", "n":1}', doc={"x": {"y": ":"}})),
    array(event(12, id="12", amount=3)),
]
BAD = [
    JsonBody(b"[", lines=False),
    JsonBody(b"[]", lines=False),
    JsonBody(b'[{"id":1,"id":2}]', lines=False),
    JsonBody(b'{"id":1}{"id":2}', lines=True),
    array(*(event(n) for n in range(ROWS_MAX + 1))),
    array({"note": "without an id"}),
    array(event(1, unknown=1)),
    array(event(1, amount="1.505")),
    array(event(1, at="yesterday")),
]


def test_A10_bodies_together_get_what_they_get_alone() -> None:
    together = decode_together(EVENTS, GOOD, rows_max=ROWS_MAX)
    assert None not in together.found
    assert not together.spoilers
    assert_like_alone(EVENTS, GOOD, together.found)


def test_A10_one_body_is_a_group_too() -> None:
    for body in GOOD:
        (found,) = decode_together(EVENTS, [body], rows_max=ROWS_MAX).found
        assert found is not None
        assert_like_alone(EVENTS, [body], [found])


@pytest.mark.parametrize("bad", BAD, ids=range(len(BAD)))
def test_A9_a_bad_body_leaves_alone(bad: JsonBody) -> None:
    bodies = [*GOOD[:3], bad, *GOOD[3:]]
    together = decode_together(EVENTS, bodies, rows_max=ROWS_MAX)
    assert [number for number, rows in enumerate(together.found) if rows is None] == [3]
    assert_like_alone(EVENTS, bodies, together.found)


def test_A10_keys_are_counted_body_by_body() -> None:
    # The neighbours lack as many keys as the one in the middle has too many.
    schema = table(("a", "integer"), ("b", "varchar"))
    for twice in (b'[{"a":1,"a":1}]', b'[{"a":1,"b":"x","a":2}]'):
        bodies = [array({"a": 1}), JsonBody(twice, lines=False), array({"b": "y"}, {})]
        found = decode_together(schema, bodies, rows_max=ROWS_MAX).found
        assert [rows is None for rows in found] == [False, True, False]
        assert_like_alone(schema, bodies, found)


def test_A10_keys_inside_of_documents_are_counted_body_by_body() -> None:
    schema = table(("a", "integer"), ("doc", "json"))
    bodies = [
        array({"doc": {"x": 1, "y": 2}}),
        JsonBody(b'[{"a":1,"doc":{"x":1},"a":2}]', lines=False),
        array({"a": 1, "doc": {"x": {"y": 1}}}),
    ]
    found = decode_together(schema, bodies, rows_max=ROWS_MAX).found
    assert [rows is None for rows in found] == [False, True, False]


def test_A9_who_spoils_the_columns_is_named() -> None:
    # Right, but only the exact pass reads it: the columns of all cannot be made.
    odd = JsonBody(b'[{"id":1,"amount":15e-1}]', lines=False)
    together = decode_together(EVENTS, [GOOD[0], odd, GOOD[1]], rows_max=ROWS_MAX)
    assert (together.found[1], together.spoilers) == (None, [1])
    assert_like_alone(EVENTS, [GOOD[0], odd, GOOD[1]], together.found)
    assert None not in (together.found[0], together.found[2])


def test_nothing_but_refusals_in_a_group() -> None:
    assert decode_together(EVENTS, [BAD[0], BAD[1]], rows_max=ROWS_MAX).found == [None, None]
    assert decode_together(EVENTS, BAD, rows_max=ROWS_MAX).found == [None] * len(BAD)


def test_tables_with_nested_columns_stay_out() -> None:
    assert goes_together(EVENTS)
    assert not goes_together(table(("a", "integer[]")))


@st.composite
def groups(draw: st.DrawFn) -> tuple[TableSchema, list[JsonBody]]:
    kinds = draw(st.lists(st.sampled_from(sorted(FITTING)), min_size=1, max_size=2))
    columns = [(f"c{n}", kind, draw(st.booleans())) for n, kind in enumerate(kinds)]
    key = st.sampled_from([0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2])
    bodies = []
    for _ in range(draw(st.integers(2, 4))):
        rows = []
        for _ in range(draw(st.integers(1, 3))):
            members = [
                f'"{name}":{draw(FITTING[kind])}'
                for name, kind, _ in columns
                for _ in range(draw(key))
            ]
            rows.append("{" + ",".join(members) + "}")
        in_lines = draw(st.booleans())
        text = "\n".join(rows) if in_lines else "[" + ", ".join(rows) + "]"
        bodies.append(JsonBody(text.encode("utf-8", "surrogatepass"), in_lines))
    return table(*columns), bodies


@settings(max_examples=100, deadline=None)
@given(groups())
def test_A10_together_never_accepts_more_nor_gives_other_values(
    case: tuple[TableSchema, list[JsonBody]],
) -> None:
    schema, bodies = case
    assert_like_alone(schema, bodies, decode_together(schema, bodies, rows_max=ROWS_MAX).found)


# --- payload identity of runs ------------------------------------------------------------------

VALUES: dict[str, list[object]] = {
    "boolean": [True, None, False, None, None, True],
    "float": [0.0, -0.0, None, float("nan"), 1.5, None],
    "double": [None, None, None, float("nan"), -0.0, 2.5],
    "varchar": ["", "a", None, "üü", None, None],
    "blob": [b"", None, None, None, b"\0", b"ab"],
    "json": ["1", None, "[]", None, None, "{}"],
}


def column_of(kind: str) -> pa.Array:
    arrow = parse_type(kind).arrow
    if kind in VALUES:
        return pa.array(VALUES[kind], arrow)
    if kind == "uuid":
        storage = pa.array([b"%016d" % n if n % 2 else None for n in range(6)], pa.binary(16))
        return pa.ExtensionArray.from_storage(arrow, storage)
    if pa.types.is_decimal(arrow):
        return pa.array([None if n in (1, 3, 4) else decimal.Decimal(n) for n in range(6)], arrow)
    width = pa.int32() if pa.types.is_date(arrow) else pa.int64()
    return pa.array([1, None, 3, None, None, 6], width).cast(arrow)


@pytest.mark.parametrize(
    "kinds",
    [[kind] for kind in [*sorted(FITTING), "uinteger"]] + [["varchar", "integer", "boolean"]],
    ids="+".join,
)
def test_A4_identities_of_runs_are_those_of_their_rows(kinds: list[str]) -> None:
    arrays = [column_of(kind) for kind in kinds]
    names = [str(30 - place) for place in range(len(arrays))]  # not in the order of ids
    whole = pa.RecordBatch.from_arrays(arrays, names=names)
    for batch in (whole, whole.slice(1), whole.slice(2, 3), whole.slice(3, 2)):
        for ends in ([1, 2, 2], [batch.num_rows], range(1, batch.num_rows + 1)):
            starts = [0, *ends]
            runs = [batch.slice(a, b - a) for a, b in zip(starts, ends, strict=False)]
            expected = [fingerprint([EntryPart(7, 1, run)]) for run in runs]
            assert fingerprints(7, batch, list(ends)) == expected


def test_A4_identities_of_runs_of_nested_values() -> None:
    batch = pa.RecordBatch.from_pydict({"1": [[1, 2], None, [], [3]], "2": [1, 2, 3, 4]})
    expected = [fingerprint([EntryPart(7, 1, batch.slice(n, 2))]) for n in (0, 2)]
    assert fingerprints(7, batch, [2, 4]) == expected


# --- the turn of the loop ----------------------------------------------------------------------


class Counted:
    """How many bodies were decoded at a time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.groups: list[int] = []
        monkeypatch.setattr(grouping, "decode_together", self._decode)

    def _decode(self, schema: TableSchema, bodies: Sequence[JsonBody], *, rows_max: int) -> object:
        self.groups.append(len(bodies))
        return decode_together(schema, bodies, rows_max=rows_max)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


async def send(
    decoder: GroupDecoder,
    *bodies: bytes,
    schema: TableSchema = EVENTS,
    media_type: str = JSON,
    principal_id: int = 1,
) -> list[IdentifiedRows | None]:
    return await asyncio.gather(
        *(decoder.decode(schema, media_type, body, principal_id=principal_id) for body in bodies)
    )


ONE = b'[{"id":1}]'
ODD = b'[{"id":1,"amount":15e-1}]'


async def test_what_waits_in_one_turn_is_decoded_together(counted: Counted) -> None:
    decoder = GroupDecoder(rows_max=ROWS_MAX)
    first, second, bad = await send(decoder, ONE, b'{"id":2}', b"[")
    assert first is not None
    assert second is not None
    assert bad is None
    await send(decoder, ONE)
    assert counted.groups == [3, 1]


async def test_who_is_alone_does_not_wait_for_company(counted: Counted) -> None:
    decoder = GroupDecoder(rows_max=ROWS_MAX)
    decoding = decoder.decode(EVENTS, JSON, ONE, principal_id=1, at_once=True)
    with pytest.raises(StopIteration) as done:
        decoding.send(None)  # to its end, without a turn of the loop
    assert done.value.value is not None
    waiting = asyncio.create_task(decoder.decode(EVENTS, JSON, ONE, principal_id=1))
    await asyncio.sleep(0)  # it waits now
    assert await decoder.decode(EVENTS, JSON, ONE, principal_id=1, at_once=True) is not None
    assert await waiting is not None
    assert counted.groups == [1, 2]


async def test_a_group_is_of_one_table_and_not_too_large(
    counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = GroupDecoder(rows_max=ROWS_MAX)
    other = table(("id", "bigint"), table_id=8)
    found = await asyncio.gather(send(decoder, ONE, ONE), send(decoder, ONE, schema=other))
    assert all(rows is not None for one in found for rows in one)
    assert counted.groups == [2, 1]
    counted.groups.clear()
    monkeypatch.setattr(grouping, "GROUP_BYTES_MAX", 2 * len(ONE))
    assert None not in await send(decoder, ONE, ONE, ONE, ONE, ONE)
    assert counted.groups == [2, 2, 1]


async def test_large_bodies_and_other_formats_go_alone(counted: Counted) -> None:
    decoder = GroupDecoder(rows_max=ROWS_MAX)
    large = b" " * grouping.BODY_BYTES_MAX + ONE
    assert await send(decoder, large) == [None]
    assert await send(decoder, ONE, media_type="text/csv") == [None]
    assert await send(decoder, ONE, schema=table(("id", "integer[]"))) == [None]
    assert counted.groups == []


async def test_who_has_left_is_not_decoded(counted: Counted) -> None:
    decoder = GroupDecoder(rows_max=ROWS_MAX)
    leaving = asyncio.create_task(send(decoder, ONE))
    staying = asyncio.create_task(send(decoder, ONE))
    asyncio.get_running_loop().call_soon(leaving.cancel)
    (found,) = await staying
    assert found is not None
    with pytest.raises(asyncio.CancelledError):
        await leaving


async def test_A9_who_spoils_a_group_goes_alone_for_a_while(counted: Counted) -> None:
    decoder = GroupDecoder(rows_max=ROWS_MAX)
    neighbours, odd = await asyncio.gather(
        send(decoder, ONE, ONE), send(decoder, ODD, principal_id=2)
    )
    assert None not in neighbours
    assert odd == [None]
    counted.groups.clear()
    for _ in range(100):
        assert await send(decoder, ONE, principal_id=2) == [None]
    assert counted.groups == []
    assert None not in await send(decoder, ONE, principal_id=2)


async def test_a_bug_in_decoding_together_leaves_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(grouping, "decode_together", broken)
    assert await send(GroupDecoder(rows_max=ROWS_MAX), ONE, ONE) == [None, None]


# --- through the door --------------------------------------------------------------------------


async def test_A4_the_company_of_a_request_is_no_part_of_it() -> None:
    async with server() as lake:
        await lake.create()
        rows = [[{"id": n, "note": "x" * n}, {"id": n, "amount": n}] for n in range(6)]
        bodies: list[object] = [*rows, [{"id": "one"}], b"[{]"]
        sent = (lake.send(body, key=f"k{n}") for n, body in enumerate(bodies))
        answers = await asyncio.gather(*sent)
        assert [answer.status_code for answer in answers] == [202] * 6 + [422, 400]
        assert problem(answers[6], 422, "rows_invalid")["errors"][0]["row"] == 0
        for n, body in enumerate(rows):
            again = await lake.send(body, key=f"k{n}")
            assert again.headers["idempotent-replayed"] == "true"
            assert again.json()["receipt"] == answers[n].json()["receipt"]
        other = await lake.send(rows[1], key="k0")
        problem(other, 422, "idempotency_conflict")
