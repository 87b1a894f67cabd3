"""Structured output of the real process: the model knows none of these schemas, so whatever is right is enforced."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.daemon import Daemon
from tests.schema_suite import suite, validate

MAX_TOKENS = 600
AT_ONCE = 16


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A pool of 24 blocks: sixteen requests of some hundred tokens each must preempt one another."""
    daemon = Daemon(tmp_path_factory.mktemp("small"), "--num-blocks", "24", "--max-model-len", "1024")
    yield daemon
    assert daemon.stop() == 0


def response_format(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **more}}


def chat(content: str = "Answer.", **fields: Any) -> dict[str, Any]:
    """Hot, so that much of what a grammar allows is tried."""
    defaults = {"max_tokens": MAX_TOKENS, "temperature": 2.0}
    return {"messages": [{"role": "user", "content": content}], **defaults, **fields}


async def answers(url: str, bodies: list[dict[str, Any]], at_once: int) -> list[dict[str, Any]]:
    """The whole answers, in order; every status is 200."""
    places = asyncio.Semaphore(at_once)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=at_once)) as client:

        async def one(body: dict[str, Any]) -> dict[str, Any]:
            async with places:
                response = await client.post("/v1/chat/completions", json=body)
            assert response.status_code == 200, (response.text, body)
            answer: dict[str, Any] = response.json()
            return answer

        return await asyncio.gather(*(one(body) for body in bodies))


def check(schemas: list[Any], given: list[dict[str, Any]]) -> int:
    """Every choice that ended by itself is valid; returns how many did."""
    ended = 0
    for schema, answer in zip(schemas, given, strict=True):
        for choice in answer["choices"]:
            if choice["finish_reason"] == "stop":
                validate(schema, choice["message"]["content"])
                ended += 1
            else:
                assert choice["finish_reason"] == "length"
                assert answer["usage"]["completion_tokens"] >= MAX_TOKENS
    return ended


def test_the_suite_sixteen_at_once(daemon: Daemon) -> None:
    schemas = list(suite().values())
    bodies = [chat(seed=seed, response_format=response_format(schema)) for seed, schema in enumerate(schemas)]
    given = asyncio.run(answers(daemon.url, bodies, AT_ONCE))
    assert check(schemas, given) >= 0.93 * len(schemas)  # the rest is text and lists without end


