"""The writer: what goes in has a receipt or is handed back, once each, and memory stays bounded."""

from __future__ import annotations

import contextlib
import json
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pytest

from lakebus.client import Client, connect
from lakebus.client_errors import RowsUnacknowledged, WriterFull
from lakebus.client_forms import receipt_of
from lakebus.client_results import Sent
from lakebus.client_rows import ARROW, NDJSON
from lakebus.errors import Backpressure, Fault, MalformedBody, MalformedRequest, RowsInvalid
from lakebus.writer import Writer
from lakebus.writer_batches import Batch, WriterLimits
from tests.unit.client_rig import accepted, answer_of, answering, body_of, header_of, problem_of
from tests.unit.client_rig import scripted as scripted_server

GENEROUS_S = 30.0


def sent_for(batch: Batch, *, replayed: bool = False) -> Sent:
    receipt = receipt_of(accepted(batch.rows, token=f"lb1.{batch.key}")["receipt"])
    return Sent(receipt=receipt, replayed=replayed, visible=False, snapshot_id=None)


class Door:
    """A server as the writer sees it. `answers`: what the next calls do; then all is accepted.
    While `shut`, calls wait."""

    def __init__(self, *answers: Exception | None) -> None:
        self.answers = list(answers)
        self.seen: list[Batch] = []
        self.stored: list[Batch] = []
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Semaphore(0)
        self._lock = threading.Lock()

    def __call__(self, batch: Batch, *, timeout_s: float) -> Sent:
        with self._lock:
            self.seen.append(batch)
        self.entered.release()
        assert self.open.wait(GENEROUS_S)
        with self._lock:
            answer = self.answers.pop(0) if self.answers else None
            if answer is None:
                self.stored.append(batch)
                return sent_for(batch)
        raise answer

    @property
    def ids(self) -> list[int]:
        return [row["id"] for batch in self.stored for row in rows_of(batch)]


def rows_of(batch: Batch) -> list[dict[str, Any]]:
    if batch.media_type == NDJSON:
        return [json.loads(line) for line in batch.content.splitlines()]
    with pa.ipc.open_stream(batch.content) as reader:
        rows: list[dict[str, Any]] = reader.read_all().to_pylist()
    return rows


def writer(door: Callable[..., Sent], *, senders: int = 1, **limits: Any) -> Writer:
    return Writer(door, "t", limits=WriterLimits(**{"linger_s": 60, **limits}), senders=senders)


def ids(*numbers: int) -> list[dict[str, int]]:
    return [{"id": n} for n in numbers]


def test_A7_rows_are_sent_in_batches_and_in_order() -> None:
    door = Door()
    with writer(door, rows_max=3) as w:
        assert w.write({"id": 0}) == 1
        assert w.write(ids(1, 2, 3)) == 3
        assert w.write(row for row in ids(4, 5, 6)) == 3
        written = w.flush()
    assert (written.rows, written.batches) == (7, 3)
    assert [batch.rows for batch in door.stored] == [3, 3, 1]
    assert door.ids == list(range(7))
    assert len({batch.key for batch in door.stored}) == 3
    assert written.tokens == tuple(f"lb1.{batch.key}" for batch in door.stored)


def test_bytes_end_a_batch_and_a_row_is_never_cut() -> None:
    door = Door()
    with writer(door, bytes_max=40) as w:
        w.write([{"id": n, "note": "x" * size} for n, size in enumerate((5, 5, 200, 1))])
    assert [batch.rows for batch in door.stored] == [1, 1, 1, 1]
    assert door.ids == [0, 1, 2, 3]
    assert len(door.stored[2].content) > 200


def test_a_batch_that_lingers_is_sent_without_being_asked() -> None:
    door = Door()
    with writer(door, linger_s=0.0) as w:
        w.write({"id": 1})
        assert door.entered.acquire(timeout=GENEROUS_S)
        assert door.seen[0].rows == 1


def test_columns_are_cut_and_put_together_as_the_limits_say() -> None:
    door = Door()
    with writer(door, rows_max=4) as w:
        w.write({"id": 0})
        w.write(pa.table({"id": [1, 2, 3, 4, 5]}))
        w.write(pa.Table.from_batches([pa.record_batch({"id": [n]}) for n in (6, 7)]))
        w.write(pa.record_batch({"id": [8]}))
        w.write({"id": 9})
    assert [(batch.rows, batch.media_type) for batch in door.stored] == [
        (1, NDJSON), (4, ARROW), (1, ARROW), (2, ARROW), (1, ARROW), (1, NDJSON)
    ]  # fmt: skip
    assert door.ids == list(range(10))


