"""Parameters of both completion endpoints: choices, constraints, ids, times and deadlines."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

import pytest

from scheduler.messages import AddRequest, FinishReason, Started
from server.streams import RequestStream
from tests.server.harness import (
    CHAT,
    COMPLETIONS,
    TEXT,
    WINDOW,
    Answer,
    ScriptedEngine,
    answers,
    call,
    chat,
    finish,
    ids_of,
    make_app,
    post,
    run,
    scores,
    silent,
    tokenizer,
)

# Choices


def test_choices_of_several_prompts_are_numbered_across() -> None:
    for prompt in (["a", "b", "c"], [[5], [6, 7], [8]]):
        answer, engine = run(answers("ok"), prompt=prompt, n=2, seed=7)
        assert [choice["index"] for choice in answer.json["choices"]] == list(range(6))
        assert len({request.request_id for request in engine.requests}) == 6
        assert sorted(request.params.seed for request in engine.requests) == [7, 7, 7, 8, 8, 8]
        usage = answer.json["usage"]
        assert usage["completion_tokens"] == 6 * len(ids_of("ok"))
        assert usage["prompt_tokens"] == sum(len(request.prompt) // 4 for request in engine.requests) / 2
        assert not engine.streams


def test_later_choices_wait_for_the_first_token_of_the_first() -> None:
    order: list[str] = []

    def script(engine: ScriptedEngine, request: AddRequest, out: RequestStream) -> None:
        order.append("submit")

        async def push() -> None:
            await asyncio.sleep(0.01)
            order.append("token")
            out.push(ids_of("ok"), started=Started(0, 0.0, 0.0))
            await asyncio.sleep(0.01)
            out.push([], finished=finish())

        engine.tasks.append(asyncio.ensure_future(push()))

    answer, _ = run(script, CHAT, n=3)
    assert order == ["submit", "token", "submit", "submit", "token", "token"]
    assert len(answer.json["choices"]) == 3


def test_choices_without_a_seed_differ() -> None:
    _, engine = run(answers("ok"), n=4)
    assert len({request.params.seed for request in engine.requests}) == 4


def test_roles_come_first_and_in_order() -> None:
    events = run(answers(TEXT), CHAT, n=3, stream=True)[0].events
    choices = [event["choices"][0] for event in events]
    assert [choice["index"] for choice in choices[:3]] == [0, 1, 2]
    assert all(choice["delta"] == {"role": "assistant", "content": ""} for choice in choices[:3])
    assert all("role" not in choice["delta"] for choice in choices[3:])
    for index in range(3):
        own = [choice for choice in choices if choice["index"] == index]
        assert "".join(choice["delta"].get("content", "") for choice in own) == TEXT
        assert [choice["finish_reason"] for choice in own if choice["finish_reason"]] == ["length"]


def test_a_client_that_leaves_ends_all_choices() -> None:
    def first_only(engine: ScriptedEngine, request: AddRequest, out: RequestStream) -> None:
        out.push(ids_of("one"), started=Started(0, 0.0, 0.0))

    async def go() -> ScriptedEngine:
        app, engine = make_app(first_only, max_open_requests=6)
        gone = asyncio.Event()
        body = {"prompt": ["a", "b"], "n": 3, "stream": True}

        def leave(answer: Answer) -> None:
            if len(engine.requests) == 6:
                gone.set()

        await post(app, COMPLETIONS, body, disconnect=gone, on_write=leave)
        assert len(set(engine.aborted)) == 6
        engine._script = answers("ok")
        assert (await post(app, COMPLETIONS, {"prompt": "x", "n": 6})).status == 200
        return engine

    assert not asyncio.run(go()).streams


def test_a_failing_choice_fails_the_answer_and_ends_the_others() -> None:
    def script(engine: ScriptedEngine, request: AddRequest, out: RequestStream) -> None:
        is_second = len(engine.requests) == 2
        out.push(
            ids_of("one"), started=Started(0, 0.0, 0.0), finished=finish(FinishReason.ERROR) if is_second else None
        )

    answer, engine = run(script, n=3)
    assert answer.status == 500
    assert not engine.streams


def test_choices_count_at_the_door() -> None:
    answer, engine = run(answers("ok"), options={"max_open_requests": 3}, n=4)
    assert (answer.status, answer.error["param"]) == (400, "n")
    assert not engine.requests
    assert run(answers("ok"), options={"max_open_requests": 4}, n=4)[0].status == 200


def test_best_of() -> None:
    assert run(answers("ok"), n=2, best_of=2)[0].status == 200
    for data in ({"best_of": 2}, {"best_of": 1, "n": 2}):
        answer, _ = run(silent, **data)
        assert (answer.status, answer.error["param"]) == (400, "best_of")


# What the engine is told


def test_constraints_on_tokens_arrive() -> None:
    _, engine = run(
        answers("ok"), logit_bias={"5": -100, "6": 1.5}, allowed_token_ids=[5, 6], min_tokens=3, bad_words=["two"]
    )
    params = engine.requests[0].params
    assert (params.logit_bias, params.allowed_token_ids, params.min_tokens) == ({5: -100.0, 6: 1.5}, (5, 6), 3)
    assert set(params.bad_words) == {tuple(ids_of("two")), tuple(ids_of(" two"))}


@pytest.mark.parametrize("field", ["logit_bias", "allowed_token_ids", "stop_token_ids"])
def test_ids_are_below_the_vocabulary(field: str) -> None:
    size = tokenizer().vocab_size

    def value(token_id: int) -> Any:
        return {str(token_id): 1} if field == "logit_bias" else [token_id]

    assert run(answers("ok"), **{field: value(size - 1)})[0].status == 200
    answer, _ = run(silent, **{field: value(size)})
    place = f"logit_bias.{size}" if field == "logit_bias" else f"{field}[0]"
    assert (answer.status, answer.error["param"]) == (400, place)


def test_min_tokens() -> None:
    for data in ({"min_tokens": 5, "max_tokens": 4}, {"min_tokens": 17}):
        answer, _ = run(silent, **data)
        assert (answer.status, answer.error["param"]) == (400, "min_tokens")
    _, engine = run(answers("ok"), prompt=[5] * (WINDOW - 2), min_tokens=5, max_tokens=5)
    assert (engine.requests[0].params.min_tokens, engine.requests[0].params.max_tokens) == (2, 2)
    text = "one two one two three"
    early = len(ids_of("one two"))
    assert run(answers(text), stop="two", min_tokens=early)[0].json["choices"][0]["text"] == "one "
    assert run(answers(text), stop="two", min_tokens=early + 1)[0].json["choices"][0]["text"] == "one two one "


# Ids


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_token_ids(path: str) -> None:
    answer, engine = run(answers(TEXT), path, return_token_ids=True)
    body = answer.json
    assert body["choices"][0]["token_ids"] == ids_of(TEXT)
    holder = body if path == CHAT else body["choices"][0]
    assert holder["prompt_token_ids"] == engine.prompt()
    events = run(answers(TEXT), path, return_token_ids=True, stream=True)[0].events
    streamed = [event["choices"][0].get("token_ids") or [] for event in events]
    assert list(itertools.chain.from_iterable(streamed)) == ids_of(TEXT)
    holders = events if path == CHAT else [event["choices"][0] for event in events]
    assert [each["prompt_token_ids"] for each in holders if "prompt_token_ids" in each] == [engine.prompt()]
    assert "token_ids" not in run(answers(TEXT), path)[0].json["choices"][0]


def test_held_back_text_does_not_hold_back_ids_or_logprobs() -> None:
    """Every chunk has the ids and log-probabilities of exactly its tokens."""
    text = "one two"
    for path in (COMPLETIONS, CHAT):
        ask: dict[str, Any] = {"logprobs": True, "top_logprobs": 0} if path == CHAT else {"logprobs": 0}
        events = run(scores(text), path, stop="one two!", stream=True, return_token_ids=True, **ask)[0].events
        pieces = [e["choices"][0] for e in events if e["choices"][0].get("token_ids")]
        assert len(pieces) == len(ids_of(text))
        for piece in pieces:
            logprobs = piece["logprobs"]
            assert len(logprobs["content" if path == CHAT else "tokens"]) == len(piece["token_ids"])


# Names, times, deadlines


def test_request_id() -> None:
    async def go(headers: Any = ()) -> str:
        app, _ = make_app(answers("ok"))
        answer = await post(app, CHAT, chat(request_id="mine.1"), headers)
        return answer.headers["x-request-id"]

    assert asyncio.run(go()) == "mine.1"
    assert asyncio.run(go([(b"x-request-id", b"other")])) == "other"


def test_strict() -> None:
    answer, _ = run(silent, options={"strict": True}, foo=1)
    assert (answer.status, answer.error["param"]) == (400, "foo")
    assert run(answers("ok"), options={"strict": True}, user="me")[0].status == 200


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_timings(path: str) -> None:
    answer, _ = run(scores(), path)
    timings = answer.json["timings"]
    assert (timings["queue_ms"], timings["prefill_ms"], timings["cached_tokens"]) == (250, 500, 0)
    assert timings["prefill_tokens_per_second"] > 0
    assert timings["total_ms"] >= timings["first_token_ms"] >= 0
    assert answer.headers["server-timing"].startswith("queue;dur=250.0, prefill;dur=500.0, decode;dur=")
    for options in (None, {"include_usage": True}):
        events = run(scores(), path, stream=True, stream_options=options)[0].events
        assert ["timings" in event for event in events] == [False] * (len(events) - 1) + [True]


def test_progress() -> None:
    def script(engine: ScriptedEngine, request: AddRequest, out: RequestStream) -> None:
        async def push() -> None:
            if request.progress:
                for processed in (1, 2):
                    out.push([], progress=processed)
                    await asyncio.sleep(0.001)
            out.push(ids_of("ok"), started=Started(0, 0.0, 0.0), finished=finish())

        engine.tasks.append(asyncio.ensure_future(push()))

    for path in (COMPLETIONS, CHAT):
        answer, engine = run(script, path, stream=True, return_progress=True)
        total = len(engine.prompt())
        progress = [event["prompt_progress"] for event in answer.events if "prompt_progress" in event]
        assert progress == [{"total": total, "processed": 1}, {"total": total, "processed": 2}]
        answer, _ = run(script, path, stream=True, stream_options={"include_progress": True})
        assert answer.body.count(b": progress ") == 2
        assert not any("prompt_progress" in event for event in answer.events)
        assert not run(script, path, return_progress=True)[1].requests[0].progress


def test_timeout_before_the_first_token() -> None:
    for stream in (False, True):
        answer, engine = run(silent, CHAT, timeout=0.3, stream=stream)
        assert (answer.status, answer.error["code"]) == (408, "timeout")
        assert answer.headers["x-should-retry"] == "false"
        assert len(engine.aborted) == 1


def test_timeout_after_the_first_token() -> None:
    def script(engine: ScriptedEngine, request: AddRequest, out: RequestStream) -> None:
        out.push(ids_of("one"), started=Started(0, 0.0, 0.0))

    answer, engine = run(script, CHAT, timeout=0.05, stream=True, n=2)
    assert answer.status == 200
    assert answer.events[-1]["error"]["code"] == "timeout"
    assert len(engine.aborted) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_cancel_by_id(stream: bool) -> None:
    async def go(started: bool) -> tuple[Answer, Answer, ScriptedEngine]:
        def script(engine: ScriptedEngine, request: AddRequest, out: RequestStream) -> None:
            if started:
                out.push(ids_of("one"), started=Started(0, 0.0, 0.0))

        app, engine = make_app(script)
        request = asyncio.create_task(post(app, CHAT, chat(n=2, request_id="mine", stream=stream)))
        while len(engine.requests) < (2 if started else 1):
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        refused = await call(app, "POST", "/v1/requests/other/cancel")
        assert refused.status == 404
        cancelled = await call(app, "POST", "/v1/requests/mine/cancel")
        return await request, cancelled, engine

    for started in (False, True):
        answer, cancelled, engine = asyncio.run(go(started))
        assert cancelled.json == {"cancelled": True}
        error = answer.events[-1]["error"] if stream and started else answer.error
        assert error["code"] == "cancelled"
        assert not engine.streams


def test_answers_are_json_with_every_parameter() -> None:
    """-Infinity and NaN are not."""
    body = run(scores(), logprobs=1, echo=True, n=2, return_token_ids=True)[0].body
    json.loads(body, parse_constant=lambda name: pytest.fail(name))
