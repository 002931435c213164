"""The load generator as a process of its own: an order as JSON on stdin, the figures on stdout."""

from __future__ import annotations

import json
import sys

import uvloop

from benchmarks.measures import ingest_load

if __name__ == "__main__":
    print(json.dumps(uvloop.run(ingest_load(**json.load(sys.stdin)))))
