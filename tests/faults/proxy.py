"""A TCP proxy that makes faults at exact moments: the wire between a process and its database.

It understands as much of the PostgreSQL protocol as it needs to strike at a statement, above all
to lose the reply of one that has committed; in TCP mode it carries bytes (HTTP). What can be asked
of it is in `tests/faults/rules.py`.

    async with Proxy("127.0.0.1", 5432) as proxy:
        lost = proxy.arm(Rule(act=Act.CUT, sql="append_group"))
        ...  # a client of proxy.dsn(dsn)
        assert (await lost.struck()).committed

As a process of its own it is told what to do on its standard input and says what happened on its
output, a JSON object a line:

    python -m tests.faults.proxy --upstream 127.0.0.1:5432 --seed 7
    {"do": "arm", "rule": {"name": "lost", "act": "cut", "sql": "publish(", "probability": 0.01,
                           "times": null}}
    {"do": "lift", "name": "lost"}
    {"do": "bandwidth", "way": "to_client", "bytes_per_s": 100000}    (null: as fast as it goes)
    {"do": "reset"}                                                   (every connection, now)
    {"do": "quit"}

It answers each line with {"done": ...} or {"error": ...} and says {"port": ...} first and
{"fired": {...}} at each strike. It ends at the end of its input, so it does not outlive its owner.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any, Self
from urllib.parse import urlsplit, urlunsplit

from tests.faults.link import Broken, Link
from tests.faults.rules import Act, Armed, Fired, Rule, Way

__all__ = ["Act", "Armed", "Fired", "Proxy", "Rule", "Way"]


class Proxy:
    """Listens on the loopback and carries to `host`:`port`, which may change between connections.

    :param postgres: False: plain TCP, where rules know connections and bytes only.
    :param listen_port: 0: a free one; see `listening_port`.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        postgres: bool = True,
        seed: int = 0,
        listen_port: int = 0,
        on_fired: Callable[[Fired], None] | None = None,
    ) -> None:
        self.host = host
        self.port = port
        self._postgres = postgres
        self._seed = seed
        self._listen_port = listen_port
        self._on_fired = on_fired
        self._server: asyncio.Server | None = None
        self._armed: list[Armed] = []
        self._links: list[Link] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._bandwidth: dict[Way, float] = {}
        self._begun = 0

    @classmethod
    def before(cls, dsn: str, *, seed: int = 0) -> Proxy:
        """A proxy before the server of a DSN."""

        parts = urlsplit(dsn)
        return cls(parts.hostname or "127.0.0.1", parts.port or 5432, seed=seed)

    def dsn(self, dsn: str) -> str:
        """The same database, reached through here."""

        parts = urlsplit(dsn)
        login, at, _ = parts.netloc.rpartition("@")
        return urlunsplit(parts._replace(netloc=f"{login}{at}127.0.0.1:{self.listening_port}"))

    @property
    def listening_port(self) -> int:
        if self._server is None:
            raise RuntimeError("the proxy was not started")
        return int(self._server.sockets[0].getsockname()[1])

    @property
    def connections(self) -> list[tuple[int, str]]:
        """(number, application_name) of those that are open."""

        return [(link.number, link.application) for link in self._links if link.number]

    def upstream_ports(self) -> list[int]:
        """The ports it speaks to the server from (`client_port` in pg_stat_activity)."""

        return [
            int(link.up.writer.get_extra_info("sockname")[1]) for link in self._links if link.number
        ]

    # --- life -----------------------------------------------------------------------------------

    async def start(self) -> int:
        """Returns the port it listens on."""

        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self._listen_port)
        return self.listening_port

    async def stop(self) -> None:
        """Resets every connection and lets go of everything held."""

        if self._server is not None:
            self._server.close()
        self.reset()
        for armed in self._armed:
            armed.lift()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0)  # aborted transports close in the loop's next turn

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.stop()

    # --- faults ---------------------------------------------------------------------------------

    def arm(self, rule: Rule) -> Armed:
        """Puts a rule to work; one for whole connections strikes those that are open at once."""

        if not self._postgres and (rule.sql is not None or rule.application is not None):
            raise ValueError("plain TCP has no statements and no application names")
        armed = Armed(rule, seed=self._seed, on_fired=self._on_fired)
        self._armed.append(armed)
        for link in tuple(self._links):
            if link.number and armed.matches(
                connection=link.number, application=link.application, sql=None
            ):
                link.strike(armed)
        return armed

    def set_bandwidth(self, way: Way, bytes_per_s: float | None) -> None:
        """How fast each connection may be in this direction; None: no bound."""

        for one in (Way.TO_SERVER, Way.TO_CLIENT) if way is Way.BOTH else (way,):
            if bytes_per_s is None:
                self._bandwidth.pop(one, None)
            else:
                self._bandwidth[one] = bytes_per_s

    def reset(self) -> None:
        """Resets every connection that is open now."""

        for link in tuple(self._links):
            link.reset()

    # --- connections ----------------------------------------------------------------------------

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            server = await asyncio.open_connection(self.host, self.port)
        except (OSError, asyncio.CancelledError):
            writer.transport.abort()
            return
        link = Link(
            client=(reader, writer),
            server=server,
            bandwidth=self._bandwidth,
            begin=self._begin,
            matching=self._matching,
        )
        self._links.append(link)
        try:
            await (link.carry_postgres() if self._postgres else link.carry_bytes())
        except (Broken, OSError, asyncio.CancelledError):
            link.reset()  # an end like any other: a peer reset the connection, or we did
        else:
            for side in (writer, server[1]):
                side.close()
        finally:
            self._links.remove(link)

    def _begin(self, link: Link) -> None:
        self._begun += 1
        link.number = self._begun
        for armed in tuple(self._armed):
            if armed.matches(connection=link.number, application=link.application, sql=None):
                link.strike(armed)

    def _matching(self, link: Link, sql: str) -> list[Armed]:
        return [
            armed
            for armed in tuple(self._armed)
            if armed.matches(connection=link.number, application=link.application, sql=sql)
        ]


