"""What the proxy is told to do: rules, and what became of each."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum


class Act(StrEnum):
    """What happens to the bytes."""

    DROP = "drop"  # they vanish from here on, without a word: a black hole
    HOLD = "hold"  # they wait until the rule is lifted, then go on: a pause, a healed partition
    DELAY = "delay"  # they go on after `delay_s`
    RESET = "reset"  # both sides get a reset
    HALF_CLOSE = "half_close"  # the receiver is told that nothing more comes; the other way lives
    CUT = "cut"  # the server finishes and is heard; the client gets a reset instead of the reply


class Way(StrEnum):
    TO_SERVER = "to_server"
    TO_CLIENT = "to_client"
    BOTH = "both"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One fault, and where it strikes. All conditions that are set must hold.

    With `sql` (part of a statement's text, a function's name for example; any case; "" is every
    statement) it strikes at a statement: `TO_SERVER` and `BOTH` before the request goes on, so the
    server has not begun; `TO_CLIENT` once the server has sent all of its answer (ReadyForQuery),
    before any of it goes on. CUT is always the latter. Without `sql` it strikes whole connections,
    those that are open and those to come, with `after_bytes` once their `way` has carried so many
    more bytes.

    :param connection: the n-th connection since the proxy started, from 1.
    :param application: the connection's application_name, exactly.
    :param skip: so many matches pass by first.
    :param times: how often it strikes; None: always.
    :param probability: of striking at a match; drawn from the proxy's seed and the connection's
        number, so that a run can be repeated.
    :param withhold_bytes: HOLD at a statement: all but its last bytes go on (a client that was
        paused while it sent).
    """

    act: Act
    name: str = ""
    sql: str | None = None
    connection: int | None = None
    application: str | None = None
    way: Way = Way.BOTH
    skip: int = 0
    times: int | None = 1
    probability: float = 1.0
    delay_s: float = 0.0
    after_bytes: int | None = None
    withhold_bytes: int = 0

    def __post_init__(self) -> None:
        if self.act is Act.CUT and self.sql is None:
            raise ValueError('a cut needs `sql`: the statement whose reply is lost ("" is any)')
        if self.act is Act.DELAY and self.delay_s <= 0:
            raise ValueError("a delay needs `delay_s` above zero")
        if self.after_bytes is not None and (self.sql is not None or self.way is Way.BOTH):
            raise ValueError("`after_bytes` needs one `way`, and no `sql`")
        if self.withhold_bytes and (self.act is not Act.HOLD or self.sql is None):
            raise ValueError("`withhold_bytes` belongs to a HOLD with `sql`")

    @property
    def at_reply(self) -> bool:
        return self.sql is not None and (self.act is Act.CUT or self.way is Way.TO_CLIENT)

    def ways(self) -> tuple[Way, ...]:
        return (Way.TO_SERVER, Way.TO_CLIENT) if self.way is Way.BOTH else (self.way,)


@dataclass(frozen=True, slots=True)
class Fired:
    """One strike. When the rule struck at a reply, `tag` and `status` are the server's answer: that
    of CommandComplete, or SUSPENDED when as many rows came as were asked for, and I when no
    transaction is open, T in one, E in a failed one."""

    rule: str
    connection: int
    application: str = ""
    sql: str = ""
    tag: str = ""
    status: str = ""

    @property
    def committed(self) -> bool:
        """The server finished the statement without an error, and no transaction is open."""

        return bool(self.tag) and self.status == "I"

    def as_json(self) -> dict[str, object]:
        return dataclasses.asdict(self) | {"committed": self.committed}


class Armed:
    """A rule at work. `fired` grows with each strike; `lift` ends the rule and lets go of what it
    holds. A connection that has lost bytes stays dead, as it would be."""

    def __init__(
        self, rule: Rule, *, seed: int = 0, on_fired: Callable[[Fired], None] | None = None
    ) -> None:
        self.rule = rule
        self.fired: list[Fired] = []
        self.lifted = asyncio.Event()
        self._seed = seed
        self._on_fired = on_fired
        self._left_to_skip = rule.skip
        self._taken = 0  # strikes, and matches whose strike is still to come
        self._changed = asyncio.Event()
        self._dice: dict[int, random.Random] = {}

    @property
    def live(self) -> bool:
        times = self.rule.times
        return not self.lifted.is_set() and (times is None or self._taken < times)

    def lift(self) -> None:
        self.lifted.set()

    async def struck(self, count: int = 1) -> Fired:
        """Waits for the `count`-th strike and returns it."""

        while len(self.fired) < count:
            self._changed.clear()
            await self._changed.wait()
        return self.fired[count - 1]

    def note(self, fired: Fired) -> None:
        self.fired.append(fired)
        self._changed.set()
        if self._on_fired is not None:
            self._on_fired(fired)

    def matches(self, *, connection: int, application: str, sql: str | None) -> bool:
        """Whether it strikes here and now. Each call that comes so far counts as one match."""

        rule = self.rule
        if (
            not self.live
            or rule.connection not in (None, connection)
            or rule.application not in (None, application)
            or (rule.sql is None) != (sql is None)
            or (sql is not None and (rule.sql or "").lower() not in sql.lower())
        ):
            return False
        if self._left_to_skip:
            self._left_to_skip -= 1
            return False
        if rule.probability < 1.0:
            if connection not in self._dice:
                self._dice[connection] = random.Random(f"{self._seed}/{rule.name}/{connection}")
            if self._dice[connection].random() >= rule.probability:
                return False
        self._taken += 1
        return True
