"""The settings of the direct doors: a listener of its own in each ingest and query replica."""

from __future__ import annotations

from lakebus.settings_table import Section, setting


class DirectSettings(Section):
    """The direct doors: each ingest replica and each query replica serves its part of the API on a
    port of its own too, without Ray Serve's wrappers in between. What they are for, and what to put
    in front of them: [The direct door](operations.md#the-direct-door)."""

    enabled: bool = setting(True, "Open the direct doors.")
    host: str = setting("127.0.0.1", "Address to listen on.", production="0.0.0.0")
    port: int = setting(
        8351,
        "Port to listen on, shared by the ingest replicas of one machine; 0 takes a free one.",
        ge=0,
        le=65535,
        test=0,
    )
    url: str | None = setting(
        None,
        "What clients are told: the address of a balancer or a headless Service in front; without"
        " one, the name by which they came, with the door's port.",
        pattern=r"^https?://[!-~]+$",
    )
    query_port: int = setting(
        8352,
        "Port of the query replicas' doors, shared by those of one machine; 0 takes a free one.",
        ge=0,
        le=65535,
        test=0,
    )
    query_url: str | None = setting(
        None,
        "What clients are told of the query replicas' doors, like url.",
        pattern=r"^https?://[!-~]+$",
    )
    connections_max: int = setting(
        4096, "Connections of one replica's door; further ones get 503.", ge=1, le=100_000
    )
    head_timeout_s: float = setting(
        10.0, "How long the head of a request may take to arrive.", gt=0, le=600
    )
    idle_timeout_s: float = setting(
        90.0,
        "How long a kept connection may be idle; longer than a balancer's in front.",
        gt=0,
        le=3600,
    )
