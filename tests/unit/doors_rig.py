"""What tests of the client's choice between two doors talk to: Serve's route and a direct door."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from tests.unit.client_rig import answer_of, answering

KEY, ID = "lbk_test", "0123456789abcdef"


class AnswerTo(Protocol):
    def __call__(self, request: bytes, /, *headers: str) -> bytes: ...


@dataclass
class Doors:
    """Both addresses, and what each was asked. `header`: by which Serve's route tells of the door.
    `refusal`: what the door answers instead of what `answer` says; None: it hangs up."""

    header: str
    answer: AnswerTo
    url: str = ""
    door_url: str = ""
    told: str | None = None
    door_id: str = ID
    refusal: bytes | None = b""
    served: list[bytes] = field(default_factory=list)
    asked: list[bytes] = field(default_factory=list)

    def by_serve(self, request: bytes) -> bytes:
        told = [] if self.told is None else [f"{self.header}: {self.told}"]
        return self.answer(request, *told)

    def by_door(self, request: bytes) -> bytes | None:
        if request.startswith(b"GET /healthz "):
            return answer_of(200, {"status": "ok"}, f"Lakebus-Door: {self.door_id}")
        return self.answer(request) if self.refusal == b"" else self.refusal

    @property
    def at_door(self) -> int:
        """Requests there, besides who it is."""

        return sum(request.startswith(b"POST") for request in self.asked)

    def assert_learned(self) -> None:
        """Of three requests the first told of the door, which was asked who it is, without the key,
        and had the others."""

        assert (len(self.served), self.at_door) == (1, 2)
        asked, *rest = self.asked
        assert asked.startswith(b"GET /healthz ")
        assert KEY.encode() not in asked
        assert all(KEY.encode() in request for request in rest)


@contextmanager
def two_doors(header: str, answer: AnswerTo) -> Iterator[Doors]:
    made = Doors(header, answer)
    with ExitStack() as stack:
        made.url, made.served = stack.enter_context(answering(made.by_serve))
        made.door_url, made.asked = stack.enter_context(answering(made.by_door))
        made.told = f"{made.door_url}; door={ID}"
        yield made
