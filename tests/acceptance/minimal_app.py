"""The smallest application a stack can hold: it proves that Ray, Serve and HAProxy start and stop.

It uses nothing of lakebus but the guard that keeps replicas' ports on loopback, so what fails here
fails because of the ground and not of the building.
"""

from __future__ import annotations

import os

from ray import serve
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from cluster.deployed import Deployed
from lakebus.settings import Settings
from serve_app.replica_ports import keep_replica_ports_on_loopback


async def ready(_: Request) -> PlainTextResponse:
    return PlainTextResponse("ready")


async def who(_: Request) -> JSONResponse:
    return JSONResponse({"pid": os.getpid(), "stack": os.environ.get("LAKEBUS_STACK_ID")})


@serve.deployment(max_ongoing_requests=100, ray_actor_options={"num_cpus": 0})
@serve.ingress(Starlette(routes=[Route("/readyz", ready), Route("/who", who)]))
class Minimal:
    def __init__(self) -> None:
        keep_replica_ports_on_loopback()


async def deploy(settings: Settings, *, api_key: str | None) -> Deployed:
    serve.run(Minimal.bind(), name="minimal", route_prefix="/")  # type: ignore[attr-defined]
    return Deployed(f"http://127.0.0.1:{settings.http.port}", api_key or "lbk_minimal")