def test_A6_a_batch_is_retried_with_its_key_and_first_attempt() -> None:
    script = [
        None,
        answer_of(429, problem_of("backpressure", retryable=True)),
        answer_of(503, problem_of("outcome_unknown", retryable=True)),
        answer_of(202, accepted(2, replayed=True)),
    ]
    with scripted_server(script) as (url, requests), connect(url, "k") as client:
        with client.writer("t", ordering_key="o") as w:
            w.write(ids(1, 2))
        assert (w.written.rows, w.written.replayed) == (2, 1)
    assert len(requests) == 4
    for name in (b"idempotency-key", b"idempotency-not-before", b"lakebus-ordering-key"):
        assert len({header_of(request, name) for request in requests}) == 1
    assert {body_of(request) for request in requests} == {b'{"id": 1}\n{"id": 2}\n'}
    assert header_of(requests[0], b"content-type").endswith(NDJSON.encode())


def test_what_must_not_be_retried_stops_the_writer_which_hands_everything_back() -> None:
    door = Door(None, RowsInvalid("row 0 is wrong", errors=[]))
    door.open.clear()
    w = writer(door, rows_max=2)
    w.write(ids(0, 1, 2, 3, 4, 5, 6))
    door.open.set()
    with pytest.raises(RowsUnacknowledged) as caught:
        w.close()
    error = caught.value
    assert "row 0 is wrong" in str(error)
    assert [rows_of(batch) for batch in error.batches] == [ids(2, 3), ids(4, 5), ids(6)]
    assert [type(batch.error) for batch in error.batches] == [RowsInvalid, type(None), type(None)]
    assert (error.rows, error.retryable) == (5, False)
    assert door.ids == [0, 1]
    assert len(door.seen) == 2
    copy = pickle.loads(pickle.dumps(error))
    assert [batch.key for batch in copy.batches] == [batch.key for batch in error.batches]


def test_a_writer_that_failed_takes_nothing_until_the_failed_is_taken_from_it() -> None:
    door = Door(RowsInvalid("no"))
    with writer(door, rows_max=1) as w:
        w.write({"id": 0})
        with pytest.raises(RowsUnacknowledged):
            w.flush()
        with pytest.raises(RowsUnacknowledged) as refused:
            w.write(ids(1))
        assert refused.value.members["rows_taken"] == 0
        (failed,) = w.take_failed()
        assert (rows_of(failed), str(failed.error)) == (ids(0), "no")
        w.write(ids(2, 3))
    assert door.ids == [2, 3]


def test_A3_batches_handed_back_are_sent_again_with_their_keys() -> None:
    stored: dict[bytes, bytes] = {}
    fail = True

    def answer(request: bytes) -> bytes | None:
        known = header_of(request, b"idempotency-key") in stored
        stored[header_of(request, b"idempotency-key")] = body_of(request)
        if fail:  # the rows are stored, and the answer says that nobody knows
            return answer_of(503, problem_of("outcome_unknown", retryable=False))
        return answer_of(202, accepted(1, replayed=known))

    with answering(answer) as (url, _), connect(url, "k") as client:
        w = client.writer("t", rows_max=1)
        w.write({"id": 1})
        with pytest.raises(RowsUnacknowledged) as caught:
            w.close()
        fail = False
        (sent,) = client.resend(caught.value.batches)
    assert sent.replayed is True
    assert list(stored.values()) == [b'{"id": 1}\n']


def test_a_full_writer_waits_and_then_says_what_it_has_taken() -> None:
    door = Door()
    door.open.clear()
    w = writer(door, rows_max=2, held_batches_max=2)
    with pytest.raises(WriterFull) as full:
        w.write(ids(*range(10)), timeout_s=0)
    taken = full.value.members["rows_taken"]
    assert taken == 4
    assert full.value.retryable
    assert len(w.unacknowledged) == 2
    rest = threading.Thread(target=w.write, args=(ids(*range(taken, 10)),))
    rest.start()
    door.open.set()
    rest.join()
    assert w.close().rows == 10
    assert door.ids == list(range(10))


def test_the_bytes_that_wait_are_bounded() -> None:
    door = Door()
    door.open.clear()
    w = writer(door, held_bytes_max=1_000)
    taken = 0
    with contextlib.suppress(WriterFull):
        while taken < 100:
            taken += w.write({"id": taken, "note": "x" * 80}, timeout_s=0)
    assert 0 < taken < 20
    assert sum(len(batch.content) for batch in w.unacknowledged) <= 1_000
    assert taken == w.unacknowledged[0].rows + sum(b.rows for b in w.unacknowledged[1:])
    door.open.set()
    assert w.close().rows == taken


