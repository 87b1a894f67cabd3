"""What every request passes, as plain ASGI: nothing here buffers an answer or hides a disconnect.

RequestMiddleware    id, record, one log line, one count, and the answer to every exception
DoorMiddleware       the Host, the key
BodyMiddleware       size and pace of the body, which is not read when there is no place
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import limits
from server.address import is_loopback
from server.admission import AdmissionGate
from server.api_keys import ApiKey, key_digest
from server.errors import (
    ApiError,
    BadRequest,
    ClientDisconnected,
    ForbiddenHost,
    Overloaded,
    PayloadTooLarge,
    RequestTimeout,
    Unauthorized,
    as_api_error,
    error_response,
    speaks_anthropic,
)
from server.metrics import Metrics
from server.record import RequestRecord
from server.routes.web import DOCS_PATHS

logger = logging.getLogger(__name__)
access_logger = logging.getLogger("server.access")

POLLED_PATHS = frozenset({"/health", "/livez", "/ready", "/version", "/metrics"})
"""Not logged at INFO."""
OPEN_PATHS = POLLED_PATHS | DOCS_PATHS
"""Answered without a key."""
ADMIN_PATHS = frozenset({"/reset_prefix_cache"})
"""Answered with the admin key only, where there is one."""
BODY_SECONDS = 30.0
BODY_BYTES_PER_SECOND = 256 * 1024
"""A body may take BODY_SECONDS, and a second more for each so many bytes of it that came."""
SMALL_BODY_BYTES = 64 * 1024
"""A body of this size is read however many others wait."""

_REQUEST_ID = re.compile(rf"[A-Za-z0-9._-]{{1,{limits.MAX_REQUEST_ID.maximum:.0f}}}")


class RequestMiddleware:
    """The outermost: whatever happens inside, the client gets an answer with an id and the log gets one line."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        asked = Headers(scope=scope).get("x-request-id", "")
        record = RequestRecord(asked if _REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex)
        scope.setdefault("state", {})["record"] = record
        method = _method(scope)
        if method == "HEAD":
            # Routes need not know. A copy: the HTTP server looks into its own, and then sends no body.
            scope = {**scope, "method": "GET"}
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = record.request_id
                if speaks_anthropic(scope["path"]):
                    headers["Request-Id"] = record.request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except (ClientDisconnect, ClientDisconnected):
            status = ClientDisconnected.status
        except Exception as exc:
            error = as_api_error(exc, record.request_id)
            if not isinstance(exc, ApiError):
                logger.exception("request %s failed", record.request_id)
            if status == 0:
                await error_response(error, scope["path"], record.request_id)(scope, receive, send_with_id)
            else:
                status = error.status  # too late for the client: the answer has begun
        except asyncio.CancelledError:
            status = status or ClientDisconnected.status
            raise
        finally:
            record.handler = getattr(scope.get("route"), "path", "other")
            self._metrics.on_http(record.handler, method, status)
            _log(method, record, status, time.monotonic() - started)


