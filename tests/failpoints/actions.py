"""What may happen at a failpoint, as values that can travel to another process."""

from __future__ import annotations

import importlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Crash:
    """The process is gone, as by SIGKILL: no handler runs, nothing is flushed."""


@dataclass(frozen=True, slots=True)
class Stop:
    """The process is stopped (SIGSTOP) until somebody sends it SIGCONT: a pause of everything."""


@dataclass(frozen=True, slots=True)
class Delay:
    """The caller goes on after so long; others of its process go on meanwhile."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Raise:
    """The caller meets this error. For another process it is made again from type and words."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class Pause:
    """The caller waits until the test resumes it; after `within_s` it fails instead of hanging."""

    within_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Run:
    """The test's own function runs here. Only in the test's process."""

    function: Callable[[], Awaitable[object] | None]


Action = Crash | Stop | Delay | Raise | Pause | Run


def to_json(action: Action) -> dict[str, Any]:
    match action:
        case Delay(seconds):
            return {"action": "delay", "seconds": seconds}
        case Raise(error):
            kind = type(error)
            return {
                "action": "raise",
                "type": f"{kind.__module__}:{kind.__qualname__}",
                "words": str(error),
            }
        case Pause(within_s):
            return {"action": "pause", "within_s": within_s}
        case Crash():
            return {"action": "crash"}
        case Stop():
            return {"action": "stop"}
        case Run():
            raise ValueError("a function of the test cannot run in another process; use Pause")


def from_json(given: dict[str, Any]) -> Action:
    match given["action"]:
        case "delay":
            return Delay(given["seconds"])
        case "raise":
            module, _, name = given["type"].partition(":")
            made = getattr(importlib.import_module(module), name)(given["words"])
            return Raise(made)
        case "pause":
            return Pause(given["within_s"])
        case "crash":
            return Crash()
        case "stop":
            return Stop()
        case other:
            raise ValueError(f"no failpoint action is called {other}")
