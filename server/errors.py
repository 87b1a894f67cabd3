"""The errors a client can see: one tree, one envelope.

    ApiError
    ├── BadRequest 400              malformed JSON, wrong type, missing field, out of range
    │   ├── UnsupportedParameter    a known field that would change the answer and is not built
    │   └── ContextLengthExceeded   prompt (+ max_tokens) does not fit the model's window
    ├── Unauthorized 401            no key or a wrong one
    ├── ForbiddenHost 403           a name of a foreign site in `Host` (DNS rebinding)
    ├── NotFound 404
    │   └── ModelNotFound
    ├── MethodNotAllowed 405
    ├── RequestTimeout 408          the headers or the body came too slowly
    ├── DeadlineExceeded 408        the request's own `timeout` has passed
    ├── PayloadTooLarge 413
    ├── UnsupportedMediaType 415
    ├── RateLimited 429             a limit of the API key is reached, with Retry-After
    ├── HeadersTooLarge 431
    ├── ClientDisconnected 499      only in the log and the metrics: nobody reads the answer
    ├── Cancelled 499               by its client, with POST /v1/requests/{id}/cancel
    ├── InternalError 500           fixed text, the cause is in the log under the request id
    ├── Unavailable 503             starting, draining or down, with Retry-After
    │   └── Overloaded              a bound on open requests or queued tokens is reached
    │       └── QueueTimeout        the request did not start within --queue-timeout
    └── TimeLimitExceeded 504       the answer was not complete within --request-timeout

The envelope is OpenAI's: `{"error": {"message", "type", "param", "code"}}`, all four keys, `code` a
string or null. Under /v1/messages it is Anthropic's: `{"type": "error", "error": {"type", "message"}}` with
its own type words. Messages name fields and bounds and never repeat what the client sent beyond a model
name and what cannot be enforced of a schema or grammar, so they stay short and nothing of a prompt gets into a log.
"""

# ruff: noqa: N818  (the names are those of the HTTP statuses)

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import msgspec
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from scheduler.messages import Finished, FinishReason
from server.schemas.error import AnthropicError, AnthropicErrorResponse, Error, ErrorResponse

MAX_MESSAGE = 1024
"""Characters of an error message that are sent."""


class ApiError(Exception):
    status: ClassVar[int] = 500
    type: ClassVar[str] = "invalid_request_error"
    code: str | None = None

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message[:MAX_MESSAGE]
        self.param = param
        self.code = code or type(self).code
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}

    def body(self) -> bytes:
        error = Error(message=self.message, type=self.type, param=self.param, code=self.code)
        return msgspec.json.encode(ErrorResponse(error=error))


class BadRequest(ApiError):
    status = 400


class UnsupportedParameter(BadRequest):
    code = "unsupported_parameter"


class ContextLengthExceeded(BadRequest):
    code = "context_length_exceeded"


class Unauthorized(ApiError):
    status = 401
    code = "invalid_api_key"

    @property
    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class ForbiddenHost(ApiError):
    status = 403
    code = "forbidden_host"


class NotFound(ApiError):
    status = 404


class ModelNotFound(NotFound):
    code = "model_not_found"


class MethodNotAllowed(ApiError):
    status = 405

    def __init__(self, allow: str) -> None:
        super().__init__(f"Method not allowed; this path answers {allow}.")
        self.allow = allow

    @property
    def headers(self) -> dict[str, str]:
        return {"Allow": self.allow}


class RequestTimeout(ApiError):
    status = 408

    @property
    def headers(self) -> dict[str, str]:
        return {"Connection": "close"}


class DeadlineExceeded(ApiError):
    status = 408
    code = "timeout"

    def __init__(self) -> None:
        super().__init__("The answer was not complete within the request's 'timeout'.", param="timeout")

    @property
    def headers(self) -> dict[str, str]:
        return {"x-should-retry": "false"}  # else OpenAI's SDKs send the request again, twice


class PayloadTooLarge(ApiError):
    status = 413

    @property
    def headers(self) -> dict[str, str]:
        return {"Connection": "close"}


class UnsupportedMediaType(ApiError):
    status = 415


class RateLimited(ApiError):
    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"

    @property
    def headers(self) -> dict[str, str]:
        return super().headers if self.retry_after is not None else {"x-should-retry": "false"}


class HeadersTooLarge(ApiError):
    status = 431

    @property
    def headers(self) -> dict[str, str]:
        return {"Connection": "close"}


