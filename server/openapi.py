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

from server.schemas import messages, response_events
from server.schemas.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionRequest
from server.schemas.completion import Completion, CompletionRequest
from server.schemas.error import AnthropicErrorResponse, ErrorResponse
from server.schemas.examples import EXAMPLES
from server.schemas.info import Cancelled, Load, PrefixCacheReset, ServerInfo
from server.schemas.messages import AnthropicMessage, CountTokensRequest, MessagesRequest, TokenCount
from server.schemas.models import Health, Model, ModelList, Version
from server.schemas.response_events import ResponseObject
from server.schemas.responses import ResponsesRequest
from server.schemas.tokenize import (
    DetokenizeRequest,
    DetokenizeResponse,
    RenderResponse,
    TokenizeRequest,
    TokenizeResponse,
    TokenizerInfo,
)

_REF = "#/components/schemas/{name}"
_PYDANTIC_REF = "#/components/schemas/{model}"
_STRUCTS = (
    AnthropicErrorResponse,
    AnthropicMessage,
    Cancelled,
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    DetokenizeResponse,
    ErrorResponse,
    Health,
    Load,
    Model,
    ModelList,
    PrefixCacheReset,
    RenderResponse,
    ResponseObject,
    ServerInfo,
    TokenCount,
    TokenizeResponse,
    TokenizerInfo,
    Version,
    *messages.EVENTS,
    *response_events.EVENTS,
)
_REQUESTS = (
    ChatCompletionRequest,
    CompletionRequest,
    CountTokensRequest,
    DetokenizeRequest,
    MessagesRequest,
    ResponsesRequest,
    TokenizeRequest,
)

STATUSES = {
    400: "The request is wrong: `param` names the field.",
    401: "No API key, or a wrong one.",
    403: "The Host header names another site.",
    404: "No such model, request or path.",
    405: "Another method: see Allow.",
    408: "The headers or the body came too slowly.",
    413: "The body is too large.",
    415: "The body is not JSON, or is compressed.",
    429: "A limit of this key is reached.",
    431: "The headers are too large.",
    499: "The request was cancelled.",
    500: "The server failed.",
    503: "Starting, draining, overloaded or down: see Retry-After.",
    504: "The answer was not complete within --request-timeout.",
}
_COMMON = (400, 403, 405, 408, 413, 431, 500)
"""What any request can get, from the middleware and the router."""
_BODY = (401, 404, 415, 429, 503)
_HEADERS: dict[int, dict[str, Any]] = {
    401: {"WWW-Authenticate": {"schema": {"const": "Bearer"}}},
    405: {"Allow": {"schema": {"type": "string"}, "description": "The methods of this path."}},
    429: {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."}},
    503: {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."}},
}
_REQUEST_ID = {"X-Request-Id": {"schema": {"type": "string"}, "description": "The one that was sent, or a new one."}}
_IGNORED = {"X-Ignored-Fields": {"schema": {"type": "string"}, "description": "Fields of the body that nobody read."}}


def docs(
    answer: type | str, *errors: int, also: Mapping[int, type] | None = None, error: type = ErrorResponse
) -> dict[str, Any]:
    """Arguments for a route that answers `answer`, a struct or a media type."""
    content = {answer: {"schema": {"type": "string"}}} if isinstance(answer, str) else _json(answer)
    responses: dict[int | str, dict[str, Any]] = {200: {"description": "The answer.", "content": content}}
    for status in sorted({*_COMMON, *errors, *(also or ())}):
        body = (also or {}).get(status, error)
        responses[status] = {"description": STATUSES[status], "content": _json(body)}
    for status, response in responses.items():
        response["headers"] = _REQUEST_ID | _HEADERS.get(int(status), {})
    return {"responses": responses}


def body_docs(request: type, answer: type, *errors: int, error: type = ErrorResponse) -> dict[str, Any]:
    """Arguments for a route that takes a JSON body and answers whole."""
    arguments = docs(answer, *_BODY, *errors, error=error)
    arguments["responses"][200]["headers"] |= _IGNORED
    arguments["openapi_extra"] = {"requestBody": {"required": True, "content": _json(request, EXAMPLES)}}
    return arguments


def completion_docs(
    request: type, answer: type, *chunks: type, error: type = ErrorResponse, done: bool = False
) -> dict[str, Any]:
    """Arguments for a route that takes a JSON body and answers whole or as an event stream.

    `done`: the stream ends with the data `[DONE]`, which is not JSON.
    """
    arguments = body_docs(request, answer, 499, 504, error=error)
    names = " or ".join(each.__name__ for each in chunks)
    data: dict[str, Any] = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [{"$ref": _ref(each)} for each in (*chunks, error)]},
    }
    arguments["responses"][200]["content"]["text/event-stream"] = {
        # OpenAPI 3.2's place for the schema of one event; `schema` would be that of all of them.
        "itemSchema": {
            "type": "object",
            "description": f"With `stream`: events, the data of each a {names}. An error on the way is one with an "
            f"{error.__name__}." + (" The last one's data is `[DONE]`." if done else ""),
            "required": ["data"],
            "properties": {
                "event": {"type": "string"},
                "data": {"anyOf": [{"const": "[DONE]"}, data]} if done else data,
            },
        },
    }
    return arguments


def install(app: FastAPI) -> None:
    """Make `app.openapi()` give the document."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            _, structs = msgspec.json.schema_components(_STRUCTS, schema_hook=_hook, ref_template=_REF)
            _, bodies = models_json_schema([(each, "validation") for each in _REQUESTS], ref_template=_PYDANTIC_REF)
            schemas = structs | bodies.get("$defs", {})
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


def _hook(kind: type) -> dict[str, Any]:
    if kind is object:
        return {}
    raise NotImplementedError


def _ref(body: type) -> str:
    return _REF.format(name=body.__name__)


def _json(body: type, examples: Mapping[str, Any] | None = None) -> dict[str, Any]:
    content: dict[str, Any] = {"schema": {"$ref": _ref(body)}}
    if examples is not None and body.__name__ in examples:
        content["example"] = examples[body.__name__]
    return {"application/json": content}