def test_what_can_never_be_sent_is_refused_before_it_is_in() -> None:
    door = Door()
    with writer(door) as w:
        with pytest.raises(MalformedBody):
            w.write([{"id": 1}, {"id": object()}])
        with pytest.raises(MalformedBody):
            w.write("rows.csv")
        with pytest.raises(MalformedBody):
            w.write(7)
        with pytest.raises(MalformedBody) as late:
            w.write(row for row in ({"id": 2}, "no row"))
        assert late.value.members["rows_taken"] == 1
    assert door.ids == [2]
    with pytest.raises(MalformedRequest, match="closed"):
        w.write({"id": 3})
    with pytest.raises(MalformedRequest, match="rows_max"):
        writer(door, rows_max=0)
    with pytest.raises(MalformedRequest, match="senders"):
        writer(door, senders=0)


def test_when_the_time_for_closing_is_up_the_rest_is_handed_back() -> None:
    started = threading.Event()
    left = threading.Event()

    def answer(_: bytes) -> bytes | None:
        started.set()
        left.wait(GENEROUS_S)
        return None

    with answering(answer) as (url, _), connect(url, "k") as client:
        w = client.writer("t", rows_max=1, held_batches_max=4)
        w.write(ids(1, 2))
        assert started.wait(GENEROUS_S)
        with pytest.raises(RowsUnacknowledged) as late:
            w.close(timeout_s=0.01)
        left.set()
    assert [rows_of(batch) for batch in late.value.batches] == [ids(1), ids(2)]
    assert late.value.retryable
    assert "not sent any more" in str(late.value)
    assert w.close().rows == 0


def test_a_pause_that_is_too_long_ends_the_retries() -> None:
    door = Door(Backpressure("full", retry_after_s=600))
    w = writer(door, retry_s=30)
    w.write({"id": 1})
    with pytest.raises(RowsUnacknowledged) as caught:
        w.close()
    assert isinstance(caught.value.batches[0].error, Backpressure)
    assert caught.value.retryable


def test_a_fault_of_our_own_is_an_error_too_and_loses_nothing() -> None:
    door = Door(ZeroDivisionError("oops"))
    w = writer(door)
    w.write({"id": 1})
    with pytest.raises(RowsUnacknowledged) as caught:
        w.close()
    assert isinstance(caught.value.batches[0].error, Fault)


def write_and_raise(w: Writer, row: dict[str, int], error: BaseException) -> None:
    with w:
        w.write(row)
        raise error


def test_an_error_of_the_caller_still_sends_and_an_interrupt_does_not_wait() -> None:
    door = Door()
    with pytest.raises(ZeroDivisionError):
        write_and_raise(writer(door), {"id": 1}, ZeroDivisionError())
    assert door.ids == [1]
    w = writer(door)
    with pytest.raises(KeyboardInterrupt) as interrupt:
        write_and_raise(w, {"id": 2}, KeyboardInterrupt())
    assert "1 rows" in interrupt.value.__notes__[0]
    assert w.unacknowledged[0].rows == 1
    assert door.ids == [1]


def test_a_forgotten_writer_is_told_of() -> None:
    w = writer(Door())
    w.write(ids(1, 2))
    told = pytest.warns(RuntimeWarning, match="2 rows have no receipt")
    with told:
        del w


@pytest.fixture
def many() -> Iterator[tuple[Client, dict[bytes, bytes]]]:
    """A server that stores, and loses every fifth answer and refuses every fifth request."""

    stored: dict[bytes, bytes] = {}
    count = 0
    lock = threading.Lock()

    def answer(request: bytes) -> bytes | None:
        nonlocal count
        with lock:
            count += 1
            turn = count % 5
            key = header_of(request, b"idempotency-key")
            known = key in stored
            if turn != 1:
                assert stored.setdefault(key, body_of(request)) == body_of(request)
        if turn == 0:
            return None
        if turn == 1:
            return answer_of(503, problem_of("unavailable", retryable=True))
        return answer_of(202, accepted(1, replayed=known))

    with answering(answer) as (url, _), connect(url, "k") as client:
        yield client, stored


def test_A3_every_row_is_stored_once_by_many_threads_and_senders(
    many: tuple[Client, dict[bytes, bytes]],
) -> None:
    client, stored = many
    with client.writer("t", rows_max=7, senders=3, held_batches_max=4) as w:
        threads = [
            threading.Thread(target=lambda n=n: [w.write({"id": n * 100 + i}) for i in range(15)])
            for n in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert w.flush().rows == 45
    found = [json.loads(line)["id"] for body in stored.values() for line in body.splitlines()]
    assert sorted(found) == sorted(n * 100 + i for n in range(3) for i in range(15))
