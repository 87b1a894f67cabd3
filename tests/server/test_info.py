"""/server_info, /reset_prefix_cache, the aliases without /v1, and the page at /docs."""

from __future__ import annotations

import asyncio
import gzip
import re
from typing import Any

import pytest
from fastapi.routing import APIRoute, iter_route_contexts

from server.engine_client import EngineState
from server.limits import LIMITS
from tests.server.harness import Answer, Header, answers, call, chat, make_app, post, silent

KEY, ADMIN = "secret-key-1", "admin-key-1"


def bearer(key: str) -> list[Header]:
    return [(b"authorization", b"Bearer " + key.encode())]


def get(path: str, state: EngineState = EngineState.READY, headers: Any = (), **options: Any) -> Answer:
    async def run() -> Answer:
        app, engine = make_app(silent, state, **options)
        if state is EngineState.STARTING:
            engine.ready = None
        return await call(app, "GET", path, headers=headers)

    return asyncio.run(run())


def test_server_info() -> None:
    answer = get("/server_info", headers=bearer(KEY), api_key=(KEY,), admin_key=ADMIN, max_open_requests=7)
    info = answer.json
    assert info["engine"]["device"] == "cpu"
    assert info["engine"]["instruction_set"] == "avx2"
    assert info["engine"]["prefill_attention"] == "cudnn"
    assert info["block_pool"] == {"block_size": 64, "num_blocks": 64, "free_blocks": 0, "cached_blocks": 0}
    assert {limit["name"] for limit in info["limits"]} == {limit.name for limit in LIMITS}
    assert info["settings"]["max_open_requests"] == 7
    assert KEY.encode() not in answer.body
    assert ADMIN.encode() not in answer.body
    assert not {"model", "api_key", "api_key_file", "admin_key"} & info["settings"].keys()


def test_server_info_while_loading() -> None:
    info = get("/server_info", EngineState.STARTING).json
    assert (info["state"], info["engine"], info["block_pool"]) == ("starting", None, None)


def reset(headers: Any = (), state: EngineState = EngineState.READY, **options: Any) -> tuple[Answer, int]:
    async def run() -> tuple[Answer, int]:
        app, engine = make_app(silent, state, **options)
        calls: list[int] = []
        engine.reset_prefix_cache = lambda: calls.append(1)  # type: ignore[attr-defined]
        return await call(app, "POST", "/reset_prefix_cache", headers=headers), len(calls)

    return asyncio.run(run())


def test_reset_needs_the_admin_key() -> None:
    answer, calls = reset(bearer(ADMIN), api_key=(KEY,), admin_key=ADMIN)
    assert (answer.status, answer.json, calls) == (200, {"reset": True}, 1)
    answer, calls = reset(bearer(ADMIN), admin_key=ADMIN)
    assert (answer.status, calls) == (200, 1)
    for headers in ((), bearer(KEY), bearer("other")):
        for options in ({"api_key": (KEY,), "admin_key": ADMIN}, {"admin_key": ADMIN}):
            answer, calls = reset(headers, **options)
            assert (answer.status, calls) == (401, 0)


def test_reset_is_not_there_without_an_admin_key() -> None:
    assert reset()[0].status == 404
    assert reset(api_key=(KEY,))[0].status == 401
    answer, calls = reset(bearer(KEY), api_key=(KEY,))
    assert (answer.status, calls) == (404, 0)


def test_reset_while_loading() -> None:
    assert reset(bearer(ADMIN), EngineState.STARTING, admin_key=ADMIN)[0].status == 503


def test_the_admin_key_opens_nothing_else() -> None:
    assert get("/v1/models", headers=bearer(ADMIN), api_key=(KEY,), admin_key=ADMIN).status == 401


def test_every_route_of_v1_is_at_the_root_and_under_beta() -> None:
    app, _ = make_app(silent)
    routes = {
        (method, context.path)
        for context in iter_route_contexts(app.routes)
        if isinstance(context.original_route, APIRoute)
        for method in context.methods or ()
    }
    under_v1 = [
        (method, path.removeprefix("/v1"))
        for method, path in routes
        if path.startswith("/v1/") and not path.startswith("/v1/messages")  # Anthropic's clients always say /v1
    ]
    assert len(under_v1) >= 7
    for method, path in under_v1:
        assert {(method, path), (method, f"/beta{path}")} <= routes
    assert not [path for path in app.openapi()["paths"] if path.startswith(("/beta", "/chat", "/completions"))]


@pytest.mark.parametrize("prefix", ["/v1", "", "/beta"])
def test_aliases_answer(prefix: str) -> None:
    async def run() -> None:
        app, _ = make_app(answers("ok"), served_model_name=("hub/name",))
        assert (await post(app, f"{prefix}/chat/completions", chat())).json["object"] == "chat.completion"
        assert (await post(app, f"{prefix}/completions", {"prompt": "x"})).json["object"] == "text_completion"
        assert (await call(app, "GET", f"{prefix}/models/hub/name")).json["id"] == "hub/name"
        assert (await call(app, "GET", f"{prefix}/completions")).headers["allow"] == "POST"

    asyncio.run(run())


def test_the_page_loads_nothing_from_elsewhere() -> None:
    page = get("/docs", api_key=(KEY,))
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    links = re.findall(r'(?:src|href)="([^"]+)"', page.body.decode())
    assert len(links) == 4
    for link in links:
        assert link.startswith(("docs/", "data:")), link
        if link.startswith("docs/"):
            asset = get(f"/{link}", api_key=(KEY,))
            assert (asset.status, asset.headers["content-security-policy"]) == (
                200,
                page.headers["content-security-policy"],
            )
            assert asset.headers["content-type"].startswith(("text/javascript", "text/css"))


@pytest.mark.parametrize(
    ("name", "begin"), [("swagger-ui-bundle.js", b"/*! For license"), ("swagger-ui.css", b".swagger-ui")]
)
def test_assets_with_and_without_compression(name: str, begin: bytes) -> None:
    packed = get(f"/docs/{name}", headers=[(b"accept-encoding", b"gzip, br")])
    assert packed.headers["content-encoding"] == "gzip"
    plain = get(f"/docs/{name}")
    assert "content-encoding" not in plain.headers
    assert plain.body == gzip.decompress(packed.body)
    assert plain.body.startswith(begin)


def test_every_body_has_an_example_that_is_answered() -> None:
    async def run() -> None:
        app, _ = make_app(answers("ok"))
        bodies = {
            path: operation["requestBody"]["content"]["application/json"]
            for path, operations in app.openapi()["paths"].items()
            for operation in operations.values()
            if "requestBody" in operation
        }
        assert len(bodies) >= 8
        for path, body in bodies.items():
            answer = await post(app, path, body["example"])
            assert answer.status == 200, (path, answer.body)
            assert "x-ignored-fields" not in answer.headers

    asyncio.run(run())
