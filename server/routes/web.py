"""GET /docs: the document at /openapi.json as a page. All it loads is in `server/web`: it works without a network."""

from __future__ import annotations

import gzip
from importlib.resources import files

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

DOCS_PATHS = frozenset({"/docs", "/docs/start.js", "/docs/swagger-ui-bundle.js", "/docs/swagger-ui.css"})
"""The same for everybody and nothing of the server in it, so no key is needed; the page asks for the document's."""

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
    "Vary": "Accept-Encoding",
}


def web_router() -> APIRouter:
    router = APIRouter(include_in_schema=False)

    @router.get("/docs")
    async def page(request: Request) -> Response:
        return _file(request, "index.html", "text/html")

    @router.get("/docs/start.js")
    async def script(request: Request) -> Response:
        return _file(request, "start.js", "text/javascript")

    @router.get("/docs/swagger-ui-bundle.js")
    async def bundle(request: Request) -> Response:
        return _file(request, "swagger-ui-bundle.js.gz", "text/javascript")

    @router.get("/docs/swagger-ui.css")
    async def style(request: Request) -> Response:
        return _file(request, "swagger-ui.css.gz", "text/css")

    return router


def _file(request: Request, name: str, media_type: str) -> Response:
    content = files("server").joinpath("web", name).read_bytes()
    headers = dict(_HEADERS)
    if name.endswith(".gz"):
        if "gzip" in request.headers.get("accept-encoding", ""):
            headers["Content-Encoding"] = "gzip"
        else:
            content = gzip.decompress(content)
    return Response(content, headers=headers, media_type=media_type)
