"""What an answer of the server says about an operation: yes, no, or nobody knows.

Answers that the balancer in front makes by itself (documented in docs/errors.md) have no code; they
say nothing about the effect. An answer of ours always has a code: any other answer, and any error
that our own code did not expect (`internal_error`, `corrupt`), is a finding.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from benchmarks.http1 import Answer

#: Beginnings of what HAProxy and Ray Serve say in our place: no server is there, no application is
#: deployed yet, a request was dropped or took too long.
_FRONT = (b"Internal Server Error", b"Service Unavailable", b"Path '", b"Request ")
#: Ours, and never to be given.
FAULTS = frozenset({"internal_error", "corrupt", "start_refused", "configuration_error"})


class Says(StrEnum):
    YES = "yes"
    CODE = "code"  # one of our codes, see `code`
    FRONT = "front"  # the balancer's own words
    UNTYPED = "untyped"  # nobody may answer like this


@dataclass(frozen=True, slots=True)
class Verdict:
    """`code` is ours for CODE; for the others a word about what came."""

    says: Says
    code: str = ""
    detail: str = ""

    @property
    def finding(self) -> str | None:
        """What is wrong with the answer itself, if anything."""
        if self.says is Says.UNTYPED or (self.says is Says.CODE and self.code in FAULTS):
            return f"{self.code}: {self.detail}"
        return None


def judge(answer: Answer) -> Verdict:
    """What an HTTP answer says."""
    if 200 <= answer.status < 300:
        return Verdict(Says.YES)
    code = answer.code
    if code:
        detail = answer.json().get("detail", "")
        return Verdict(Says.CODE, code, f"{answer.status} {detail}"[:300])
    shown = f"{answer.status} {answer.body[:200]!r}"
    plain = answer.headers.get("content-type", "").startswith("text/plain")
    if plain and answer.body.startswith(_FRONT):
        return Verdict(Says.FRONT, f"front_{answer.status}", shown)
    return Verdict(Says.UNTYPED, f"untyped_{answer.status}", shown)