# --- as a process ---------------------------------------------------------------------------------


def rule_from_json(document: dict[str, Any]) -> Rule:
    """Raises ValueError or TypeError for what is no rule."""

    values = dict(document)
    values["act"] = Act(values["act"])
    values["way"] = Way(values.get("way", Way.BOTH))
    return Rule(**values)


class _Console:
    """The proxy's standard input and output."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self._rules: dict[str, Armed] = {}

    async def run(self) -> None:
        say({"port": await self._proxy.start()})
        reader = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        try:
            while line := await reader.readline():
                try:
                    order = json.loads(line)
                    if order["do"] == "quit":
                        return
                    self._obey(order)
                except (ValueError, TypeError, KeyError) as error:
                    say({"error": f"{type(error).__name__}: {error}"})
                else:
                    say({"done": order["do"]})
        finally:
            await self._proxy.stop()

    def _obey(self, order: dict[str, Any]) -> None:
        match order["do"]:
            case "arm":
                rule = rule_from_json(order["rule"])
                self._rules[rule.name] = self._proxy.arm(rule)
            case "lift":
                self._rules.pop(order["name"]).lift()
            case "bandwidth":
                self._proxy.set_bandwidth(Way(order["way"]), order["bytes_per_s"])
            case "reset":
                self._proxy.reset()
            case unknown:
                raise ValueError(f"{unknown!r} is no order: arm, lift, bandwidth, reset, quit")


def say(document: dict[str, object]) -> None:
    print(json.dumps(document), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.proxy", description=__doc__)
    parser.add_argument("--upstream", required=True, metavar="HOST:PORT")
    parser.add_argument("--listen", type=int, default=0, metavar="PORT")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tcp", action="store_true", help="carry bytes, understand nothing")
    chosen = parser.parse_args()
    host, _, port = chosen.upstream.rpartition(":")
    proxy = Proxy(
        host,
        int(port),
        postgres=not chosen.tcp,
        seed=chosen.seed,
        listen_port=chosen.listen,
        on_fired=lambda fired: say({"fired": fired.as_json()}),
    )
    asyncio.run(_Console(proxy).run())


if __name__ == "__main__":
    main()
