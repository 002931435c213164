"""A job on a stack's Ray cluster: `ray_job.py API_KEY READER_KEY`. Prints JSON of what it met.

Runs the example of docs/client.md first, then what a test looks at.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

import lakebus
from lakebus.errors import LakebusError

PAGE = Path(__file__).parents[2] / "docs" / "client.md"
ROWS = 200_000


def example(api_key: str) -> list[int]:
    """The page's example, and the list that it prints."""
    blocks = re.findall(r"(?ms)^```python\n(# needs Ray.*?)^```", PAGE.read_text())
    assert len(blocks) == 1
    names: dict[str, Any] = {"api_key": api_key, "__name__": "example"}
    exec(compile(blocks[0], str(PAGE), "exec"), names)
    found: list[int] = names["found"]["n"].to_pylist()
    return found


class Job:
    """As an actor: in a process of its own, with a loop."""

    async def count(self, api_key: str, table: str, after: lakebus.Sent) -> int:
        async with lakebus.connect_async("ray", api_key) as lake:
            found = await lake.query(f"SELECT count(*) FROM {table}", after=after)
        return int(found.value())


def met(call: Any, *arguments: Any, **named: Any) -> str:
    """The code of the error in which a call ends."""
    try:
        call(*arguments, **named)
    except LakebusError as error:
        return error.code
    return "none"


def main(api_key: str, reader_key: str) -> dict[str, Any]:
    ray.init(log_to_driver=False)
    said: dict[str, Any] = {"example": example(api_key)}
    lake = lakebus.connect("ray", api_key)
    lake.create_table("by_job", {"id": "bigint", "note": "varchar"})
    table = pa.table({"id": range(ROWS), "note": [f"note {n % 100}" for n in range(ROWS)]})
    sent = lake.ingest("by_job", table, key="first")
    said["again"] = lake.ingest("by_job", table, key="first").replayed
    read = lake.query_arrow("SELECT id, note FROM by_job ORDER BY id", after=sent)
    said["equal"] = read.cast(table.schema).equals(table)
    newest = lake.snapshots()[0]["snapshot_id"]
    said["at"] = lake.query("SELECT count(*) FROM by_job", at=newest).value()
    said["visible"] = lake.wait_visible(sent) != ""
    said["tables"] = sorted(one["name"] for one in lake.tables())
    with lake.writer("by_job", senders=4, rows_max=10_000) as writer:
        writer.write(table)
    said["written"] = writer.written.rows
    actor: Any = ray.remote(num_cpus=0)(Job)
    said["actor"] = ray.get(actor.remote().count.remote(api_key, "by_job", sent))
    reader = lakebus.connect("ray", reader_key)
    said["errors"] = {
        "conflict": met(lake.ingest, "by_job", [{"id": 1}], key="first"),
        "rows": met(lake.ingest, "by_job", pa.table({"id": ["x"]})),
        "sql": met(lake.query, "SELEC 1"),
        "key": met(lakebus.connect("ray", "lbk_some_body").tables),
        "scope": met(reader.ingest, "by_job", table),
    }
    said["reader"] = reader.query("SELECT count(*) FROM by_job", after=sent).value() >= ROWS
    return said


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
