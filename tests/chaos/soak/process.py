"""The client process of the soak: `python -m tests.chaos.soak.process CONFIG`.

Orders: `{"do": "stop"}` ends its clients once what is under way has come to its end;
`{"do": "finish"}`, on a drained stack, asks everything once more and answers the figures.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import sys
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lakebus.tokens import TokenCodec
from tests.chaos import source
from tests.chaos.children import obey, say
from tests.chaos.session import Place, Session
from tests.chaos.soak.calls import Caller, GaveUp, Trouble
from tests.chaos.soak.feed import Follower
from tests.chaos.soak.historian import Historian
from tests.chaos.soak.ledger import Deleter, Ledger
from tests.chaos.soak.streams import Streamer
from tests.chaos.soak.tables import LEDGER, READINGS, RECENT
from tests.chaos.soak.writers import FIRST_REQUEST, TableWriter
from tests.history.recorder import Recorder

FOLLOWED = (source.TABLES[0], READINGS, RECENT, LEDGER)


@dataclass(frozen=True, slots=True)
class SoakConfig:
    """A private file, since it holds keys. `admin_key`: of a principal that may do everything."""

    url: str
    admin_key: str
    token_secret: str
    seed: int
    seconds: float
    record: str
    feed: str
    pairs: int = 230
    ledger_writers: int = 2
    streams: int = 2
    pace_s: tuple[float, float] = (0.1, 0.5)

    def write(self, path: Path) -> None:
        path.touch(mode=0o600)
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> SoakConfig:
        values = json.loads(path.read_text())
        return cls(**values | {"pace_s": tuple(values["pace_s"])})


class Soak:
    """All clients, and what they share."""

    def __init__(self, config: SoakConfig) -> None:
        self._config = config
        self._recorder = Recorder.to_file(Path(config.record), process="soak", seed=config.seed)
        self._codec = TokenCodec(bytes.fromhex(config.token_secret))
        self._place = Place(config.url, config.admin_key, "local")
        self._stopping = asyncio.Event()
        self._trouble = Trouble()
        self._numbers = itertools.count(FIRST_REQUEST)
        self._newest = FIRST_REQUEST
        self._tokens: deque[str] = deque(maxlen=20)
        self._snapshots: deque[int] = deque(maxlen=200)
        self._ledger = Ledger()
        self._callers: list[Caller] = []
        self._historian = Historian(
            self._caller,
            self._caller("tags"),
            self._trouble,
            randomness=self._dice("historian"),
            stopping=self._stopping,
            every_s=max(0.3, 0.85 * config.seconds / config.pairs),
            newest=lambda: 2 * (self._newest - FIRST_REQUEST),
        )
        self._deleter = Deleter(
            self._ledger,
            self._caller,
            self._trouble,
            randomness=self._dice("deleter"),
            stopping=self._stopping,
            newest=lambda: self._newest,
            token=lambda: self._tokens[-1] if self._tokens else None,
        )
        self._followers = [
            Follower(
                table,
                self._caller,
                self._trouble,
                randomness=self._dice(f"feed-{table}"),
                stopping=self._stopping,
            )
            for table in FOLLOWED
        ]
        self._streamers = [
            Streamer(
                self._place,
                self._caller,
                self._trouble,
                number=number,
                randomness=self._dice(f"stream-{number}"),
                stopping=self._stopping,
                known=self._old_snapshots,
            )
            for number in range(config.streams)
        ]
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        runs = [
            self._historian.run(),
            self._deleter.run(),
            *(follower.run() for follower in self._followers),
            *(streamer.run() for streamer in self._streamers),
            *(writer.run() for writer in self._writers()),
        ]
        self._tasks = [asyncio.create_task(run) for run in runs]

    async def do(self, order: Mapping[str, Any]) -> Mapping[str, Any]:
        if order["do"] == "stop":
            self._stopping.set()
            # A client ends by itself only by an exception: ours, and not to be hidden.
            for ended in await asyncio.gather(*self._tasks, return_exceptions=True):
                if isinstance(ended, BaseException):
                    self._trouble.add(f"a client of the soak ended: {ended!r}")
            self._recorder.close()
            return {"stopped": True}
        if order["do"] == "finish":
            return await self._finish()
        raise ValueError(f"{order['do']!r} is no order: stop, finish")

    # --- inside ---------------------------------------------------------------------------------

    async def _finish(self) -> Mapping[str, Any]:
        told: dict[str, Any] = {}
        try:
            for follower in self._followers:
                await follower.window()
            told["ledger"] = await self._deleter.finish()
            told["historian"] = await self._historian.finish()
        except GaveUp as error:
            self._trouble.add(f"at the end: {error}")
        told["historian"] = self._historian.told()
        told["feed"] = {
            one.seen.table: {
                "rows": one.seen.rows,
                "windows": one.seen.windows,
                "pages": one.seen.pages,
                "gaps": len(one.seen.gaps),
            }
            for one in self._followers
        }
        told["streams"] = [streamer.told() for streamer in self._streamers]
        told["counts"] = dict(sorted(self._trouble.counts.items()))
        told["problems"] = self._trouble.problems
        Path(self._config.feed).write_text(
            json.dumps(
                {
                    one.seen.table: {"groups": one.seen.groups, "gaps": one.seen.gaps}
                    for one in self._followers
                }
            )
        )
        for caller in self._callers:
            caller.close()
        return told

    def _old_snapshots(self) -> list[int]:
        """Some that are likely to be retained, and tagged ones."""
        recent = [pair.snapshot_id for pair in self._historian.pairs[-6:]]
        tagged = [pair.snapshot_id for pair in self._historian.pairs if pair.tag is not None]
        return [*recent, *self._random_few(tagged)]

    def _random_few(self, numbers: list[int]) -> list[int]:
        return random.Random(len(numbers)).sample(numbers, min(3, len(numbers)))

    def _writers(self) -> Iterable[TableWriter]:
        names = [READINGS, RECENT, *[LEDGER] * self._config.ledger_writers]
        for index, name in enumerate(names):
            yield TableWriter(
                name,
                Session(
                    self._place,
                    name=f"soak-writer-{index}",
                    recorder=self._recorder,
                    codec=self._codec,
                ),
                randomness=self._dice(f"writer-{index}"),
                stopping=self._stopping,
                number=self._number,
                ledger=self._ledger if name == LEDGER else None,
                remember=self._tokens.append,
                pace_s=self._config.pace_s,
            )

    def _number(self) -> int:
        self._newest = next(self._numbers)
        return self._newest

    def _caller(self, name: str) -> Caller:
        caller = Caller(self._place, name=name, trouble=self._trouble)
        self._callers.append(caller)
        return caller

    def _dice(self, name: str) -> random.Random:
        return random.Random(f"soak/{self._config.seed}/{name}")


async def _main(arguments: Iterable[str]) -> None:
    (path,) = arguments
    soak = Soak(SoakConfig.read(Path(path)))
    soak.start()
    say({"running": "soak"})
    await obey(soak.do)


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1:]))
