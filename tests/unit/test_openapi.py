"""`/openapi.json` is true to the service: no status, member, header or form that it does not name.

`python -m tests.openapi` does the same for as long as it is given, and with DuckDB.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest

from serve_app.app import API_ROUTES, QUERY_ROUTES
from serve_app.openapi import describe
from tests.openapi.judge import left
from tests.openapi.run import session
from tests.openapi.world import Answered

#: What needs another request that runs at the same time; `test_http_query` has it.
_NOT_ALONE = {"DELETE /v1/queries/{query_id}"}


def test_every_boundary_of_the_description_is_answered_as_described() -> None:
    with session() as one:
        one.boundaries()
    assert not one.findings.faults, "\n\n".join(one.findings.faults[:5])
    assert one.findings.requests > 1_000
    assert set(one.findings.never_well) <= _NOT_ALONE


@pytest.mark.parametrize("half", [0, 1])
def test_random_requests_are_answered_as_described(half: int) -> None:
    with session() as one:
        for operation in one.operations[half::2]:
            one.random(operation.label, examples=8, seed=2026)
    assert not one.findings.faults, "\n\n".join(one.findings.faults[:5])


def _no_400(document: Any) -> None:
    del document["paths"]["/v1/tables"]["get"]["responses"]["400"]


def _other_code(document: Any) -> None:
    document["components"]["schemas"]["MalformedRequest"]["properties"]["code"] = {"const": "x"}


def _less_members(document: Any) -> None:
    shape = document["paths"]["/v1/tables"]["get"]["responses"]["200"]["content"]
    del shape["application/json"]["schema"]["properties"]["snapshot_id"]
    shape["application/json"]["schema"]["required"].remove("snapshot_id")


def _more_headers(document: Any) -> None:
    headers = document["paths"]["/v1/tables"]["get"]["responses"]["200"]["headers"]
    headers["Nothing"] = {"required": True, "schema": {"type": "string"}}


def _other_form(document: Any) -> None:
    answer = document["paths"]["/v1/tables"]["get"]["responses"]["200"]
    answer["content"] = {"text/plain": {"schema": {}}}


def _stricter(document: Any) -> None:
    limit, _ = document["paths"]["/v1/snapshots"]["get"]["parameters"]
    limit["schema"]["maximum"] = 10


SPOILED = (_no_400, _other_code, _less_members, _more_headers, _other_form, _stricter)


def test_a_description_that_is_not_true_is_found_out() -> None:
    with session() as one:
        for spoil in SPOILED:
            document = copy.deepcopy(one.document)
            spoil(document)
            one.hold_to(document)
            one.findings.faults.clear()
            one.boundaries("GET /v1/tables", "GET /v1/snapshots")
            assert one.findings.faults, spoil.__name__


def test_what_a_refused_request_leaves_is_found_out() -> None:
    nothing = Answered(404, {}, b"", (1, 2), (1, 2), 0, 0)
    assert not left("GET /", nothing)
    for spoiled in (
        dataclasses.replace(nothing, after=(1, 3)),
        dataclasses.replace(nothing, held_bytes=1),
        dataclasses.replace(nothing, running=1),
    ):
        assert len(left("GET /", spoiled)) == 1
    assert not left("GET /", dataclasses.replace(nothing, status=201, after=(1, 3)))


def test_every_operation_says_what_it_answers() -> None:
    """No `default` that would allow everything, and a shape for each form that has one."""

    for path, methods in describe([*API_ROUTES, *QUERY_ROUTES])["paths"].items():  # type: ignore[attr-defined]
        for method, operation in methods.items():
            answers = operation["responses"]
            assert "default" not in answers, (method, path)
            for status, answer in answers.items():
                told = answer["content"]
                shape = told.get("application/json") or told.get("application/problem+json")
                assert shape["schema"], (method, path, status)
