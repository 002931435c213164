"""A client process of the chaos run: `python -m tests.chaos.workload CONFIG`.

It says so on its standard output once its clients have begun, goes on until its standard
input ends, lets what is under way come to an end, and leaves its record in the run's folder.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from lakebus.tokens import TokenCodec
from tests.chaos.children import say
from tests.chaos.clients import Known, Pace, Probe, Reader, Writer
from tests.chaos.session import Place, Session
from tests.history.recorder import Recorder

#: Clients whose clock is right, an hour late, an hour early.
_SKEWS_S = (0.0, 3600.0, -3600.0)


@dataclass(frozen=True, slots=True)
class WorkloadConfig:
    """What a client process is told; a private file, since it holds keys.

    :param index: which of `processes` it is; request numbers are dealt out round robin.
    """

    url: str
    api_keys: dict[str, str]
    token_secret: str
    seed: int
    index: int
    processes: int
    record: str
    writers: int = 3
    readers: int = 2
    pace_s: tuple[float, float] = (0.02, 0.12)
    whole_every_s: float = 20.0

    @property
    def process(self) -> str:
        return f"clients-{self.index}"

    def write(self, path: Path) -> None:
        path.touch(mode=0o600)
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> WorkloadConfig:
        values = json.loads(path.read_text())
        return cls(**values | {"pace_s": tuple(values["pace_s"])})


async def run(config: WorkloadConfig, ended: asyncio.Event) -> None:
    """Runs the clients until `ended`, and then to the end of what they do."""
    recorder = Recorder.to_file(Path(config.record), process=config.process, seed=config.seed)
    numbers = itertools.count(config.index + config.processes, config.processes)
    known = Known(numbers=lambda: next(numbers))
    clients = _clients(config, known, recorder)
    tasks = [asyncio.create_task(client.run()) for client in clients]
    say({"running": config.process})
    ending = asyncio.create_task(ended.wait())
    try:
        # A client ends by itself only by an exception: ours, and not to be hidden.
        await asyncio.wait((*tasks, ending), return_when=asyncio.FIRST_COMPLETED)
        known.stopping.set()
        await asyncio.gather(*tasks)
    finally:
        ending.cancel()
        recorder.close()


def _clients(
    config: WorkloadConfig, known: Known, recorder: Recorder
) -> list[Writer | Reader | Probe]:
    codec = TokenCodec(bytes.fromhex(config.token_secret))
    principals = sorted(config.api_keys)
    pace = Pace(*config.pace_s)

    def session(name: str, number: int, *, timeout_s: float = 25.0) -> Session:
        principal = principals[number % len(principals)]
        return Session(
            Place(config.url, config.api_keys[principal], principal),
            name=f"{config.process}-{name}",
            recorder=recorder,
            codec=codec,
            timeout_s=timeout_s,
        )

    def dice(name: str) -> random.Random:
        return random.Random(f"chaos/{config.seed}/{config.process}/{name}")

    made: list[Writer | Reader | Probe] = [
        Writer(
            session(f"writer-{n}", n),
            known,
            randomness=dice(f"writer-{n}"),
            pace=pace,
            clock_skew_s=_SKEWS_S[(n + config.index) % len(_SKEWS_S)],
        )
        for n in range(config.writers)
    ]
    made += [
        Reader(
            session(f"reader-{n}", n),
            known,
            randomness=dice(f"reader-{n}"),
            pace=pace,
            whole_every_s=config.whole_every_s,
        )
        for n in range(config.readers)
    ]
    made.append(Probe(session("probe", 0, timeout_s=6.0), known))
    return made


async def _main(arguments: Iterable[str]) -> None:
    (path,) = arguments
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    descriptor = sys.stdin.fileno()
    loop.add_reader(descriptor, lambda: None if os.read(descriptor, 4096) else ended.set())
    await run(WorkloadConfig.read(Path(path)), ended)


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1:]))
