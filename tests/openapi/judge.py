"""What is held against an answer: the description, and that a refusal leaves nothing behind."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import requests
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import Failure, FailureGroup
from schemathesis.core.transport import Response
from schemathesis.specs.openapi.checks import (
    allow_header_conformance,
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from tests.openapi.cases import AnyCase
from tests.openapi.world import BASE_URL, Answered, World

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
    allow_header_conformance,
]
#: Refusals that come after the rows were stored: they tell what became of them.
_AFTERWARDS = (b'"code":"quarantined"', b'"code":"outcome_unknown"')


@dataclass(slots=True)
class Judge:
    """Sends cases to a world and says what is wrong with the answers. `answers` counts them by
    operation and status; `unsendable` those that no client could send."""

    world: World
    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    unsendable: int = 0

    async def faults(self, case: AnyCase, *, accept: str | None = None) -> list[str]:
        """Sends the request; what is wrong with its answer, in words."""

        request = self._prepared(case, accept)
        if request is None:
            self.unsendable += 1
            return []
        try:
            answered = await self.world.ask(request)
        except TimeoutError:
            return [f"{case.operation.label}: the request never ends"]
        self.answers[(case.operation.label, answered.status)] += 1
        return [*_described(case, request, answered), *left(case.operation.label, answered)]

    def _prepared(self, case: AnyCase, accept: str | None) -> requests.PreparedRequest | None:
        headers = {"Authorization": f"Bearer {self.world.lake.key}"}
        if accept is not None:
            headers["Accept"] = accept
        arguments = case.as_transport_kwargs(base_url=BASE_URL, headers=headers)
        try:
            return requests.Request(**arguments).prepare()
        except (requests.RequestException, UnicodeError, ValueError):
            return None


def _described(case: AnyCase, request: requests.PreparedRequest, answered: Answered) -> list[str]:
    case.freeze_metadata()
    response = Response(
        status_code=answered.status,
        headers=answered.headers,
        content=answered.body,
        request=request,
        elapsed=0.0,
        verify=False,
    )
    try:
        case.validate_response(response, checks=CHECKS)
    except FailureGroup as group:
        return [_words(case, request, answered, failure) for failure in group.exceptions]
    return []


def _words(
    case: AnyCase, request: requests.PreparedRequest, answered: Answered, failure: Any
) -> str:
    title = failure.title if isinstance(failure, Failure) else type(failure).__name__
    return (
        f"{case.operation.label}: {title}: {failure}\n"
        f"  {request.method} {request.url}\n  {dict(request.headers)}\n  {request.body!r:.600}\n"
        f"  -> {answered.status} {answered.body[:600]!r}"
    )


def left(operation: str, answered: Answered) -> list[str]:
    """A refused request leaves nothing, and no request leaves bytes or queries held."""

    faults = []
    label = f"{operation} -> {answered.status} {answered.body[:300]!r}"
    if answered.held_bytes:
        faults.append(f"{label}: {answered.held_bytes} bytes are held for ever")
    if answered.running:
        faults.append(f"{label}: a query still runs")
    stored = any(word in answered.body for word in _AFTERWARDS)
    if answered.status >= 400 and not stored and answered.before != answered.after:
        faults.append(f"{label}: left something: {answered.before} -> {answered.after}")
    return faults
