"""What the answers of Serve's route say of the direct door of the replica that answers."""

from __future__ import annotations

from serve_app.calls import Call, Header
from serve_app.dependencies import Dependencies

#: After rows, and after a query: a replica of each kind has its own door.
INGEST_URL, QUERY_URL = b"lakebus-ingest-url", b"lakebus-query-url"


def told(call: Call, app: Dependencies, name: bytes) -> tuple[Header, ...]:
    """Where the door is, for who came by the other way."""

    if call.direct or app.door is None:
        return ()
    # The work is done: whatever this header is like, it is no reason to refuse the request now.
    host = next((v.decode("latin-1") for n, v in call.scope["headers"] if n == b"host"), None)
    found = app.door.advertised(host)
    return () if found is None else ((name, found.encode("ascii")),)