class ClientDisconnected(ApiError):
    status = 499

    def __init__(self) -> None:
        super().__init__("The client closed the connection.")


class Cancelled(ApiError):
    status = 499
    code = "cancelled"

    def __init__(self) -> None:
        super().__init__("The request was cancelled.")


class InternalError(ApiError):
    status = 500
    type = "server_error"


class Unavailable(ApiError):
    status = 503
    type = "unavailable_error"


class Overloaded(Unavailable):
    type = "server_error"
    code = "server_overloaded"


class QueueTimeout(Overloaded):
    code = "queue_timeout"


class TimeLimitExceeded(ApiError):
    status = 504
    type = "server_error"
    code = "request_timeout"

    def __init__(self) -> None:
        super().__init__("The answer was not complete within the time this server allows.")

    @property
    def headers(self) -> dict[str, str]:
        return {"x-should-retry": "false"}


_ANTHROPIC_PATH = "/v1/messages"
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def anthropic_error(error: ApiError, request_id: str) -> AnthropicErrorResponse:
    """`error` in Anthropic's envelope."""
    word = _ANTHROPIC_TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    return AnthropicErrorResponse(error=AnthropicError(type=word, message=error.message), request_id=request_id)


def speaks_anthropic(path: str) -> bool:
    """Whether clients of `path` expect Anthropic's envelope and headers."""
    return path == _ANTHROPIC_PATH or path.startswith(f"{_ANTHROPIC_PATH}/")


def error_response(error: ApiError, path: str, request_id: str) -> Response:
    """The answer in the envelope that clients of `path` read."""
    if speaks_anthropic(path):
        body = msgspec.json.encode(anthropic_error(error, request_id))
    else:
        body = error.body()
    return Response(body, error.status, headers=error.headers, media_type="application/json")


async def handle_error(request: Request, exc: Exception) -> Response:
    """Starlette's exception handler for every exception that is an answer."""
    request_id = request.scope["state"]["record"].request_id
    return error_response(as_api_error(exc, request_id), request.scope["path"], request_id)


def as_api_error(exc: Exception, request_id: str) -> ApiError:
    """The error a client gets for `exc`; anything unforeseen becomes the fixed 500."""
    match exc:
        case ApiError():
            return exc
        case ClientDisconnect():
            return ClientDisconnected()
        case RequestValidationError() | ValidationError():
            return invalid_fields(exc.errors())
        case HTTPException(status_code=404):
            return NotFound("This path does not exist here.")
        case HTTPException(status_code=405):
            allow = (exc.headers or {}).get("Allow", "another method")
            return MethodNotAllowed("GET, HEAD" if allow == "GET" else allow)  # see RequestMiddleware
        case HTTPException(status_code=status) if status < 500:
            return BadRequest("The request could not be understood.")
    return InternalError(f"The server failed on this request. Its id is {request_id}.")


def invalid_fields(errors: Sequence[Mapping[str, object]]) -> BadRequest:
    """The first of pydantic's errors, by field path and rule; what was sent is never repeated."""
    first = errors[0]
    location = first["loc"]
    param = field_path(location if isinstance(location, tuple) else ())
    message = str(first["msg"])
    return BadRequest(f"Invalid value for '{param}': {message}." if param else f"{message}.", param=param or None)


def field_path(location: tuple[object, ...]) -> str:
    """`("messages", 0, "<list>", 1, "type")` -> `messages[0].content[1].type`; `<...>` are union branches."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not str(part).startswith("<"):
            path += f".{part}" if path else str(part)
    return path


def finished_error(finished: Finished, request_id: str) -> ApiError | None:
    """The error of a terminal event of the engine; None for the two successes."""
    match finished.reason:
        case FinishReason.STOP | FinishReason.LENGTH:
            return None
        case FinishReason.REJECTED if finished.code == "context_length_exceeded":
            return ContextLengthExceeded(finished.message or "The request does not fit the model's window.")
        case FinishReason.REJECTED:
            return BadRequest(finished.message or "The engine refused the request.", code=finished.code)
        case FinishReason.ABORT if finished.code == "slow_reader":
            return Unavailable("The answer was not read as fast as it was made.", code="slow_reader", retry_after=1)
        case FinishReason.ABORT:
            return Unavailable("The server stopped before the answer was complete.", code="aborted", retry_after=1)
        case FinishReason.ERROR:
            return InternalError(f"The engine failed on this request. Its id is {request_id}.", code=finished.code)
