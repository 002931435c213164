"""`python -m benchmarks.fairness [--quick]`: what a flood by one principal does to another.

The victim is one client that asks, waits for the answer, and asks again after a short pause. It is
measured alone and beside a flood, in windows that alternate, so that a drift of the machine meets
both. The flood is a process of its own with many clients that never pause, under another
principal; nobody has a quota, so what keeps them apart is shares alone. Three scenes: rows beside
rows, queries beside the same small queries, and queries beside heavy ones. All of it (stack,
victim, flood) runs on the same cores, so part of what the victim loses is plain CPU. There is one
query replica, unless `--query-replicas-max` says more: one that is started for a flood costs
seconds of CPU in the middle of a window, and its threads come on top of those of the first.

A scene is written as p50 and p99 of all windows of a kind, their ratio, what the flood got, and how
long the victim's first request took that came when the flood had the server for itself.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from benchmarks import data, machine
from benchmarks.http1 import Connection, Dropped
from benchmarks.measures import make_table, percentile
from benchmarks.stacks import RunningStack, running_stack

FACTS, FACT_ROWS = "fairness_facts", 200_000
PAUSE_S, SETTLE_S = 0.005, 0.5
SMALL = f"SELECT event_id, device, note FROM {FACTS} WHERE event_id = 77777"
HEAVY = f"SELECT region, count(DISTINCT note), avg(value), max(amount) FROM {FACTS} GROUP BY region"


@dataclass(frozen=True, slots=True)
class Scene:
    """`victim`, `flood`: what each sends, `rows` or a statement."""

    name: str
    victim: str
    flood: str


SCENES = (
    Scene("rows beside rows", "rows", "rows"),
    Scene("small queries beside the same", SMALL, SMALL),
    Scene("small queries beside heavy ones", SMALL, HEAVY),
)


# --- one client ------------------------------------------------------------------------------


class Client:
    """Sends one kind of request; every batch of rows under a key of its own."""

    def __init__(
        self, url: str, api_key: str, what: str, *, table: str, name: str, bodies: list[bytes]
    ) -> None:
        self._connection = Connection(url, api_key)
        self._what = what
        self._table = table
        self._name = name.replace(" ", "-")
        self._sent = 0
        self._bodies = bodies

    async def ask(self) -> str:
        """The outcome: `ok`, or the code of the refusal."""

        try:
            if self._what == "rows":
                self._sent += 1
                answer = await self._connection.request(
                    "POST",
                    f"/v1/tables/{self._table}/rows",
                    body=self._bodies[self._sent % len(self._bodies)],
                    headers={
                        "Content-Type": "application/json",
                        "Idempotency-Key": f"{self._name}-{self._sent}",
                    },
                )
            else:
                answer = await self._connection.query(self._what)
        except Dropped:
            return "dropped"
        return "ok" if answer.status in (200, 202) else answer.code or str(answer.status)

    def close(self) -> None:
        self._connection.close()


def make_bodies(seed: int) -> list[bytes]:
    rng = random.Random(seed)
    return [data.json_body(n * 100, 100, rng) for n in range(50)]


# --- the flood, in a process of its own --------------------------------------------------------


async def flood(order: dict[str, Any]) -> dict[str, int]:
    """Says `ready` when every client has had an answer, and ends so many seconds after."""

    bodies = make_bodies(2)
    asking = [
        Client(
            order["url"],
            order["api_key"],
            order["what"],
            table="fairness_flood",
            name=f"{order['name']}-{number}",
            bodies=bodies,
        )
        for number in range(order["clients"])
    ]
    outcomes: Counter[str] = Counter()
    await asyncio.gather(*(client.ask() for client in asking))
    print("ready", flush=True)
    end = time.monotonic() + order["seconds"]

    async def repeat(client: Client) -> None:
        while time.monotonic() < end:
            outcome = await client.ask()
            outcomes[outcome] += 1
            if outcome != "ok":
                await asyncio.sleep(0.02)  # a refused client that does not even wait its second
        client.close()

    await asyncio.gather(*(repeat(client) for client in asking))
    return dict(outcomes)


def begin_flood(order: dict[str, Any]) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.fairness", "--flood", json.dumps(order)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    if process.stdout.readline().strip() != "ready":
        process.kill()
        raise RuntimeError("the flood did not begin")
    return process


# --- the victim ------------------------------------------------------------------------------


async def window(asking: Client, seconds: float) -> tuple[list[float], Counter[str]]:
    latencies: list[float] = []
    outcomes: Counter[str] = Counter()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        began = time.perf_counter()
        outcome = await asking.ask()
        outcomes[outcome] += 1
        latencies.append((time.perf_counter() - began) * 1000)
        await asyncio.sleep(PAUSE_S)
    return latencies, outcomes


async def play(
    scene: Scene, url: str, keys: dict[str, str], *, pairs: int, seconds: float, clients: int
) -> dict[str, Any]:
    asking = Client(
        url,
        keys["victim"],
        scene.victim,
        table="fairness_victim",
        name=scene.name,
        bodies=make_bodies(1),
    )
    _, outcomes = await window(asking, 1.0)
    if set(outcomes) != {"ok"}:
        raise RuntimeError(f"the victim alone is not served: {dict(outcomes)}")
    alone: list[float] = []
    beside: list[float] = []
    newcomer: list[float] = []
    victim_outcomes: Counter[str] = Counter()
    flood_outcomes: Counter[str] = Counter()
    for number in range(pairs):
        latencies, outcomes = await window(asking, seconds)
        alone += latencies
        victim_outcomes += outcomes
        order = {
            "url": url,
            "api_key": keys["flood"],
            "what": scene.flood,
            "clients": clients,
            "seconds": seconds + 2 * SETTLE_S,
            "name": f"{scene.name}-{number}",
        }
        process = await asyncio.to_thread(begin_flood, order)
        # It was away while the flood began, so that everything was the flood's: what it costs to
        # come back is told apart, and is not in the window.
        latencies, _ = await window(asking, SETTLE_S)
        newcomer.append(latencies[0])
        latencies, outcomes = await window(asking, seconds)
        beside += latencies
        victim_outcomes += outcomes
        said, _ = await asyncio.to_thread(process.communicate)
        flood_outcomes += Counter(json.loads(said))
        await asyncio.sleep(SETTLE_S)
    asking.close()
    return {
        "alone": _figures(alone),
        "beside": _figures(beside),
        "first_beside_ms": [round(ms, 1) for ms in newcomer],
        "p50_ratio": round(percentile(beside, 0.5) / percentile(alone, 0.5), 2),
        "p99_ratio": round(percentile(beside, 0.99) / percentile(alone, 0.99), 2),
        "victim_outcomes": dict(victim_outcomes),
        "flood_clients": clients,
        "flood_per_s": round(flood_outcomes["ok"] / (pairs * (seconds + 2 * SETTLE_S)), 1),
        "flood_outcomes": dict(flood_outcomes),
    }


def _figures(latencies: list[float]) -> dict[str, float]:
    return {
        "requests": len(latencies),
        "p50_ms": percentile(latencies, 0.5),
        "p99_ms": percentile(latencies, 0.99),
    }


# --- the stack -------------------------------------------------------------------------------


async def prepare(stack: RunningStack) -> dict[str, str]:
    """Tables, facts to ask about, and a key for each principal."""

    root = Connection(stack.url, stack.api_key)
    keys = {}
    for name in ("victim", "flood"):
        await make_table(stack.url, stack.api_key, f"fairness_{name}")
        made = await root.post_json(
            "/v1/admin/keys", {"principal": f"fairness-{name}", "scopes": ["ingest", "query"]}
        )
        keys[name] = made.json()["key"]
    await make_table(stack.url, stack.api_key, FACTS)
    rng = random.Random(3)
    token = ""
    for first in range(0, FACT_ROWS, 5_000):
        answer = await root.request(
            "POST",
            f"/v1/tables/{FACTS}/rows",
            body=data.json_body(first, 5_000, rng),
            headers={"Content-Type": "application/json", "Idempotency-Key": f"facts-{first}"},
        )
        token = answer.json()["receipt"]["visibility_token"]
    for sql in (SMALL, HEAVY):
        answer = await root.query(sql, min_visibility_token=token)
        if answer.status != 200:
            raise RuntimeError(f"{answer.status} {answer.body[:300]!r}")
    root.close()
    return keys


async def measure(stack: RunningStack, options: argparse.Namespace) -> dict[str, Any]:
    keys = await prepare(stack)
    found: dict[str, Any] = {}
    for scene in SCENES:
        if options.scene in scene.name:
            found[scene.name] = await play(
                scene,
                stack.url,
                keys,
                pairs=options.pairs,
                seconds=options.seconds,
                clients=options.clients,
            )
            print(scene.name, json.dumps(found[scene.name]), file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fairness", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short pair of windows a scene")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a window")
    parser.add_argument("--clients", type=int, default=48, help="clients of the flood")
    parser.add_argument("--scene", default="", help="only scenes with these words in their name")
    parser.add_argument("--query-replicas-max", type=int, default=1)
    parser.add_argument("--flood", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.flood is not None:
        print(json.dumps(asyncio.run(flood(json.loads(options.flood)))))
        return
    if options.quick:
        options.pairs, options.seconds = 1, 3.0
    replicas_max = options.query_replicas_max
    found: dict[str, Any] = {"machine": machine.describe(), "query_replicas_max": replicas_max}
    # Maintenance would meet one kind of window more than the other.
    given = {"maintenance_enabled": "false", "http_query_replicas_max": str(replicas_max)}
    with running_stack(**given) as stack:
        found |= asyncio.run(measure(stack, options))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
