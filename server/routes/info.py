"""GET /server_info and /load: what the daemon is and how busy."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from scheduler.messages import EngineReady
from server.admission import AdmissionGate
from server.limits import LIMITS
from server.openapi import docs
from server.routes.answer import json_response
from server.schemas.info import BlockPoolInfo, EngineInfo, Load, ServerInfo
from server.served import ServedModel
from server.settings import Settings
from server.supervisor import Supervisor

_NOT_SHOWN = {"model", "api_key", "api_key_file", "admin_key"}
"""Keys, and where things lie on this machine."""


def info_router(
    supervisor: Supervisor, gate: AdmissionGate, served: ServedModel, settings: Settings, version: str
) -> APIRouter:
    router = APIRouter()
    shown = {name: value for name, value in settings.shown().items() if name not in _NOT_SHOWN}

    @router.get("/server_info", summary="Model, engine, cache, limits and options", **docs(ServerInfo, 401))
    async def server_info() -> Response:
        engine = supervisor.engine
        ready, stats = engine.ready, engine.stats
        info = ServerInfo(
            version=version,
            models=list(served.names),
            state=str(engine.state),
            engine=None if ready is None else _engine_info(ready),
            block_pool=None
            if ready is None
            else BlockPoolInfo(
                block_size=ready.block_size,
                num_blocks=ready.num_blocks,
                free_blocks=stats.free_blocks,
                cached_blocks=stats.cached_blocks,
            ),
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            limits=list(LIMITS),
            settings=shown,
        )
        return json_response(info)

    @router.get("/load", summary="How many requests are open", **docs(Load, 401))
    async def load() -> Response:
        return json_response(Load(server_load=gate.open_requests))

    return router


def _engine_info(ready: EngineReady) -> EngineInfo:
    return EngineInfo(**{name: getattr(ready, name) for name in EngineInfo.__struct_fields__})
