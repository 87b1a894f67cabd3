"""The parameters of both completion endpoints with the official SDK against the real process."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from model.config import load_config
from model.reference import reference_logits
from server.settings import BUILTIN_MODEL
from tests.checkpoints import make_checkpoint, read_tensors
from tests.e2e.daemon import Daemon

PROMPT = "The sea is"
MESSAGES: Any = [{"role": "user", "content": "Tell me of the sea."}]
GREEDY: Any = {"model": "builtin", "temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def client(daemon: Daemon) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{daemon.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_choices(client: openai.OpenAI) -> None:
    # The model is sure of its answer, but not of what would come after it.
    ask: Any = {"model": "builtin", "temperature": 1.5, "max_tokens": 8, "seed": 3, "extra_body": {"min_tokens": 8}}
    answer = client.chat.completions.create(messages=MESSAGES, n=4, **ask)
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) > 1
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 32
    second = client.chat.completions.create(messages=MESSAGES, **{**ask, "seed": 4})
    assert second.choices[0].message.content == texts[1]
    with client.chat.completions.stream(messages=MESSAGES, n=4, **{**ask, "max_tokens": 8}) as stream:
        streamed = ["", "", "", ""]
        for event in stream:
            if event.type == "chunk":
                for choice in event.chunk.choices:
                    streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


def test_choices_have_one_prefill(client: openai.OpenAI, daemon: Daemon) -> None:
    prompt = list(range(500, 500 + 256))
    before = daemon.gauge("vllm:prefix_cache_hits_total")
    client.completions.create(prompt=prompt, n=4, **GREEDY)
    assert daemon.gauge("vllm:prefix_cache_hits_total") - before == 3 * 192


def test_batches(client: openai.OpenAI) -> None:
    prompts = ["The sea is", "Once upon a time", "A dog"]
    alone = [client.completions.create(prompt=prompt, **GREEDY).choices[0].text for prompt in prompts]
    answer = client.completions.create(prompt=prompts, n=2, **GREEDY)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text for choice in answer.choices] == [text for text in alone for _ in range(2)]
    ids = [[5, 6, 7], [8, 9]]
    answer = client.completions.create(prompt=ids, **GREEDY)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 5
    with client.completions.create(prompt=prompts, stream=True, **GREEDY) as stream:
        streamed = ["", "", ""]
        for chunk in stream:
            streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == alone


def test_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=3, **GREEDY)
    logprobs = answer.choices[0].logprobs
    assert answer.usage is not None
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == answer.usage.completion_tokens
    for entry in logprobs.content:
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs)  # greedy
        assert entry.top_logprobs[0].token == entry.token
        assert entry.bytes is not None
        assert bytes(entry.bytes).decode(errors="replace") == entry.token
    with client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=3, stream=True, **GREEDY) as s:
        pieces = [choice.logprobs.content or [] for chunk in s for choice in chunk.choices if choice.logprobs]
    assert list(itertools.chain.from_iterable(pieces)) == logprobs.content


def test_echo_and_scores(client: openai.OpenAI) -> None:
    answer = client.completions.create(prompt=PROMPT, echo=True, logprobs=1, model="builtin", max_tokens=0)
    [choice] = answer.choices
    assert choice.text == PROMPT
    assert answer.usage is not None
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    assert len(choice.logprobs.token_logprobs) == answer.usage.prompt_tokens
    plain = client.completions.create(prompt=PROMPT, **GREEDY).choices[0].text
    assert client.completions.create(prompt=PROMPT, echo=True, **GREEDY).choices[0].text == PROMPT + plain


def test_bias_and_bans(client: openai.OpenAI) -> None:
    def ids(**extra: Any) -> list[int]:
        body = {"return_token_ids": True, **extra}
        choice: Any = client.completions.create(prompt=PROMPT, extra_body=body, **GREEDY).choices[0]
        return list(choice.token_ids)

    usual = ids()
    assert set(ids(allowed_token_ids=[77, 78])) <= {77, 78}
    assert set(ids(logit_bias={"77": 100})) == {77}
    assert usual[0] not in ids(logit_bias={str(usual[0]): -100})
    word = client.completions.create(prompt=PROMPT, **{**GREEDY, "max_tokens": 1}).choices[0].text
    assert ids(bad_words=[word])[0] != usual[0]
    assert len(ids(min_tokens=12)) == 12


def test_limits_that_leave_no_token_are_refused(client: openai.OpenAI, daemon: Daemon) -> None:
    """Whichever of them contradict each other: the request is wrong, and nothing is the matter with the model."""
    contradictions: list[Any] = [
        {"allowed_token_ids": [77], "logit_bias": {"77": -100}},
        {"allowed_token_ids": [77], "stop_token_ids": [77], "min_tokens": 2},
        {"allowed_token_ids": [77], "structured_outputs": {"regex": "[0-9]{3}"}},
    ]
    for temperature, extra in itertools.product((0, 1), contradictions):
        body = {**GREEDY, "temperature": temperature}
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(prompt=PROMPT, extra_body=extra, **body)
        assert caught.value.code == "no_token_left"
    # Where that shows in the middle of an answer, a stream has begun.
    grammar = {"structured_outputs": {"regex": "aab"}, "bad_words": ["b", "ab", "aab"]}
    with pytest.raises(openai.APIError, match="No token is left"):
        list(client.completions.create(prompt=PROMPT, stream=True, extra_body=grammar, **GREEDY))
    assert daemon.gauge("latentd_nan_logits_total") == 0


def test_prefix(client: openai.OpenAI) -> None:
    """What the model wrote, cut anywhere between tokens and given back, is continued the same way."""
    whole: Any = client.chat.completions.create(messages=MESSAGES, extra_body={"return_token_ids": True}, **GREEDY)
    text = whole.choices[0].message.content
    head = text[: text.index(" ", len(text) // 3)]
    begun: Any = [*MESSAGES, {"role": "assistant", "content": head, "prefix": True}]
    rest = client.chat.completions.create(messages=begun, **GREEDY).choices[0].message.content or ""
    assert not rest.startswith(head)
    assert (head + rest).startswith(text)


def test_suffix(client: openai.OpenAI, daemon: Daemon) -> None:
    body: Any = {"prompt": "one", "suffix": "three", "return_token_ids": True, **GREEDY}
    ids = httpx.post(f"{daemon.url}/v1/completions", json=body).json()["choices"][0]["prompt_token_ids"]
    assert len(ids) >= 6
    assert client.completions.create(prompt="one", suffix="three", **GREEDY).choices[0].text is not None
    beta = openai.OpenAI(base_url=f"{daemon.url}/beta", api_key="unused", max_retries=0)
    with beta:
        assert beta.completions.create(prompt="one", suffix="three", **GREEDY).choices[0].finish_reason


def test_timeout(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(
            prompt=[5] * 4000, model="builtin", max_tokens=4000, extra_body={"timeout": 0.05, "ignore_eos": True}
        )
    assert (caught.value.status_code, caught.value.code) == (408, "timeout")


def test_timings(client: openai.OpenAI) -> None:
    raw = client.completions.with_raw_response.create(prompt=PROMPT, **GREEDY)
    timings: Any = raw.parse().model_extra
    assert timings is not None
    assert timings["timings"]["prefill_ms"] > 0
    assert timings["timings"]["total_ms"] >= timings["timings"]["first_token_ms"] >= timings["timings"]["prefill_ms"]
    assert raw.headers["server-timing"].startswith("queue;dur=")


def test_progress(daemon: Daemon) -> None:
    body = {"prompt": list(range(700, 3000)), "max_tokens": 1, "stream": True, "return_progress": True}
    text = httpx.post(f"{daemon.url}/v1/completions", json=body, timeout=60).text
    assert text.count('"prompt_progress"') >= 2


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, Path]]:
    """A random float32 checkpoint, small steps and a prefix cache that is warm: prompts are prefilled in chunks."""
    folder = tmp_path_factory.mktemp("scorer")
    path = make_checkpoint(folder / "model", "v2-yarn", tokenizer=BUILTIN_MODEL, dtype=torch.float32)
    daemon = Daemon(folder, "--max-num-batched-tokens", "48", str(path))
    yield daemon, path
    assert daemon.stop() == 0


def test_scores_are_those_of_the_reference(scorer: tuple[Daemon, Path]) -> None:
    """As lm-eval's local-completions asks: ids, echo, one log-probability, one token; no BOS may be added."""
    daemon, path = scorer
    config, weights = load_config(path), read_tensors(path)
    generator = torch.Generator().manual_seed(5)
    shared = torch.randint(10, 2000, (70,), generator=generator).tolist()
    prompts = [
        shared + torch.randint(10, 2000, (length,), generator=generator).tolist() for length in (1, 5, 40, 90, 130)
    ]
    body = {"prompt": prompts, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0, "seed": 1234}
    for _ in range(2):  # the second time the cache knows the prompts
        choices = httpx.post(f"{daemon.url}/v1/completions", json=body, timeout=120).json()["choices"]
        for prompt, choice in zip(prompts, choices, strict=True):
            scores = choice["logprobs"]
            assert {len(column) for column in scores.values()} == {len(prompt) + 1}
            assert scores["token_logprobs"][0] is None
            expected = reference_logits(config, weights, prompt).float().log_softmax(-1)
            true = expected[range(len(prompt) - 1), prompt[1:]].tolist()
            assert scores["token_logprobs"][1:-1] == pytest.approx(true, abs=1e-3)
            best = expected.max(-1).values.tolist()
            assert [max(top.values()) for top in scores["top_logprobs"][1:]] == pytest.approx(best, abs=1e-3)
