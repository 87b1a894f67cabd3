"""The door: ids, keys, hosts, headers, slow bodies, and one line in the log."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.routing import APIRoute, iter_route_contexts

from server import middleware
from server.middleware import OPEN_PATHS, is_loopback
from tests.server.harness import JSON, Answer, Header, answers, call, chat, make_app, post, silent

KEY = "secret-key-1"


def get(
    path: str, headers: Any = (), *, method: str = "GET", host: bytes | None = b"localhost", **options: Any
) -> Answer:
    async def run() -> Answer:
        app, _ = make_app(answers("ok"), **options)
        return await call(app, method, path, headers=headers, host=host)

    return asyncio.run(run())


def bearer(key: str) -> list[Header]:
    return [(b"authorization", b"Bearer " + key.encode())]


def all_paths() -> Iterator[tuple[str, str]]:
    app, _ = make_app(silent)
    for context in iter_route_contexts(app.routes):
        path = re.sub(r"\{[^}]+\}", "x", context.path)
        for method in context.methods or ():
            yield method, path


def test_every_route_wants_a_key_but_the_listed_ones() -> None:
    async def run() -> None:
        app, _ = make_app(answers("ok"), api_key=(KEY,))
        paths = list(all_paths())
        assert len(paths) >= 30
        for method, path in [*paths, ("GET", "/anything"), ("POST", "/")]:
            answer = await call(app, method, path)
            assert (answer.status == 401) == (path not in OPEN_PATHS), path
        assert ("GET", "/openapi.json") in paths
        assert {("POST", "/beta/chat/completions"), ("POST", "/completions"), ("POST", "/requests/x/cancel")} <= {
            *paths
        }

    asyncio.run(run())


@pytest.mark.parametrize(
    "path", ["//v1/models", "/V1/models", "/v1/models/", "/health/../v1/models", "/v1/models;/health"]
)
def test_spellings_of_a_path_open_nothing(path: str) -> None:
    assert get(path, api_key=(KEY,)).status == 401
    assert get("/v1/models", host=b"a/health?x=", api_key=(KEY,)).status == 401


def test_keys() -> None:
    keys = ("other", KEY)
    assert get("/v1/models", bearer(KEY), api_key=keys).status == 200
    assert get("/v1/models", [(b"authorization", b"bearer  " + KEY.encode())], api_key=keys).status == 200
    assert get("/v1/models", [(b"x-api-key", KEY.encode())], api_key=keys).status == 200
    for wrong in (bearer(KEY + "x"), bearer(KEY[:-1]), bearer(""), [(b"authorization", b"Basic " + KEY.encode())]):
        refused = get("/v1/models", wrong, api_key=keys)
        assert (refused.status, refused.headers["www-authenticate"]) == (401, "Bearer")
        assert refused.error["code"] == "invalid_api_key"
        assert KEY.encode() not in refused.body


def test_options_needs_no_key() -> None:
    assert get("/v1/models", method="OPTIONS", api_key=(KEY,)).status == 405


@pytest.mark.parametrize(
    "host", [b"localhost", b"localhost:8000", b"LOCALHOST", b"127.0.0.1:1", b"[::1]:8000", b"[::1]"]
)
def test_local_names(host: bytes) -> None:
    assert get("/v1/models", host=host).status == 200


def test_foreign_names_are_refused_on_a_keyless_local_server() -> None:
    for host in (b"evil.example", b"localhost.evil.example", b"evil.example:8000", b""):
        refused = get("/health", host=host)
        assert (refused.status, refused.error["code"]) == (403, "forbidden_host")
    assert get("/v1/models", bearer(KEY), host=b"evil.example", api_key=(KEY,)).status == 200


def test_a_server_for_everybody_takes_every_name() -> None:
    async def run() -> int:
        app, _ = make_app(answers("ok"), host="0.0.0.0")
        return (await call(app, "GET", "/v1/models", host=b"box.lan")).status

    assert asyncio.run(run()) == 200


def test_missing_host() -> None:
    assert get("/health", host=None).status == 400


def test_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.8.8.8", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "box")))


@pytest.mark.parametrize("request_id", ["a", "A.b_c-9", "x" * 128])
def test_good_ids_are_kept(request_id: str) -> None:
    headers = [(b"x-request-id", request_id.encode())]
    for path in ("/v1/models", "/nope"):
        assert get(path, headers).headers["x-request-id"] == request_id


@pytest.mark.parametrize("request_id", ["", "x" * 129, "a b", "a\nb", "é", "a;b"])
def test_other_ids_are_replaced(request_id: str) -> None:
    made = get("/v1/models", [(b"x-request-id", request_id.encode())]).headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", made)


def test_refusals_of_the_door_have_an_id_too() -> None:
    assert "x-request-id" in get("/v1/models", api_key=(KEY,)).headers
    assert "x-request-id" in get("/health", host=b"evil").headers


def test_a_body_that_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "BODY_SECONDS", 0.05)

    async def run() -> Answer:
        app, _ = make_app(answers("ok"))
        return await call(app, "POST", "/v1/completions", [], [JSON])

    answer = asyncio.run(run())
    assert (answer.status, answer.headers["connection"]) == (408, "close")
    assert "slowly" in answer.error["message"]


def test_bad_content_length() -> None:
    for length in (b"-1", b"+5", b"x", b"9" * 30):
        assert get("/v1/models", [(b"content-length", length)]).status == 413


def test_client_that_leaves_during_the_upload(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        app, _ = make_app(answers("ok"))
        gone = asyncio.Event()
        gone.set()
        await call(app, "POST", "/v1/completions", [], [JSON], disconnect=gone)

    with caplog.at_level(logging.INFO):
        asyncio.run(run())
    assert re.search(r"POST /v1/completions 499 ", caplog.text)
    assert "Traceback" not in caplog.text


def test_one_line_a_request_and_nothing_of_it(caplog: pytest.LogCaptureFixture) -> None:
    canary = "canary-51c2"

    async def run() -> None:
        app, _ = make_app(answers(canary), api_key=(KEY,))
        messages = [{"role": "user", "content": canary, "name": canary}]
        await post(app, "/v1/chat/completions", chat(messages=messages, user=canary, stop=canary + "?"), bearer(KEY))
        await post(app, "/v1/chat/completions", {"messages": canary}, bearer(KEY))
        await post(app, "/v1/chat/completions", chat(**{canary: 1}), bearer(canary))
        await call(app, "GET", f"/{canary}", headers=bearer(KEY))
        await call(app, "GET", f"/v1/models/{canary}", headers=bearer(KEY))
        await call(app, "GET", "/health")

    with caplog.at_level(logging.INFO):
        asyncio.run(run())
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 5
    assert re.fullmatch(
        r"POST /v1/chat/completions 200 [\d.]+ ms id=[0-9a-f]{32} "
        r"prompt=\d+ cached=0 completion=\d+ finish=length first_token=[\d.]+ ms",
        lines[0],
    )
    assert lines[4].startswith("GET /v1/models/{model_id:path} 404 ")
    assert canary not in caplog.text
    assert KEY not in caplog.text


def test_routes_are_documented_routes() -> None:
    app, _ = make_app(silent)
    documented = app.openapi()["paths"]
    for route in iter_route_contexts(app.routes):
        if isinstance(route.original_route, APIRoute) and route.original_route.include_in_schema:
            assert route.path.replace(":path}", "}") in documented


PAGE = "https://chat.example.org"
PREFLIGHT = [
    (b"origin", PAGE.encode()),
    (b"access-control-request-method", b"POST"),
    (b"access-control-request-headers", b"authorization,content-type,x-stainless-lang"),
]


def test_pages_of_the_allowed_origins_may_call() -> None:
    """The preflight passes without a key; errors can be read by the page as well; no other page may call."""
    options: dict[str, Any] = {"allowed_origins": (PAGE,), "api_key": (KEY,)}
    preflight = get("/v1/chat/completions", PREFLIGHT, method="OPTIONS", **options)
    assert preflight.status == 200
    assert preflight.headers["access-control-allow-origin"] == PAGE
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    for headers, status in ((bearer(KEY), 200), ([], 401)):
        answer = get("/v1/models", [(b"origin", PAGE.encode()), *headers], **options)
        assert (answer.status, answer.headers["access-control-allow-origin"]) == (status, PAGE)
        assert "X-Request-Id" in answer.headers["access-control-expose-headers"]
    foreign = get("/v1/models", [(b"origin", b"https://evil.example"), *bearer(KEY)], **options)
    assert "access-control-allow-origin" not in foreign.headers


def test_without_allowed_origins_no_page_may_call() -> None:
    preflight = get("/v1/chat/completions", PREFLIGHT, method="OPTIONS")
    assert preflight.status == 405
    assert not [name for name in preflight.headers if name.startswith("access-control")]


def test_cached_prompts_are_not_shared_between_keys() -> None:
    def salt(key: str | None, **fields: Any) -> str:
        async def run() -> str:
            keys = () if key is None else (KEY, "secret-key-2")
            app, engine = make_app(answers("ok"), api_key=keys)
            headers = [] if key is None else bearer(key)
            assert (await post(app, "/v1/chat/completions", chat(**fields), headers)).status == 200
            return engine.requests[0].cache_salt

        return asyncio.run(run())

    assert salt(KEY) == salt(KEY)
    assert salt(KEY, cache_salt="s") == salt(KEY, cache_salt="s") != salt(KEY)
    assert len({salt(KEY), salt("secret-key-2"), salt(None)}) == 3
    assert salt(KEY, cache_salt="s") != salt("secret-key-2", cache_salt="s")
