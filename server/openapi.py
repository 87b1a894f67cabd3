"""The OpenAPI document: the shapes that are really read and sent, the statuses that really occur, no 422.

Bodies are parsed by `server.json_body` from bytes and answers are encoded by msgspec, so the document is put together
from those types instead of from handler signatures.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from server.schemas.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionRequest
from server.schemas.completion import Completion, CompletionRequest
from server.schemas.error import ErrorResponse
from server.schemas.models import Health, Model, ModelList, Version

_REF = "#/components/schemas/{name}"
_PYDANTIC_REF = "#/components/schemas/{model}"
_STRUCTS = (ChatCompletion, ChatCompletionChunk, Completion, ErrorResponse, Health, Model, ModelList, Version)
_REQUESTS = (ChatCompletionRequest, CompletionRequest)

_ERRORS = {
    400: "The request is wrong: `param` names the field.",
    401: "No API key, or a wrong one.",
    403: "The Host header names another site.",
    404: "No such model.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "A limit of this key is reached.",
    431: "The headers are too large.",
    500: "The server failed.",
    503: "Starting, draining, overloaded or down: see Retry-After.",
}
_COMMON = (400, 403, 431, 500)
"""What any request can get, from the middleware."""


def docs(answer: type | str, *errors: int, also: Mapping[int, type] | None = None) -> dict[str, Any]:
    """Arguments for a route that answers `answer`, a struct or a media type."""
    content = {answer: {"schema": {"type": "string"}}} if isinstance(answer, str) else _json(answer)
    responses: dict[int | str, dict[str, Any]] = {200: {"description": "The answer.", "content": content}}
    for status in sorted({*_COMMON, *errors}):
        responses[status] = {"description": _ERRORS[status], "content": _json(ErrorResponse)}
    for status, body in (also or {}).items():
        responses[status] = {"description": _ERRORS[status], "content": _json(body)}
    return {"responses": responses}


def completion_docs(request: type, answer: type, chunk: type) -> dict[str, Any]:
    """Arguments for a route that takes a JSON body and answers whole or as an event stream."""
    arguments = docs(answer, 401, 404, 408, 413, 415, 429, 503)
    arguments["responses"][200]["content"]["text/event-stream"] = {
        "schema": {
            "type": "string",
            "description": f"With `stream`: events `data: {{...}}`, each a {chunk.__name__}, then `data: [DONE]`. "
            f"An error on the way is an event with an {ErrorResponse.__name__}.",
        }
    }
    arguments["openapi_extra"] = {"requestBody": {"required": True, "content": _json(request)}}
    return arguments


def install(app: FastAPI) -> None:
    """Make `app.openapi()` give the document."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            _, structs = msgspec.json.schema_components(_STRUCTS, ref_template=_REF)
            _, requests = models_json_schema([(each, "validation") for each in _REQUESTS], ref_template=_PYDANTIC_REF)
            schemas = structs | requests.get("$defs", {})
            document.setdefault("components", {})["schemas"] = dict(sorted(schemas.items()))
            document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            for path in document["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
                    if "401" in operation["responses"]:
                        operation["security"] = [{"key": []}, {}]
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _json(body: type) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REF.format(name=body.__name__)}}}
