"""A request's tokens depend on no neighbour, chunk, preemption or prefix hit: the real scheduler, float32."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from model.batch import SamplingParams
from model.runner import load_runner
from scheduler.block_pool import BlockPool
from scheduler.config import BLOCK_SIZE
from scheduler.messages import AddRequest
from scheduler.scheduler import Scheduler
from tests.checkpoints import make_checkpoint

KINDS = ("v2-yarn", "v2-grouped", "v3")
NUM_REQUESTS = 32
MAX_TOKENS = 24


@dataclass(frozen=True)
class Outcome:
    tokens: list[list[int]]
    cached_tokens: list[int]
    num_preemptions: int


class Engine:
    """Scheduler and model in one process, stepping until nothing is left."""

    def __init__(
        self,
        model_dir: Path,
        *,
        num_blocks: int = 1024,
        budget: int = 512,
        prefix_cache: bool = True,
        watermark_blocks: int | None = None,
    ) -> None:
        self.runner = load_runner(
            model_dir,
            dtype="float32",
            max_model_len=768,
            max_num_seqs=NUM_REQUESTS,
            num_blocks=num_blocks,
            num_threads=1,
            progress=False,
        )
        self.scheduler = Scheduler(
            pool=BlockPool(num_blocks),
            block_size=BLOCK_SIZE,
            max_num_seqs=NUM_REQUESTS,
            max_num_batched_tokens=budget,
            max_model_len=self.runner.max_model_len,
            eos_token_ids=self.runner.eos_token_ids,
            prefix_cache=prefix_cache,
            fingerprint=self.runner.fingerprint,
            watermark_blocks=watermark_blocks,
        )

    def generate(self, requests: list[AddRequest]) -> Outcome:
        tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
        cached: dict[str, int] = {}
        before = self.scheduler.stats().num_preemptions
        for request in requests:
            assert self.scheduler.add(self.scheduler.make_request(request)) is None
        while self.scheduler.has_work:
            batch = self.scheduler.schedule()
            assert batch is not None
            result = self.scheduler.update(self.runner.execute(batch))
            cached |= {request_id: started.cached_tokens for request_id, started in result.started.items()}
            for request_id, new in zip(result.request_ids, result.token_ids, strict=True):
                tokens[request_id] += new
        self.scheduler.check()
        preemptions = self.scheduler.stats().num_preemptions - before
        return Outcome(list(tokens.values()), [cached[request.request_id] for request in requests], preemptions)


def make_requests(sampled: bool) -> list[AddRequest]:
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
        if sampled:
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


@pytest.fixture(scope="module", params=[False, True], ids=["greedy", "sampled"])
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
    assert outcome.num_preemptions >= 10
    assert outcome.tokens == case.alone


def test_in_steps_of_16_tokens(case: Case) -> None:
    assert Engine(case.model_dir, budget=16).generate(case.requests).tokens == case.alone
