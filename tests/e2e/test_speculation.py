"""Guessed tokens through the whole daemon: the same answers in fewer steps, and the guesses counted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.daemon import Daemon

PROMPT = " ".join(f"apple{i % 7} pear{i % 5} plum{i % 3}" for i in range(12))
REQUESTS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.7, "seed": 5, "n": 2},
    {"temperature": 0, "frequency_penalty": 0.3, "logprobs": 2, "echo": True},
    {"temperature": 0, "stop": [" plum1"]},
    {"temperature": 0.3, "seed": 9, "min_tokens": 60, "logit_bias": {"300": 2.5}},
    {"temperature": 0, "structured_outputs": {"regex": "( (apple|pear)[0-9]){12}"}},
]


@pytest.fixture(scope="module")
def speculating(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    names = ("--served-model-name", "builtin")
    daemon = Daemon(tmp_path_factory.mktemp("speculating"), *names, "--speculative", "ngram")
    yield daemon
    assert daemon.stop() == 0


def ask(daemon: Daemon, **fields: Any) -> list[tuple[str, str, Any, int]]:
    """Text, end, tokens where asked for, and number of tokens."""
    body = {"model": "builtin", "prompt": PROMPT, "max_tokens": 80, **fields}
    answer = httpx.post(f"{daemon.url}/v1/completions", json=body, timeout=120).raise_for_status().json()
    return [
        (
            choice["text"],
            choice["finish_reason"],
            choice["logprobs"] and choice["logprobs"]["tokens"],
            answer["usage"]["completion_tokens"],
        )
        for choice in answer["choices"]
    ]


def test_answers_are_those_of_plain_decoding(daemon: Daemon, speculating: Daemon) -> None:
    for fields in REQUESTS:
        assert ask(speculating, **fields) == ask(daemon, **fields), fields
    accepted = speculating.gauge("vllm:spec_decode_num_accepted_tokens_total")
    assert 100 < accepted <= speculating.gauge("vllm:spec_decode_num_draft_tokens_total")
    assert 0 < speculating.gauge("vllm:spec_decode_num_drafts_total") <= accepted
    assert daemon.gauge("vllm:spec_decode_num_draft_tokens_total") == 0


def test_a_stream_has_every_token(daemon: Daemon, speculating: Daemon) -> None:
    body = {"model": "builtin", "prompt": PROMPT, "max_tokens": 60, "temperature": 0, "logprobs": 1, "stream": True}
    steps = speculating.gauge("vllm:iteration_tokens_total_count")
    tokens, text = [], ""
    with httpx.stream("POST", f"{speculating.url}/v1/completions", json=body, timeout=120) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                choice = json.loads(line.removeprefix("data: "))["choices"][0]
                text += choice["text"]
                tokens += choice["logprobs"]["tokens"] if choice["logprobs"] else []
    [(whole, _, words, count)] = ask(daemon, **body | {"stream": False})
    assert (text, tokens) == (whole, words)
    assert len(tokens) == count
    speculating.wait_idle(10)
    assert speculating.gauge("vllm:iteration_tokens_total_count") - steps < 40
