"""One seed: simulated, judged, and summed up."""

from __future__ import annotations

import gc
import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec

from tests.history.checker import check
from tests.history.end_state import EndState, dump_memory
from tests.history.record import History, Line, encode_line
from tests.simulation.event_loop import Hang, SimulatedLoop
from tests.simulation.world import Plan, World

#: How many runs share one garbage collection; tasks and their frames are cycles.
_COLLECT_EVERY = 25


@dataclass(frozen=True, slots=True)
class Run:
    """What came of a seed. `problems` is empty when everything held."""

    seed: int
    problems: tuple[str, ...]
    digest: str
    steps: int
    virtual_s: float
    outcomes: Counter[str]
    faults: Counter[str]
    plan: Plan
    lines: tuple[Line, ...]
    history: History
    end_state: EndState


def simulate(seed: int) -> Run:
    """One schedule from its seed to the verdict."""

    world = World(seed)
    try:
        problems = world.loop.run(world.live())
    except Hang as hang:
        problems = [*world.problems, f"hang: {hang}"]
    problems += world.loop.complaints + unseen_errors(world.loop)
    world.loop.close()
    history = world.recorder.history()
    end_state = _end_state(world)
    problems += [str(anomaly) for anomaly in check(history, end_state).anomalies]
    return Run(
        seed=seed,
        problems=tuple(problems),
        digest=_digest(world, end_state),
        steps=world.loop.steps,
        virtual_s=world.loop.time(),
        outcomes=world.outcomes,
        faults=world.faults.counts + world.network.counts,
        plan=world.plan,
        lines=world.recorder.lines,
        history=history,
        end_state=end_state,
    )


@contextmanager
def many_runs() -> Iterator[None]:
    """Runs are quiet here, and garbage is collected by `tidy`, not in between."""

    was_disabled, was_enabled = logging.root.manager.disable, gc.isenabled()
    logging.disable(logging.CRITICAL)
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        logging.disable(was_disabled)
        gc.unfreeze()
        if was_enabled:
            gc.enable()
        gc.collect()


def simulate_all(seeds: Iterable[int]) -> list[Run]:
    """Some runs, one after the other: what a process of its own is given to do."""

    with many_runs():
        return [simulate(seed) for seed in seeds]


def tidy(done: int) -> None:
    """To be called after each of many runs."""

    if done % _COLLECT_EVERY == 0:
        gc.collect()


def unseen_errors(loop: SimulatedLoop) -> list[str]:
    """Tasks of living processes that failed, and nobody ever asked."""

    return [
        f"nobody looked at the failure of {task.get_name()} in {process.name}: {task.exception()!r}"
        for process in loop.processes
        if process.alive
        for task in process.tasks
        if task.done() and getattr(task, "_log_traceback", False)
    ]


def _end_state(world: World) -> EndState:
    end_state = dump_memory(world.lake, drained=world.is_drained())
    files = {str(file_id): row.file for file_id, row in world.lake.state.files.items()}
    return msgspec.structs.replace(
        end_state,
        files=tuple(
            msgspec.structs.replace(fact, present=world.has_object(files[fact.file_id]))
            for fact in end_state.files
        ),
    )


def _digest(world: World, end_state: EndState) -> str:
    """Of everything that was told, and of what was true in the end."""

    digest = hashlib.sha256(b"".join(map(encode_line, world.recorder.lines)))
    digest.update(msgspec.json.encode(end_state))
    digest.update(f"{world.loop.steps} {world.loop.time()!r}".encode())
    return digest.hexdigest()
