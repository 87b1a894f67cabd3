"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from server.openapi import docs
from server.routes.answer import json_response
from server.schemas.models import Model, ModelList
from server.served import ServedModel


def models_router(served: ServedModel) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/models", summary="The names of the model", **docs(ModelList, 401))
    async def list_models() -> Response:
        return json_response(served.list())

    # A name may contain slashes, as on the hub.
    @router.get("/v1/models/{model_id:path}", summary="The model under one of its names", **docs(Model, 401, 404))
    async def retrieve_model(model_id: str) -> Response:
        return json_response(served.describe(model_id))

    return router
