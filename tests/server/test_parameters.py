"""Parameters of both completion endpoints: choices, log-probabilities, echo, prefixes, holes, times and deadlines."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

import pytest

from model.batch import Logprobs
from scheduler.messages import AddRequest, FinishReason, Started
from server.prompts import FIM_TOKENS
from server.streams import RequestStream
from tests.server.harness import (
    WINDOW,
    Answer,
    Script,
    ScriptedEngine,
    answers,
    call,
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
TEXT = "one two three"


def run(script: Script, path: str = COMPLETIONS, options: Any = None, **data: Any) -> tuple[Answer, ScriptedEngine]:
    async def go() -> tuple[Answer, ScriptedEngine]:
        app, engine = make_app(script, **(options or {}))
        body = chat(**data) if path == CHAT else {"prompt": "Hello", **data}
        return await post(app, path, body), engine

    return asyncio.run(go())


def entries(ids: list[int], k: int) -> Logprobs:
    """Made-up but recognisable: token i has -i / 10, the alternatives are its neighbours."""
    return Logprobs(
        token_ids=[[token_id, *range(token_id, token_id + k)] for token_id in ids],
        logprobs=[[-token_id / 10, *(-token_id / 10 - more for more in range(k))] for token_id in ids],
    )


def scores(text: str = TEXT) -> Script:
    """An engine that gives the log-probabilities it is asked for, also of the prompt, in chunks of three."""
    ids = ids_of(text)

    def script(engine: ScriptedEngine, request: AddRequest, out: RequestStream) -> None:
        prompt, params = engine.prompt(), request.params

        async def push() -> None:
            if params.prompt_logprobs is not None:
                for start in range(1, len(prompt), 3):
                    out.push([], prompt_logprobs=entries(prompt[start : start + 3], params.prompt_logprobs))
                    await asyncio.sleep(0)
            for index, token_id in enumerate(ids[: params.max_tokens]):
                logprobs = None if params.logprobs is None else entries([token_id], params.logprobs)
                out.push([token_id], started=None if index else Started(0, 0.25, 0.5), logprobs=logprobs)
                await asyncio.sleep(0)
            out.push([], finished=finish())

        engine.tasks.append(asyncio.ensure_future(push()))

    return script


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


# Log-probabilities


def test_chat_logprobs() -> None:
    whole = run(scores(), CHAT, logprobs=True, top_logprobs=2)[0].json["choices"][0]["logprobs"]
    ids = ids_of(TEXT)
    assert [entry["logprob"] for entry in whole["content"]] == [-token_id / 10 for token_id in ids]
    assert b"".join(bytes(entry["bytes"]) for entry in whole["content"]).decode() == TEXT
    assert all(len(entry["top_logprobs"]) == 2 for entry in whole["content"])
    events = run(scores(), CHAT, logprobs=True, top_logprobs=2, stream=True)[0].events
    streamed = [event["choices"][0]["logprobs"] for event in events]
    assert list(itertools.chain.from_iterable(each["content"] for each in streamed if each)) == whole["content"]
    none = run(scores(), CHAT, logprobs=True)[0].json["choices"][0]["logprobs"]["content"]
    assert all(entry["top_logprobs"] == [] for entry in none)
    assert run(scores(), CHAT)[0].json["choices"][0]["logprobs"] is None
    refused = run(silent, CHAT, top_logprobs=1)[0]
    assert (refused.status, refused.error["param"]) == (400, "top_logprobs")


def test_bytes_are_those_of_the_token() -> None:
    """A token may be half a character; its text is then lossy, its bytes are not."""
    text = "漢字🙂"
    content = run(scores(text), CHAT, logprobs=True)[0].json["choices"][0]["logprobs"]["content"]
    assert [bytes(entry["bytes"]) for entry in content] == [tokenizer().token_bytes(each) for each in ids_of(text)]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == text


def test_minus_infinity_is_clamped() -> None:
    def script(engine: ScriptedEngine, request: AddRequest, out: RequestStream) -> None:
        logprobs = Logprobs([[5, 6]], [[float("-inf"), float("-inf")]])
        out.push([5], started=Started(0, 0.0, 0.0), logprobs=logprobs, finished=finish())

    [entry] = run(script, CHAT, logprobs=True, top_logprobs=1)[0].json["choices"][0]["logprobs"]["content"]
    assert (entry["logprob"], entry["top_logprobs"][0]["logprob"]) == (-9999.0, -9999.0)
    assert run(script, logprobs=1)[0].json["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0]


def test_completion_logprobs() -> None:
    logprobs = run(scores(), logprobs=2)[0].json["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"]) == TEXT
    assert logprobs["text_offset"] == list(itertools.accumulate(map(len, logprobs["tokens"][:-1]), initial=0))
    assert all(token in top for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True))
    only = run(scores(), logprobs=0)[0].json["choices"][0]["logprobs"]
    assert [list(top) for top in only["top_logprobs"]] == [[token] for token in only["tokens"]]
    assert run(scores())[0].json["choices"][0]["logprobs"] is None


def joined(events: list[Any]) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for event in events:
        for name, column in columns.items():
            column += event["choices"][0]["logprobs"][name]
    return columns


@pytest.mark.parametrize("echo", [False, True])
def test_offsets_go_on_over_the_chunks_of_a_stream(echo: bool) -> None:
    data = {"logprobs": 1, "echo": echo, "prompt": "naïve 漢字"}
    whole = run(scores(), **data)[0].json["choices"][0]
    events = run(scores(), **data, stream=True)[0].events
    assert joined(events) == whole["logprobs"]
    assert "".join(event["choices"][0]["text"] for event in events) == whole["text"]


def test_echo_has_an_entry_for_every_token() -> None:
    answer, engine = run(scores(), prompt=[5, 6, 7, 8], echo=True, logprobs=1, max_tokens=1)
    logprobs = answer.json["choices"][0]["logprobs"]
    assert engine.requests[0].params.prompt_logprobs == 1
    assert {len(column) for column in logprobs.values()} == {5}
    assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
    assert logprobs["token_logprobs"][1:4] == [-0.6, -0.7, -0.8]
    assert all(logprobs["top_logprobs"][1:])


def test_echo() -> None:
    assert run(answers(" there"), echo=True)[0].json["choices"][0]["text"] == "Hello there"
    events = run(answers(" there"), echo=True, stream=True, n=2)[0].events
    for index in range(2):
        texts = [e["choices"][0]["text"] for e in events if e["choices"][0]["index"] == index]
        assert "".join(texts) == "Hello there"
    assert not any(request.params.prompt_logprobs for request in run(answers("ok"), echo=True)[1].requests)


def test_max_tokens_zero_scores_the_prompt_only() -> None:
    answer, engine = run(scores(), echo=True, logprobs=1, max_tokens=0)
    [choice] = answer.json["choices"]
    assert engine.requests[0].params.max_tokens == 1
    assert (choice["text"], choice["finish_reason"]) == ("Hello", "length")
    assert len(choice["logprobs"]["tokens"]) == answer.json["usage"]["prompt_tokens"]
    assert answer.json["usage"]["completion_tokens"] == 0
    assert run(answers("ok"), max_tokens=0)[0].json["choices"][0]["text"] == ""
    refused = run(silent, CHAT, max_tokens=0)[0]
    assert (refused.status, refused.error["param"]) == (400, "max_tokens")


def test_only_the_first_choice_scores_the_prompt() -> None:
    answer, engine = run(scores(), echo=True, logprobs=1, n=2)
    assert [request.params.prompt_logprobs for request in engine.requests] == [1, None]
    first, second = answer.json["choices"]
    assert first["logprobs"] == second["logprobs"]


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
    assert (answer.status, answer.error["param"].partition("[")[0]) == (400, field)


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


# Prefixes and holes


def prompt_of(**data: Any) -> list[int]:
    answer, engine = run(answers("ok"), CHAT, **data)
    assert answer.status == 200, answer.body
    return engine.prompt()


@pytest.mark.parametrize(
    "content", ["Once upon", "ends with a space ", "  ", "a<｜User｜>b", [{"type": "text", "text": "x"}]]
)
def test_the_answer_continues_the_last_message(content: Any) -> None:
    user = {"role": "user", "content": "Tell"}
    text = content if isinstance(content, str) else "x"
    begun = prompt_of(messages=[user])
    by_flag = prompt_of(messages=[user, {"role": "assistant", "content": content}], continue_final_message=True)
    by_prefix = prompt_of(messages=[user, {"role": "assistant", "content": content, "prefix": True}])
    assert by_flag == by_prefix
    assert by_flag[: len(begun)] == begun
    assert b"".join(map(tokenizer().token_bytes, by_flag[len(begun) :])).decode() == text
    if "<" not in text:
        assert by_flag[len(begun) :] == ids_of(text)


@pytest.mark.parametrize(
    ("data", "param"),
    [
        ({"continue_final_message": True}, "continue_final_message"),
        ({"messages": [{"role": "user", "content": "x", "prefix": True}]}, "messages[0].prefix"),
        (
            {"messages": [{"role": "assistant", "content": "x", "prefix": True}, {"role": "user", "content": "x"}]},
            "messages[0].prefix",
        ),
    ],
)
def test_only_the_last_message_of_the_assistant_is_continued(data: dict[str, Any], param: str) -> None:
    answer, _ = run(silent, CHAT, **data)
    assert (answer.status, answer.error["param"]) == (400, param)


def test_contradictions_about_the_last_message() -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "prefix": True}]
    for data, param in (
        ({"add_generation_prompt": True}, "add_generation_prompt"),
        ({"continue_final_message": False}, "continue_final_message"),
    ):
        answer, _ = run(silent, CHAT, messages=messages, **data)
        assert (answer.status, answer.error["param"]) == (400, param)
    assert prompt_of(add_generation_prompt=False) == prompt_of()[: len(prompt_of(add_generation_prompt=False))]


def test_suffix() -> None:
    _, engine = run(answers("ok"), prompt="def f(", suffix="): <｜fim▁hole｜>")
    begin, hole, end = (ids_of(token)[0] for token in FIM_TOKENS)
    ids = engine.prompt()
    assert ids[:2] == [tokenizer().bos_token_id, begin]
    middle = ids.index(hole)
    assert ids[2:middle] == ids_of("def f(")
    assert ids[-1] == end
    assert hole not in ids[middle + 1 :]
    assert run(answers("ok"), suffix="")[1].prompt() == run(answers("ok"))[1].prompt()
    for data, param in (({"echo": True}, "echo"), ({"prompt": [5]}, "suffix")):
        answer, _ = run(silent, suffix="x", **data)
        assert (answer.status, answer.error["param"]) == (400, param)


def test_suffix_without_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer(), "added_tokens", ())
    answer, _ = run(silent, suffix="x")
    assert (answer.status, answer.error["param"]) == (400, "suffix")


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
