"""What operators ask: /health, /ready, /livez, /version, /metrics. None of them waits for the engine."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from scheduler.messages import EngineStats
from server.engine_client import EngineClient, EngineState
from server.errors import Unavailable
from server.generation import Generator
from server.metrics import CONTENT_TYPE, Metrics
from server.openapi import docs
from server.routes.answer import json_response
from server.schemas.models import Health, Version


def operations_router(generator: Generator, metrics: Metrics, version: str) -> APIRouter:
    router = APIRouter()
    engine: EngineClient = generator.engine

    @router.get("/health", summary="503 when the engine is dead", **docs(Health, also={503: Health}))
    async def health() -> Response:
        is_down = engine.state is EngineState.DOWN
        return json_response(Health(status=str(engine.state)), status=503 if is_down else 200)

    @router.get("/ready", summary="200 while requests are taken", **docs(Health, also={503: Health}))
    async def ready() -> Response:
        try:
            generator.require_ready()
        except Unavailable as error:
            body = Health(status=str(engine.state), reason=error.message)
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
        if engine.state is EngineState.DOWN:
            metrics.observe(EngineStats())  # what it ran is gone; a restarted engine counts from zero too
        return Response(metrics.render(), media_type=None, headers={"Content-Type": CONTENT_TYPE})

    return router
