"""The official SDK against the real process: every endpoint, both colours, streams, errors."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.e2e.daemon import Daemon

MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tell me of the sea."}]
PROMPT = "The sea is"
GREEDY: Any = {"model": "builtin", "temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def client(daemon: Daemon) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{daemon.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(messages=MESSAGES, **GREEDY)
    assert answer.object == "chat.completion"
    assert answer.model == "builtin"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 24 or answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_chat_stream_is_the_same_text(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(messages=MESSAGES, **GREEDY)
    with client.chat.completions.create(
        messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **GREEDY
    ) as stream:
        chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].delta.role for chunk in chunks if chunk.choices].count("assistant") == 1
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_accumulating_stream_helper(client: openai.OpenAI) -> None:
    text = client.chat.completions.create(messages=MESSAGES, **GREEDY).choices[0].message.content or ""
    stop = text[len(text) // 2 :]  # the helper raises for an answer that ended by its length
    with client.chat.completions.stream(messages=MESSAGES, stop=stop, **GREEDY) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.role == "assistant"
    assert final.choices[0].message.content == text.removesuffix(stop)


def test_completions(client: openai.OpenAI) -> None:
    whole = client.completions.create(prompt=PROMPT, **GREEDY)
    assert whole.object == "text_completion"
    with client.completions.create(prompt=PROMPT, stream=True, **GREEDY) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
    assert client.completions.create(prompt=[PROMPT], **GREEDY).choices[0].text == whole.choices[0].text


def test_async_client(daemon: Daemon) -> None:
    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{daemon.url}/v1", api_key="unused") as client:

            async def one(index: int) -> str:
                if index % 2:
                    answer = await client.chat.completions.create(messages=MESSAGES, **GREEDY)
                    return answer.choices[0].message.content or ""
                async with await client.chat.completions.create(messages=MESSAGES, stream=True, **GREEDY) as stream:
                    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return list(await asyncio.gather(*(one(index) for index in range(8))))

    assert len(set(asyncio.run(run()))) == 1


def test_raw_response(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        messages=MESSAGES, user="someone", extra_headers={"X-Request-Id": "my-id.1"}, **GREEDY
    )
    assert raw.headers["x-request-id"] == "my-id.1"
    assert raw.headers["x-ignored-fields"] == "user"
    assert raw.parse()._request_id == "my-id.1"


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["builtin", "hub/builtin"]
    assert client.models.retrieve("builtin").owned_by == "latentd"
    assert client.models.retrieve("hub/builtin").id == "hub/builtin"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_seed_makes_sampling_repeatable(client: openai.OpenAI) -> None:
    def text(seed: int) -> str:
        answer = client.completions.create(prompt=PROMPT, model="builtin", temperature=1.0, max_tokens=16, seed=seed)
        return answer.choices[0].text

    assert text(-5) == text(-5)
    assert len({text(seed) for seed in range(4)}) > 1


def test_stop_text(client: openai.OpenAI) -> None:
    whole = client.completions.create(prompt=PROMPT, **GREEDY).choices[0].text
    stop = whole[len(whole) // 2 : len(whole) // 2 + 4]
    cut = client.completions.create(prompt=PROMPT, stop=[stop, "never seen"], **GREEDY).choices[0]
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"
    with client.completions.create(prompt=PROMPT, stop=stop, stream=True, **GREEDY) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == cut.text


def test_length_is_exact(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        prompt=PROMPT, model="builtin", max_tokens=40, temperature=1.0, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 40
    assert answer.choices[0].finish_reason == "length"


def test_second_time_comes_from_the_cache(client: openai.OpenAI) -> None:
    def ask() -> Any:
        return client.completions.create(prompt=list(range(100, 300)), **GREEDY)

    first, second = ask(), ask()
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens == 192
    assert first.choices[0].text == second.choices[0].text


def test_errors_have_their_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(messages=MESSAGES, extra_body={"use_beam_search": True}, **GREEDY)
    assert (caught.value.param, caught.value.code) == ("use_beam_search", "unsupported_parameter")
    with pytest.raises(openai.BadRequestError, match="maximum context length is") as caught:
        client.completions.create(prompt=[5] * 9000, **GREEDY)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(prompt=PROMPT, model="gpt-x")
    assert (missing.value.code, missing.value.type) == ("model_not_found", "invalid_request_error")
    assert missing.value.request_id
