"""A request's tokens depend on no neighbour, chunk, preemption or prefix hit: the real scheduler, float32."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from model.batch import SamplingParams
from model.ops.cpu.library import library
from scheduler.config import BLOCK_SIZE
from scheduler.messages import AddRequest
from tests.checkpoints import make_checkpoint
from tests.model.engine import NUM_ROWS, Engine

KINDS = ("v2-yarn", "v2-grouped", "v3")
NUM_REQUESTS = NUM_ROWS
MAX_TOKENS = 24


def make_requests(kind: str) -> list[AddRequest]:
    """Prompts of 1 to 700 tokens, a third on one of two shared beginnings, most about to cross into a new block."""
    rng = np.random.default_rng(7)
    shared = [rng.integers(2, 256, size=n) for n in (150, 64)]
    requests = []
    for i in range(NUM_REQUESTS):
        length = int(rng.integers(1, 6)) * BLOCK_SIZE - int(rng.integers(1, 9))
        if i < 6:
            length = (1, 2, 63, 64, 65, 700)[i]
        prompt = rng.integers(2, 256, size=length)
        if i % 3 == 0:
            head = shared[i % 2][: length - 1]
            prompt[: len(head)] = head
        params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
        if kind == "sampled":
            params = SamplingParams(
                max_tokens=MAX_TOKENS,
                temperature=0.8,
                top_p=0.9,
                seed=1000 + i,
                presence_penalty=(0.0, 0.6)[i % 2],
                frequency_penalty=(0.0, 0.0, 0.7)[i % 3],
                repetition_penalty=(1.0, 1.0, 1.0, 1.3)[i % 4],
                ignore_eos=True,
            )
        if kind == "limited":
            allowed = rng.permutation(256)[:180].tolist()
            params = SamplingParams(
                max_tokens=MAX_TOKENS,
                temperature=(0.0, 0.9)[i % 2],
                seed=2000 + i,
                min_tokens=MAX_TOKENS,  # eos cannot end it
                stop_token_ids=tuple(range(20, 40)),
                logit_bias={int(t): float(b) for t, b in zip(allowed[:9], rng.normal(size=9) * 4, strict=True)}
                | {allowed[9]: -100.0},
                allowed_token_ids=tuple(sorted(allowed)) if i % 3 else (),
                bad_words=tuple((int(a), int(b)) for a, b in rng.integers(2, 256, size=(200, 2))) if i % 4 else (),
                repetition_penalty=(1.0, 1.2)[i % 2],
                logprobs=(None, 3)[i % 2],
            )
        requests.append(AddRequest(request_id=str(i), prompt=prompt.astype("<u4").tobytes(), params=params))
    return requests


@pytest.fixture(scope="module", params=KINDS)
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("invariance"), request.param)


@dataclass(frozen=True)
class Case:
    model_dir: Path
    requests: list[AddRequest]
    alone: list[list[int]]
    """Tokens of each request when nothing else runs and nothing is cached."""


@pytest.fixture(scope="module", params=["greedy", "sampled", "limited"])
def case(request: pytest.FixtureRequest, model_dir: Path) -> Case:
    requests = make_requests(request.param)
    engine = Engine(model_dir, prefix_cache=False)
    alone = [engine.generate([one]).tokens[0] for one in requests]
    assert all(len(tokens) == MAX_TOKENS for tokens in alone)
    assert len({tuple(tokens) for tokens in alone}) == NUM_REQUESTS
    return Case(model_dir, requests, alone)


def test_all_at_once_and_again_from_the_prefix_cache(case: Case) -> None:
    engine = Engine(case.model_dir)
    assert engine.generate(case.requests).tokens == case.alone
    again = engine.generate(case.requests)
    assert again.tokens == case.alone
    for request, cached in zip(case.requests, again.cached_tokens, strict=True):
        assert cached >= (len(request.prompt) // 4 - 1) // BLOCK_SIZE * BLOCK_SIZE


def test_preempted_for_want_of_blocks(case: Case) -> None:
    outcome = Engine(case.model_dir, num_blocks=14, watermark_blocks=0).generate(case.requests)
    assert outcome.num_preemptions >= 5
    assert outcome.tokens == case.alone


def test_with_drafts(case: Case) -> None:
    """Under every parameter a draft is accepted exactly where it is what would have been sampled."""
    engine = Engine(case.model_dir, speculative=True, num_blocks=60, watermark_blocks=0)
    outcome = engine.generate(case.requests, answers=case.alone)
    assert outcome.tokens == case.alone
    assert outcome.accepted_tokens > NUM_REQUESTS * MAX_TOKENS // 3
    assert outcome.num_preemptions


def test_in_steps_of_16_tokens(case: Case) -> None:
    assert Engine(case.model_dir, budget=16).generate(case.requests).tokens == case.alone


@pytest.mark.skipif(library() is None, reason="the kernels are not built")
@pytest.mark.parametrize("kind", ["greedy", "sampled", "limited"])
@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_all_at_once_and_with_drafts_by_the_cpu_kernels(kind: str, quantization: str, tmp_path: Path) -> None:
    """To the last bit, in bfloat16, as long as prompts are cut alike: here not at all."""
    path, requests = make_checkpoint(tmp_path, "v2-yarn"), make_requests(kind)

    def engine(speculative: bool) -> Engine:
        options = {"dtype": "bfloat16", "budget": 1 << 14, "prefix_cache": False}
        return Engine(path, quantization=quantization, speculative=speculative, **options)

    plain = engine(speculative=False)
    alone = [plain.generate([one]).tokens[0] for one in requests]
    assert len({tuple(tokens) for tokens in alone}) == NUM_REQUESTS
    assert plain.generate(requests).tokens == alone
    outcome = engine(speculative=True).generate(requests, answers=alone)
    assert outcome.tokens == alone
    assert outcome.accepted_tokens > NUM_REQUESTS * MAX_TOKENS // 3