def test_under_preemption_nothing_changes(small: Daemon) -> None:
    """Sixteen schemas in a pool for four of them: the same seeds give the same texts as one after the other."""
    items = {"type": "string", "minLength": 12, "maxLength": 24}
    schemas = [{"type": "array", "items": items, "minItems": 24 + i, "maxItems": 30 + i} for i in range(8)]
    schemas += [suite()[name] for name in list(suite())[:: len(suite()) // 8][:8]]
    bodies = [
        chat("word " * 40 + str(index), seed=index, response_format=response_format(schema))
        for index, schema in enumerate(schemas)
    ]
    preempted = small.gauge("vllm:num_preemptions_total")
    together = asyncio.run(answers(small.url, bodies, AT_ONCE))
    assert small.gauge("vllm:num_preemptions_total") > preempted
    assert check(schemas, together) >= len(schemas) - 1
    alone = asyncio.run(answers(small.url, bodies[:2], 1))
    for one, other in zip(alone, together[:2], strict=True):
        assert one["choices"][0]["message"]["content"] == other["choices"][0]["message"]["content"]


def test_several_choices_follow_the_grammar_each_for_itself(daemon: Daemon) -> None:
    schema = {"type": "object", "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 10**6}}}
    schema |= {"required": ["x"], "additionalProperties": False}
    [answer] = asyncio.run(answers(daemon.url, [chat(n=8, seed=1, response_format=response_format(schema))], 1))
    assert check([schema], [answer]) == 8
    assert len({choice["message"]["content"] for choice in answer["choices"]}) > 1


def test_constraints_of_completions_and_streams(daemon: Daemon) -> None:
    with httpx.Client(base_url=daemon.url, timeout=60) as client:
        for constraint, allowed in (
            ({"choice": ["north", "south"]}, {"north", "south"}),
            ({"regex": "[01]{3}"}, {f"{i:03b}" for i in range(8)}),
            ({"grammar": 'start: "a" ("b" | "c")'}, {"ab", "ac"}),
            ({"json": {"enum": [1, "x"]}}, {"1", '"x"'}),
        ):
            body = {"prompt": "x", "temperature": 1, "max_tokens": 50, "structured_outputs": constraint}
            choice = client.post("/v1/completions", json=body).json()["choices"][0]
            assert (choice["text"] in allowed, choice["finish_reason"]) == (True, "stop")
            text = ""
            with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        text += "".join(each["text"] for each in json.loads(line[6:])["choices"])
            assert text in allowed


def test_json_object(daemon: Daemon) -> None:
    """Biased towards short: an object of a model that was asked for none may have keys without end."""
    with httpx.Client(base_url=daemon.url, timeout=60) as client:
        tokens = {text: client.post("/tokenize", json={"prompt": text, "add_special_tokens": False}) for text in '"}'}
        bias = {str(response.json()["tokens"][0]): 8 for response in tokens.values()}
    body = chat(response_format={"type": "json_object"}, logit_bias=bias)
    given = asyncio.run(answers(daemon.url, [{**body, "seed": seed} for seed in range(8)], 8))
    assert check([{"type": "object"}] * 8, given) >= 6


def test_greedy_decoding_ends(daemon: Daemon) -> None:
    """The most likely token may be white space for ever; the grammar has only so much of it."""
    schema = {"type": "array", "items": {"type": "boolean"}, "minItems": 3, "maxItems": 3}
    [answer] = asyncio.run(answers(daemon.url, [chat(temperature=0, response_format=response_format(schema))], 1))
    assert check([schema], [answer]) == 1


def test_refusals_come_as_errors_of_the_field(daemon: Daemon) -> None:
    with httpx.Client(base_url=daemon.url, timeout=60) as client:
        for fields, param in (
            ({"response_format": response_format({"not": {}})}, "response_format.json_schema.schema"),
            ({"response_format": {"type": "xml"}}, "response_format.type"),
            ({"structured_outputs": {"regex": "(a"}}, "structured_outputs"),
            ({"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs"),
            ({"response_format": response_format({"$ref": "#/$defs/none"})}, "response_format"),
        ):
            response = client.post("/v1/chat/completions", json=chat(**fields))
            error = response.json()["error"]
            assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)


def test_bombs_disturb_nobody(daemon: Daemon) -> None:
    """While ten of them are refused, each within 2 s, another request keeps getting its tokens."""
    patterns = {f"p{i}": {"type": "string", "pattern": f".*{chr(97 + i)}.*"} for i in range(20)}
    slow = {"$defs": patterns, "allOf": [{"$ref": f"#/$defs/{name}"} for name in patterns]}
    unions = [{"anyOf": [{"properties": {f"a{i}{j}": {"type": "null"}}} for j in range(4)]} for i in range(10)]
    nested: dict[str, Any] = {}
    for _ in range(100):
        nested = {"items": nested}
    bombs: list[dict[str, Any]] = [
        {"response_format": response_format(schema)}
        for schema in (
            slow,
            {"allOf": unions},
            nested,
            {"enum": [f"v{i}" for i in range(50_000)]},
            {"properties": {f"p{i}": {"type": "integer"} for i in range(3000)}},
            {"type": "string", "maxLength": 10**6},
            {"type": "integer", "multipleOf": 999_983},
            {"$ref": "#"},
        )
    ] + [{"structured_outputs": {"regex": "(a{1,500}){1,500}"}}, {"structured_outputs": {"regex": "(" * 1000}}]

    async def run() -> tuple[list[tuple[int, float]], list[float]]:
        async with httpx.AsyncClient(base_url=daemon.url, timeout=60) as client:
            gaps: list[float] = []

            async def bystander() -> None:
                body = chat(max_tokens=400, stream=True, ignore_eos=True)
                async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                    before = time.monotonic()
                    async for line in response.aiter_lines():
                        if line.startswith("data: {"):
                            gaps.append(time.monotonic() - before)
                            before = time.monotonic()

            async def refused(fields: dict[str, Any]) -> tuple[int, float]:
                started = time.monotonic()
                response = await client.post("/v1/chat/completions", json=chat(**fields))
                return response.status_code, time.monotonic() - started

            other = asyncio.create_task(bystander())
            await asyncio.sleep(0.1)
            results = await asyncio.gather(*map(refused, bombs))
            await other
            return results, gaps

    results, gaps = asyncio.run(run())
    assert [status for status, _ in results] == [400] * len(bombs)
    assert max(seconds for _, seconds in results) < 2
    assert len(gaps) >= 100
    assert max(gaps[1:]) < 1
    daemon.wait_idle(10)


def test_no_worker_outlives_the_daemon(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path)
    asyncio.run(answers(daemon.url, [chat(response_format=response_format({"type": "null"}))], 1))
    children = Path(f"/proc/{daemon.process.pid}/task").glob("*/children")
    workers = [
        pid
        for path in children
        for pid in path.read_text().split()
        if b"grammar_worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    assert len(workers) == 1
    assert daemon.stop() == 0
    assert not Path(f"/proc/{workers[0]}").exists()
