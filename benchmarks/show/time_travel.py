"""Time travel: queries at many snapshots give the same answers when asked again at the end.

While rows keep coming, each of the recorded queries is asked once at its snapshot,
deterministically; at the end each is asked again by id and by time.
"""

from __future__ import annotations

import asyncio
from typing import Any

from benchmarks.http1 import Connection
from benchmarks.show import source
from benchmarks.show.exactly_once import Tally, make_table, send_until_received

QUERIES = (
    "SELECT count(*), sum(amount), avg(ratio) FROM {t}",
    "SELECT label, count(*), sum(ratio) FROM {t} GROUP BY label ORDER BY label LIMIT 20",
    "SELECT request_no, row_no, amount FROM {t} ORDER BY amount DESC, request_no, row_no LIMIT 25",
    "SELECT sum(ratio), stddev(ratio), median(ratio) FROM {t} WHERE row_no % 2 = 0",
    "SELECT date_trunc('day', happened_at) AS day, sum(ratio * amount::double) FROM {t}"
    " GROUP BY 1 ORDER BY 1",
)


async def run(
    url: str, api_key: str, *, snapshots: int = 50, rows: int = 40, table: str = "time_travel"
) -> dict[str, Any]:
    await make_table(url, api_key, table)
    connection = Connection(url, api_key)
    tally = Tally()
    recorded: list[dict[str, Any]] = []
    problems: list[str] = []

    async def ask(sql: str, snapshot: Any) -> tuple[Any, dict[str, Any]]:
        answer = await connection.query(sql, snapshot=snapshot, deterministic=True)
        if answer.status != 200:
            raise RuntimeError(f"{answer.status} {answer.body[:300]!r}")
        document = answer.json()
        return document["rows"], document

    for number in range(snapshots):
        content_type, body = source.as_json(source.rows_of(number, rows=rows))
        written = await send_until_received(
            connection,
            path=f"/v1/tables/{table}/rows?wait=visible",
            key=f"{table}-{number}",
            content_type=content_type,
            body=body,
            tally=tally,
        )
        if written is None or not written["visible"]:
            problems.append(f"request {number} did not become visible")
            continue
        sql = QUERIES[number % len(QUERIES)].format(t=table)
        found, document = await ask(sql, {"id": written["snapshot_id"]})
        recorded.append(
            {
                "sql": sql,
                "id": document["snapshot_id"],
                "time": document["snapshot_time"],
                "rows": found,
            }
        )
        await asyncio.sleep(0)
    distinct = len({one["id"] for one in recorded})
    for one in recorded:
        for snapshot in ({"id": one["id"]}, {"timestamp": one["time"]}):
            found, document = await ask(one["sql"], snapshot)
            if found != one["rows"] or document["snapshot_id"] != one["id"]:
                problems.append(f"snapshot {one['id']} by {snapshot}: another answer")
    connection.close()
    if distinct < snapshots:
        problems.append(f"only {distinct} distinct snapshots were recorded")
    return {
        "scenario": "time_travel",
        "queries": len(recorded),
        "snapshots": distinct,
        "asked_again": 2 * len(recorded),
        "verdict": (problems + tally.problems)[:20] or "held",
    }
