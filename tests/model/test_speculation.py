"""Drafts over the compiled kernels: not a bit of any latent, log-probability or token is another than without."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from model.batch import SamplingParams
from model.ops.cpu.library import library
from scheduler.messages import AddRequest
from tests.checkpoints import make_checkpoint
from tests.model.engine import Engine

MAX_TOKENS = 40


def make_requests() -> list[AddRequest]:
    """Greedy and sampled, with and without penalties and limits, all with log-probabilities; two with short prompts."""
    rng = np.random.default_rng(3)
    requests = []
    for index, length in enumerate((1, 2, 60, 64, 130, 500, 505, 511)):
        params = SamplingParams(
            max_tokens=MAX_TOKENS,
            temperature=(0.0, 0.8)[index % 2],
            seed=index,
            repetition_penalty=(1.0, 1.0, 1.2)[index % 3],
            frequency_penalty=(0.0, 0.0, 0.0, 0.5)[index % 4],
            min_tokens=(0, 30)[index % 2],
            logit_bias={5: 3.0, 6: -100.0} if index % 3 else {},
            bad_words=tuple((int(a), int(b)) for a, b in rng.integers(2, 256, size=(300, 2))) if index % 2 else (),
            ignore_eos=index % 4 == 0,
            logprobs=3,
        )
        prompt = rng.integers(2, 256, size=length).astype("<u4").tobytes()
        requests.append(AddRequest(request_id=str(index), prompt=prompt, params=params))
    return requests


@pytest.mark.skipif(library() is None, reason="no kernels")
@pytest.mark.parametrize("kind", ["v2-yarn", "v3"])
def test_every_bit_is_that_of_plain_decoding(kind: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, kind, **({"q_lora_rank": 32} if kind == "v3" else {}))
    plain = Engine(path, dtype="bfloat16", prefix_cache=False)
    assert plain.runner.ops == "cpu"
    expected = plain.generate(make_requests())
    drafted = Engine(path, dtype="bfloat16", prefix_cache=False, speculative=True)
    outcome = drafted.generate(make_requests(), answers=expected.tokens)
    assert outcome.accepted_tokens > 100
    assert outcome.tokens == expected.tokens
    assert outcome.logprobs == expected.logprobs


def test_a_text_that_repeats_is_guessed_and_stays_the_same(tmp_path: Path) -> None:
    """The real drafter, float32: a small vocabulary is soon repeated."""
    path = make_checkpoint(tmp_path, "v2")
    params = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True, logit_bias=dict.fromkeys(range(8), 60.0))
    requests = [
        AddRequest(request_id=str(i), prompt=np.arange(i, i + 20, dtype="<u4").tobytes(), params=params)
        for i in range(4)
    ]
    plain = Engine(path).generate(requests)
    drafted = Engine(path, speculative=True).generate(requests)
    assert drafted.tokens == plain.tokens
    assert drafted.accepted_tokens > 200
