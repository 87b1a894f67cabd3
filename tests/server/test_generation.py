"""One sequence: what reaches the engine, what comes back as text, and that everything is given back at every end."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from model.config import GenerationDefaults
from scheduler.messages import AddRequest, FinishReason, Started
from server import app as app_module
from server.streams import RequestStream
from tests.server.harness import (
    WINDOW,
    Answer,
    Script,
    ScriptedEngine,
    answers,
    chat,
    finish,
    ids_of,
    make_app,
    post,
    silent,
    tokenizer,
)

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"


def run(script: Script, path: str = COMPLETIONS, **data: Any) -> tuple[Answer, ScriptedEngine]:
    async def go() -> tuple[Answer, ScriptedEngine]:
        app, engine = make_app(script)
        body = chat(**data) if path == CHAT else {"prompt": "Hello", **data}
        return await post(app, path, body), engine

    return asyncio.run(go())


def sent(path: str = COMPLETIONS, **data: Any) -> AddRequest:
    answer, engine = run(answers("ok"), path, **data)
    assert answer.status == 200, answer.body
    return engine.requests[0]


def deltas(*steps: list[int], **end: Any) -> Script:
    """Each list of ids is one delta; the last has the end."""

    def script(engine: ScriptedEngine, request: AddRequest, out: RequestStream) -> None:
        async def push() -> None:
            for index, ids in enumerate(steps):
                last = index == len(steps) - 1
                out.push(
                    list(ids),
                    finished=finish(**end) if last else None,
                    started=Started(0, 0.0, 0.0) if index == 0 else None,
                )
                await asyncio.sleep(0.001)

        engine.tasks.append(asyncio.ensure_future(push()))

    return script


def test_bos_is_there_exactly_once() -> None:
    bos = tokenizer().bos_token_id
    for path in (COMPLETIONS, CHAT):
        _, engine = run(answers("ok"), path)
        assert engine.prompt().count(bos) == 1
        assert engine.prompt()[0] == bos
    assert run(answers("ok"), add_special_tokens=False)[1].prompt() == ids_of("Hello")
    assert run(answers("ok"), prompt=[5, 6])[1].prompt() == [5, 6]
    assert run(answers("ok"), prompt=[[5, 6]])[1].prompt() == [5, 6]
    assert run(answers("ok"), prompt=["Hello"])[1].prompt()[1:] == ids_of("Hello")


def test_parts_and_developer_render_as_their_plain_forms() -> None:
    def prompt(messages: list[dict[str, Any]]) -> list[int]:
        return run(answers("ok"), CHAT, messages=messages)[1].prompt()

    plain = prompt([{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}])
    assert plain == prompt(
        [
            {"role": "developer", "content": "Be brief"},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        ]
    )


def test_sampling_defaults_of_openai(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "load_generation_defaults", lambda _: GenerationDefaults())
    params = sent().params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.0, 0.0, 1.0)
    assert params.max_tokens == 16
    assert sent(CHAT).params.max_tokens == WINDOW - len(run(answers("ok"), CHAT)[1].prompt())


def test_sampling_fields_arrive() -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.25,
        "min_p": 0.125,
        "presence_penalty": -1.5,
        "frequency_penalty": 1.5,
        "repetition_penalty": 1.25,
        "max_tokens": 7,
        "ignore_eos": True,
    }
    request = sent(**fields, top_k=5, stop_token_ids=[3, 4], priority=-2, cache_salt="s", seed=11)
    for name, value in fields.items():
        assert getattr(request.params, name) == value
    assert (request.params.top_k, request.params.stop_token_ids, request.params.seed) == (5, (3, 4), 11)
    assert (request.priority, request.cache_salt) == (-2, "s")
    assert sent(max_completion_tokens=3, max_tokens=9).params.max_tokens == 3
    assert sent(top_k=-1).params.top_k == 0
    assert sent(top_k=2**31 - 1).params.top_k == tokenizer().vocab_size
    assert sent(temperature=0.7, top_p=0).params.temperature == 0.0


def test_seeds() -> None:
    assert sent(seed=-1).params.seed == 2**64 - 1
    assert sent(seed=-(2**63)).params.seed == 2**63
    assert sent().params.seed != sent().params.seed


def test_a_seeded_server_draws_the_same_seeds() -> None:
    async def draw() -> list[int]:
        app, engine = make_app(answers("ok"), seed=5)
        for _ in range(3):
            await post(app, COMPLETIONS, {"prompt": "x"})
        return [request.params.seed for request in engine.requests]

    first = asyncio.run(draw())
    assert len(set(first)) == 3
    assert asyncio.run(draw()) == first


def test_request_wins_over_checkpoint_wins_over_openai(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = GenerationDefaults(temperature=0.3, top_p=0.9, top_k=40, repetition_penalty=1.1)
    monkeypatch.setattr(app_module, "load_generation_defaults", lambda _: defaults)
    params = sent(top_p=0.5).params
    assert (params.temperature, params.top_p, params.top_k, params.repetition_penalty) == (0.3, 0.5, 40, 1.1)
    assert sent(temperature=None, top_k=0).params.top_k == 0
    monkeypatch.setattr(app_module, "load_generation_defaults", lambda _: GenerationDefaults(do_sample=False))
    assert sent().params.temperature == 0.0
    assert sent(temperature=0.6).params.temperature == 0.6


def test_window() -> None:
    ids = [5] * (WINDOW - 4)
    assert sent(prompt=ids).params.max_tokens == 4
    assert sent(prompt=ids, max_tokens=4).params.max_tokens == 4
    assert sent(prompt=ids, max_tokens=5).params.max_tokens == 4
    for data in ({"prompt": [5] * WINDOW}, {"prompt": [5] * 5000}):
        answer, engine = run(answers("ok"), **data)
        assert answer.status == 400
        assert answer.error["code"] == "context_length_exceeded"
        assert answer.error["param"] == "prompt"
        assert answer.error["message"].startswith(
            f"This model's maximum context length is {WINDOW} tokens. However, you"
        )
        assert not engine.requests


def test_a_hopeless_text_is_refused_without_tokenizing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*_: object, **__: object) -> None:
        raise AssertionError("tokenized")

    monkeypatch.setattr(type(tokenizer()), "encode", never)
    monkeypatch.setattr(type(tokenizer()), "encode_segments", never)
    text = "x" * (WINDOW * tokenizer().max_token_bytes + 1)
    answer, _ = run(silent, prompt=text)
    assert answer.error["code"] == "context_length_exceeded"
    answer, _ = run(silent, CHAT, messages=[{"role": "user", "content": text}])
    assert (answer.error["code"], answer.error["param"]) == ("context_length_exceeded", "messages")


def test_answer_whole() -> None:
    answer, engine = run(answers("one two"), CHAT)
    body = answer.json
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["id"] == engine.requests[0].request_id
    [choice] = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "one two", "refusal": None}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "length", None)
    assert body["usage"]["completion_tokens"] == len(ids_of("one two"))
    body = run(answers("one two"))[0].json
    assert (body["object"], body["id"][:5]) == ("text_completion", "cmpl-")
    assert body["choices"] == [
        {"index": 0, "text": "one two", "logprobs": None, "finish_reason": "length", "stop_reason": None}
    ]


def test_cached_tokens() -> None:
    def script(engine: ScriptedEngine, request: AddRequest, out: RequestStream) -> None:
        out.push(ids_of("ok"), started=Started(2, 0.0, 0.0), finished=finish())

    usage = run(script, prompt=[5, 6, 7])[0].json["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2}
    assert (usage["prompt_cache_hit_tokens"], usage["prompt_cache_miss_tokens"]) == (2, 1)


def test_stop_text_ends_the_answer_and_the_request() -> None:
    ids = ids_of("one two three four")
    answer, engine = run(deltas(*([token_id] for token_id in ids)), stop="three")
    choice = answer.json["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("one two ", "stop", "three")
    assert len(engine.aborted) == 1
    kept = run(deltas(ids), stop=["three"], include_stop_str_in_output=True)[0]
    assert kept.json["choices"][0]["text"] == "one two three"


def test_tokens_behind_the_stop_text_are_not_counted() -> None:
    """However the deltas were merged for a slow reader."""
    ids = ids_of("one two three four five six")
    one_by_one = run(deltas(*([token_id] for token_id in ids)), stop="three")[0].json
    merged = run(deltas(ids), stop="three")[0].json
    assert merged["usage"]["completion_tokens"] == one_by_one["usage"]["completion_tokens"] < len(ids)
    assert merged["choices"] == one_by_one["choices"]


def test_held_back_text_comes_at_the_end() -> None:
    answer, _ = run(deltas(ids_of("one tw")), stop="two")
    choice = answer.json["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("one tw", "length")


def test_stop_token_is_counted_and_not_shown() -> None:
    ids = ids_of("one two")
    end = ids_of("!")[0]
    answer, _ = run(deltas([*ids, end], reason=FinishReason.STOP, stop_token_id=end), stop_token_ids=[end])
    choice = answer.json["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("one two", "stop", end)
    assert answer.json["usage"]["completion_tokens"] == len(ids) + 1
    eos = run(deltas([*ids, 1], reason=FinishReason.STOP, stop_token_id=1))[0].json["choices"][0]
    assert (eos["text"], eos["finish_reason"], eos["stop_reason"]) == ("one two", "stop", None)


def test_stream_and_whole_are_the_same_text() -> None:
    text = "naïve 漢字 🙂🙂 end"
    ids = ids_of(text)[:-2]

    async def both() -> tuple[str, str]:
        app, _ = make_app(deltas(*([token_id] for token_id in ids)))
        whole = (await post(app, COMPLETIONS, {"prompt": "x"})).json["choices"][0]["text"]
        events = (await post(app, COMPLETIONS, {"prompt": "x", "stream": True})).events
        return whole, "".join(event["choices"][0]["text"] for event in events)

    whole, streamed = asyncio.run(both())
    assert whole == streamed
    assert whole


def test_overload_is_refused_before_any_work() -> None:
    async def go() -> tuple[Answer, ScriptedEngine]:
        app, engine = make_app(silent, max_open_requests=2)
        gone = asyncio.Event()
        open_requests = [asyncio.create_task(post(app, CHAT, chat(), disconnect=gone)) for _ in range(2)]
        while len(engine.requests) < 2:
            await asyncio.sleep(0)
        refused = await post(app, CHAT, chat(stream=True))
        gone.set()
        await asyncio.gather(*open_requests)
        engine._script = answers("ok")
        assert (await post(app, CHAT, chat())).status == 200
        return refused, engine

    refused, engine = asyncio.run(go())
    assert (refused.status, refused.error["code"]) == (503, "server_overloaded")
    assert int(refused.headers["retry-after"]) >= 1
    assert len(engine.requests) == 3


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_client_that_leaves_while_its_prompt_is_tokenized(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> ScriptedEngine:
        app, engine = make_app(silent, max_open_requests=1)
        started, gone = asyncio.Event(), asyncio.Event()

        async def endless(*_: object, **__: object) -> None:
            started.set()
            await asyncio.Event().wait()

        with monkeypatch.context() as patch:
            patch.setattr(type(tokenizer()), "encode_segments", endless)
            body = chat() if path == CHAT else {"prompt": "x"}
            request = asyncio.create_task(post(app, path, body, disconnect=gone))
            await started.wait()
            gone.set()
            await request
        engine._script = answers("ok")
        assert (await post(app, CHAT, chat())).status == 200
        return engine

    engine = asyncio.run(go())
    assert len(engine.requests) == 1
    assert engine.aborted == []


def test_ignored_fields_are_named() -> None:
    for stream in (False, True):
        answer, _ = run(answers("ok"), user="me", foo=1, stream=stream)
        assert answer.headers["x-ignored-fields"] == "user, foo"
    assert "x-ignored-fields" not in run(answers("ok"))[0].headers
