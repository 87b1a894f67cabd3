"""The application as a whole: operational endpoints, models, the document, and that no torch is in it."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from typing import Any

import jsonschema
import pytest

from server.engine_client import EngineState
from tests.server.harness import Answer, answers, call, chat, make_app, post, silent
from tests.server.typed_events import typed_events


def get(path: str, state: EngineState = EngineState.READY, **options: Any) -> Answer:
    async def run() -> Answer:
        app, engine = make_app(silent, state, **options)
        if state is EngineState.STARTING:
            engine.ready = None
        return await call(app, "GET", path)

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("state", "health", "ready"),
    [
        (EngineState.STARTING, 200, 503),
        (EngineState.READY, 200, 200),
        (EngineState.DOWN, 503, 503),
        (EngineState.STOPPED, 200, 503),
    ],
)
def test_health_and_readiness(state: EngineState, health: int, ready: int) -> None:
    answer = get("/health", state)
    assert (answer.status, answer.json) == (health, {"status": str(state)})
    answer = get("/ready", state)
    assert answer.status == ready
    assert ("retry-after" in answer.headers) == ("reason" in answer.json) == (ready == 503)
    assert get("/livez", state).status == 200


def test_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", get("/version").json["version"])


def test_models() -> None:
    names = ("first", "hub/second")
    listed = get("/v1/models", served_model_name=names).json
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == list(names)
    for model in listed["data"]:
        assert get(f"/v1/models/{model['id']}", served_model_name=names).json.keys() == model.keys()
        assert (model["object"], model["owned_by"], model["max_model_len"]) == ("model", "latentd", 256)
    assert get("/v1/models/other", served_model_name=names).error["code"] == "model_not_found"
    assert get("/v1/models", EngineState.STARTING).json["data"][0]["max_model_len"] is None


def test_answers_name_the_model_as_it_was_asked_for() -> None:
    async def run(**data: Any) -> str:
        app, _ = make_app(answers("ok"), served_model_name=("first", "second"))
        model: str = (await post(app, "/v1/chat/completions", chat(**data))).json["model"]
        return model

    assert asyncio.run(run(model="second")) == "second"
    assert asyncio.run(run()) == "first"


def test_document_is_true() -> None:
    document = get("/openapi.json").json
    for path, operations in document["paths"].items():
        for operation in operations.values():
            responses = operation["responses"]
            assert "422" not in responses
            for status in ("400", "403", "500"):
                assert responses[status]["content"]["application/json"]["schema"]["$ref"].endswith("ErrorResponse")
            if "requestBody" in operation:
                assert {"401", "404", "413", "429", "503"} <= responses.keys()
            if path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"):
                assert {"application/json", "text/event-stream"} == responses["200"]["content"].keys()
    names = set(document["components"]["schemas"])
    assert {ref.rsplit("/", 1)[1] for ref in re.findall(r'#/components/schemas/[^"\']+', str(document))} <= names


def test_answers_have_the_documented_shape() -> None:
    async def run() -> None:
        app, _ = make_app(answers("one two"))
        document = (await call(app, "GET", "/openapi.json")).json

        def check(value: Any, name: str) -> None:
            jsonschema.validate(value, {"$ref": f"#/components/schemas/{name}", "components": document["components"]})

        for path, body, whole, chunk in (
            ("/v1/chat/completions", chat(), "ChatCompletion", "ChatCompletionChunk"),
            ("/v1/completions", {"prompt": "x"}, "Completion", "Completion"),
        ):
            check((await post(app, path, body)).json, whole)
            options = {"include_usage": True, "continuous_usage_stats": True}
            for event in (await post(app, path, {**body, "stream": True, "stream_options": options})).events:
                check(event, chunk)
            check((await post(app, path, {})).json, "ErrorResponse")
        for path, body, whole in (
            ("/v1/responses", {"input": "x"}, "ResponseObject"),
            ("/v1/messages", {**chat(), "max_tokens": 8}, "AnthropicMessage"),
        ):
            check((await post(app, path, body)).json, whole)
            content = document["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]
            stream = content["itemSchema"]["properties"]["data"]["contentSchema"]
            for event in typed_events(await post(app, path, {**body, "stream": True})):
                jsonschema.validate(event, {**stream, "components": document["components"]})
        check((await post(app, "/v1/messages", {})).json, "AnthropicErrorResponse")
        check((await call(app, "GET", "/v1/models")).json, "ModelList")
        check((await call(app, "GET", "/health")).json, "Health")
        check(chat(), "ChatCompletionRequest")
        check({"prompt": [[1, 2]], "stop": ["a"]}, "CompletionRequest")
        with pytest.raises(jsonschema.ValidationError):
            check({"prompt": ""}, "CompletionRequest")

    asyncio.run(run())


def test_no_torch() -> None:
    code = "import sys, server.app; sys.exit(any(name.split('.')[0] == 'torch' for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
