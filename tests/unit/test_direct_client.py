"""The client's choice between the direct door and Serve's route: by itself, and never wrongly."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

import lakebus
from cluster.api_calls import Api
from lakebus.client import Client
from lakebus.client_door import Door
from lakebus.errors import MalformedRequest, RowsInvalid, VisibilityTimeout
from tests.unit.client_rig import accepted, answer_of, header_of, problem_of
from tests.unit.doors_rig import ID, KEY, Doors, two_doors


def rows_accepted(request: bytes, *headers: str) -> bytes:
    if request.startswith(b"POST /v1/visibility "):
        return answer_of(200, {"visibility_token": "seen"})
    return answer_of(202, accepted(1), *headers)


@pytest.fixture
def doors() -> Iterator[Doors]:
    with two_doors("Lakebus-Ingest-Url", rows_accepted) as made:
        yield made


@contextmanager
def a_client(doors: Doors, ingest_url: str | None = None) -> Iterator[Callable[[str], None]]:
    with lakebus.connect(doors.url, KEY, timeout_s=10, ingest_url=ingest_url) as client:
        yield lambda key: _ingest(client, key)


@contextmanager
def a_command(doors: Doors, ingest_url: str | None = None) -> Iterator[Callable[[str], None]]:
    with Api(doors.url, KEY, timeout_s=10, ingest_url=ingest_url) as api:
        path = "/v1/tables/t/rows"
        yield lambda key: _discard(api.send("POST", path, body=b"[]", key=key, ingest=True))


def _ingest(client: Client, key: str) -> None:
    client.ingest("t", [{"id": 1}], key=key)


def _discard(_: object) -> None:
    return


both = pytest.mark.parametrize("sender", [a_client, a_command], ids=["client", "command"])


@both
def test_the_door_is_learned_asked_and_used(doors: Doors, sender: type) -> None:
    with sender(doors) as send:
        for number in range(3):
            send(f"k{number}")
    doors.assert_learned()


@both
def test_a_door_that_is_given_is_used_at_once(doors: Doors, sender: type) -> None:
    doors.told = None
    with sender(doors, doors.door_url) as send:
        send("k")
    assert (len(doors.served), doors.at_door) == (0, 1)


@both
def test_a_stranger_at_the_address_never_sees_the_key(doors: Doors, sender: type) -> None:
    doors.door_id = "fedcba9876543210"
    with sender(doors) as send:
        for number in range(3):
            send(f"k{number}")
    assert len(doors.served) == 3
    assert len(doors.asked) == 1
    assert KEY.encode() not in doors.asked[0]


#: What a door answers that leaves the request open.
leaves_it_open = pytest.mark.parametrize(
    "answer",
    [
        None,
        answer_of(401, problem_of("unauthenticated", retryable=False)),
        answer_of(503, problem_of("unavailable", retryable=True)),
        answer_of(404, b"Not Found"),
    ],
    ids=["hangs_up", "another_lake", "ends", "no_lakebus"],
)


@both
@leaves_it_open
def test_A3_what_the_door_leaves_open_goes_the_other_way_with_the_same_key(
    doors: Doors, sender: type, answer: bytes | None
) -> None:
    doors.refusal = answer
    with sender(doors) as send:
        for key in ("first", "second", "third"):
            send(key)
    assert doors.at_door == 1  # and then it rests
    assert len(doors.served) == 3
    tried = doors.asked[-1]
    assert header_of(tried, b"idempotency-key") == header_of(doors.served[1], b"idempotency-key")


def test_a_refusal_by_the_door_is_the_answer(doors: Doors) -> None:
    doors.refusal = answer_of(422, problem_of("rows_invalid", retryable=False, errors=[]))
    with a_client(doors, doors.door_url) as send, pytest.raises(RowsInvalid):
        send("k")
    assert doors.served == []


def test_a_door_that_has_failed_is_asked_again_later(doors: Doors) -> None:
    now_s = [0.0]
    door = Door(doors.url, doors.door_url, now_s=lambda: now_s[0])
    assert door.url() == doors.door_url
    door.failed()
    assert door.url() is None
    now_s[0] = 5.1
    assert door.url() == doors.door_url
    door.failed()
    doors.door_id = "x"
    door.learn(f"http://127.0.0.1:1; door={ID}")  # what was given stays
    now_s[0] = 10.3
    assert door.url() == doors.door_url


def test_an_address_that_leads_nowhere_is_tried_less_and_less() -> None:
    now_s = [0.0]
    door = Door("http://127.0.0.1:1", now_s=lambda: now_s[0])
    door.learn(f"http://127.0.0.1:9; door={ID}")
    tries = []
    for _ in range(4000):
        before = door._rest_until_s
        assert door.url() is None
        if door._rest_until_s != before:
            tries.append(now_s[0])
        now_s[0] += 1
    assert tries == [0, 5, 15, 35, 75, 155, 315, 635, 1235, 1835, 2435, 3035, 3635]


@pytest.mark.parametrize(
    "told",
    ["", "http://a:1", f"ftp://a; door={ID}", f"http://a b; door={ID}", f"http://a:1; door={ID}"],
)
def test_what_is_told_is_taken_with_care(told: str) -> None:
    door = Door("https://lake.example")  # a key that came by TLS goes by TLS
    door.learn(told)
    assert door._url is None


def test_an_address_that_is_none_is_not_taken() -> None:
    door = Door("http://lake.example")
    door.learn(f"http://a:99999; door={ID}")
    assert door._url is None
    door.learn(f"https://a:1; door={ID}")
    assert door._url == "https://a:1"


def test_the_own_address_as_ingest_url_means_the_door_is_not_used(doors: Doors) -> None:
    with a_client(doors, doors.url + "/") as send:
        send("k")
        send("l")
    assert (len(doors.served), doors.asked) == (2, [])
    with pytest.raises(MalformedRequest):
        lakebus.connect(doors.url, KEY, ingest_url="nonsense")


def test_a_pickled_client_keeps_its_door(doors: Doors) -> None:
    client = lakebus.connect(doors.url, KEY, ingest_url=doors.door_url)
    with client, pickle.loads(pickle.dumps(client)) as again:
        _ingest(again, "k")
    assert (len(doors.served), doors.at_door) == (0, 1)


# --- waiting for rows --------------------------------------------------------------------------


def waits(requests: list[bytes]) -> int:
    return sum(request.startswith(b"POST /v1/visibility ") for request in requests)


def test_rows_are_waited_for_where_they_went(doors: Doors) -> None:
    with lakebus.connect(doors.url, KEY, timeout_s=10) as client:
        assert client.wait_visible("t0") == "seen"  # where the door is, rows tell
        client.ingest("t", [{"id": 1}])
        assert client.wait_visible("t1") == "seen"
        assert client.wait_visible("t2") == "seen"
    assert (waits(doors.served), waits(doors.asked)) == (1, 2)
    who, *rest = doors.asked  # and never the key before it is known who is there
    assert who.startswith(b"GET /healthz ")
    assert KEY.encode() not in who
    assert all(KEY.encode() in request for request in rest)


async def test_rows_are_waited_for_where_they_went_without_blocking(doors: Doors) -> None:
    async with lakebus.connect_async(
        doors.url, KEY, timeout_s=10, ingest_url=doors.door_url
    ) as client:
        assert await client.wait_visible("t") == "seen"
    assert (waits(doors.served), waits(doors.asked)) == (0, 1)


def test_a_command_waits_where_its_rows_went(doors: Doors) -> None:
    with Api(doors.url, KEY, timeout_s=10) as api:
        api.send("POST", "/v1/tables/t/rows", body=b"[]", key="k", ingest=True)
        assert api.client.wait_visible("t") == "seen"
    assert (waits(doors.served), waits(doors.asked)) == (0, 1)


@leaves_it_open
def test_D4_a_wait_that_the_door_leaves_open_goes_on_by_the_other_way(
    doors: Doors, answer: bytes | None
) -> None:
    doors.refusal = answer
    with lakebus.connect(doors.url, KEY, timeout_s=10, ingest_url=doors.door_url) as client:
        assert client.wait_visible("t0") == "seen"
        assert client.wait_visible("t1") == "seen"
        client.ingest("t", [{"id": 1}])  # one door: it rests for rows, too
    assert (waits(doors.served), waits(doors.asked)) == (2, 1)
    assert doors.at_door == 1


def test_D4_a_wait_that_ran_out_at_the_door_has_run_out(doors: Doors) -> None:
    doors.refusal = answer_of(504, problem_of("visibility_timeout", retryable=False))
    with lakebus.connect(doors.url, KEY, timeout_s=10, ingest_url=doors.door_url) as client:
        with pytest.raises(VisibilityTimeout):
            client.wait_visible("t", timeout_s=0.05)
        doors.refusal = b""
        client.ingest("t", [{"id": 1}])  # and the door is as good as before
    assert (doors.served, doors.at_door) == ([], 2)


def test_the_own_address_as_ingest_url_is_for_waits_too(doors: Doors) -> None:
    with lakebus.connect(doors.url, KEY, timeout_s=10, ingest_url=doors.url) as client:
        client.ingest("t", [{"id": 1}])
        assert client.wait_visible("t") == "seen"
    assert (waits(doors.served), doors.asked) == (1, [])
