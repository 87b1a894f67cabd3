"""What operators ask: /health, /ready, /livez, /version, /metrics. None of them waits for the engine."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from server.engine_client import EngineState
from server.errors import Unavailable
from server.metrics import CONTENT_TYPE, Metrics
from server.openapi import docs
from server.routes.answer import json_response
from server.schemas.models import Health, Version
from server.supervisor import Supervisor


def operations_router(supervisor: Supervisor, metrics: Metrics, version: str) -> APIRouter:
    router = APIRouter()

    @router.get("/health", summary="503 when the engine is dead", **docs(Health, also={503: Health}))
    async def health() -> Response:
        state = supervisor.engine.state
        return json_response(Health(status=str(state)), status=503 if state is EngineState.DOWN else 200)

    @router.get("/ready", summary="200 while requests are taken", **docs(Health, also={503: Health}))
    async def ready() -> Response:
        try:
            supervisor.require_ready()
        except Unavailable as error:
            body = Health(status=str(supervisor.engine.state), reason=error.message)
            return json_response(body, status=503, headers=error.headers)
        return json_response(Health(status="ready"))

    @router.get("/livez", summary="200 while this process answers", **docs(Health))
    async def live() -> Response:
        return json_response(Health(status="alive"))

    @router.get("/version", summary="Version of the daemon", **docs(Version))
    async def show_version() -> Response:
        return json_response(Version(version=version))

    @router.get("/metrics", summary="Prometheus metrics, text format 0.0.4", **docs("text/plain"))
    async def show_metrics() -> Response:
        return Response(metrics.render(), media_type=None, headers={"Content-Type": CONTENT_TYPE})

    return router
