"""What acts on the daemon: POST /v1/requests/{id}/cancel, and /reset_prefix_cache for whoever has the admin key."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.errors import NotFound
from server.generation import Generator
from server.open_requests import OpenRequests
from server.openapi import docs
from server.routes.answer import json_response, record_of
from server.schemas.info import Cancelled, PrefixCacheReset


def admin_router(generator: Generator, open_requests: OpenRequests, *, has_admin_key: bool) -> APIRouter:
    router = APIRouter()

    @router.post(
        "/v1/requests/{request_id}/cancel",
        summary="End an answer by its X-Request-Id or its own id",
        **docs(Cancelled, 401, 404, 408, 413),
    )
    async def cancel(request: Request, request_id: str) -> Response:
        if not open_requests.cancel(record_of(request).key_digest, request_id):
            raise NotFound("No open request of this API key has this id.", code="request_not_found")
        return json_response(Cancelled(cancelled=True))

    @router.post(
        "/reset_prefix_cache",
        summary="Forget all cached prompts; wants the admin key",
        **docs(PrefixCacheReset, 401, 404, 408, 413, 503),
    )
    async def reset_prefix_cache() -> Response:
        # The door has checked the key, if there is one.
        if not has_admin_key:
            raise NotFound("This path needs an admin key, and the server has none.")
        generator.require_ready()
        generator.engine.reset_prefix_cache()
        return json_response(PrefixCacheReset(reset=True))

    return router