class DoorMiddleware:
    """Refuses before anything of the request is read: deny by default, decided on the decoded path alone."""

    def __init__(
        self, app: ASGIApp, *, api_keys: Sequence[ApiKey], admin_key: str | None, host: str, gate: AdmissionGate
    ) -> None:
        """`host`: the address the server is bound to; `gate` knows what the keys have used."""
        self._app = app
        self._gate = gate
        self._digests = [key.digest for key in api_keys]
        self._admin_digests = [] if admin_key is None else [key_digest(admin_key)]
        # Without a key, the only fence around a local server is the browser's: a page of a foreign site that points
        # its own name at 127.0.0.1 passes it, but not this list.
        self._hosts = {"localhost", "127.0.0.1", "::1", host.lower()} if not api_keys and is_loopback(host) else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self._check(scope)
        key = scope["state"]["record"].key_digest

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self._gate.rate_limit_headers(key))
            await send(message)

        await self._app(scope, receive, send_with_limits if key else send)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 and (hosts or scope["http_version"] != "1.0"):
            raise BadRequest("A request has one Host header.")
        if self._hosts is not None and hosts and _host_name(hosts[0]) not in self._hosts:
            raise ForbiddenHost("This server answers under its local names only; set an API key to lift this.")
        digests = self._digests
        if self._admin_digests and scope["path"] in ADMIN_PATHS:
            digests = self._admin_digests
        if digests and scope["method"] != "OPTIONS" and scope["path"] not in OPEN_PATHS:
            scope["state"]["record"].key_digest = self._check_key(headers, digests)

    @staticmethod
    def _check_key(headers: Headers, digests: Sequence[bytes]) -> bytes:
        """The digest of the key that was sent. Raises Unauthorized unless it is one of `digests`."""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            key = headers.get("x-api-key", "")
        digest = key_digest(key.strip())
        # All of them, so that the time does not tell which one matched.
        matches = [hmac.compare_digest(digest, known) for known in digests]
        if True not in matches:
            raise Unauthorized(
                "You did not provide an API key: send 'Authorization: Bearer KEY'."
                if not key
                else "Incorrect API key provided."
            )
        return digest


class BodyMiddleware:
    """Bounds the body by what really arrives, chunked or not, before anything parses it."""

    def __init__(self, app: ASGIApp, require_place: Callable[[], None]) -> None:
        """`require_place` raises when there is no place for a request: asked before its body is read."""
        self._app = app
        self._require_place = require_place
        self._queued_bytes = 0
        """Of the bodies of all requests, until they are tokens."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = int(limits.MAX_BODY_BYTES.maximum)
        length = Headers(scope=scope).get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > limit:
            raise _too_large(limit)
        size = queued = 0
        complete = False
        deadline = asyncio.get_running_loop().time() + BODY_SECONDS

        async def receive_bounded() -> Message:
            nonlocal size, complete, queued
            if complete:
                return await receive()  # only the disconnect is left, and that may take as long as the answer
            if size == 0:
                self._require_place()  # whoever reads a body wants something that takes a place
            try:
                async with asyncio.timeout_at(deadline + size / BODY_BYTES_PER_SECOND):
                    message = await receive()
            except TimeoutError:
                raise RequestTimeout("The body of the request came too slowly.") from None
            size += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if size > limit:
                raise _too_large(limit)
            self._queued_bytes += size - queued
            queued = size
            if size > SMALL_BODY_BYTES and self._queued_bytes > limits.QUEUED_BODY_BYTES.maximum:
                raise Overloaded("Too many long requests are being read. Please retry later.", retry_after=1)
            return message

        def release() -> None:
            nonlocal queued
            self._queued_bytes -= queued
            queued = 0

        scope["state"]["record"].release_body = release
        try:
            await self._app(scope, receive_bounded, send)
        finally:
            release()


def _too_large(limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"The body of a request may have {limit} bytes at most.")


def _host_name(host: str) -> str:
    """`[::1]:8000` -> `::1`, `localhost:8000` -> `localhost`."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0].lower()


def _method(scope: Scope) -> str:
    method = scope["method"]
    return method if method in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH") else "other"


def _log(method: str, record: RequestRecord, status: int, seconds: float) -> None:
    level = logging.DEBUG if record.handler in POLLED_PATHS else logging.INFO
    if not access_logger.isEnabledFor(level):
        return
    line = f"{method} {record.handler} {status} {seconds * 1000:.1f} ms id={record.request_id}"
    if record.prompt_tokens:
        first = "-" if record.first_token_seconds is None else f"{record.first_token_seconds * 1000:.1f} ms"
        line += (
            f" prompt={record.prompt_tokens} cached={record.cached_tokens} completion={record.completion_tokens}"
            f" finish={record.finish_reason} first_token={first}"
        )
    access_logger.log(level, line)
