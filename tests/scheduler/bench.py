"""A scheduler in its smallest, for tests."""

from __future__ import annotations

from typing import Any

from model.batch import ForwardBatch, SampledTokens
from scheduler.block_pool import BlockPool
from scheduler.messages import Finished, FinishReason
from scheduler.scheduler import Scheduler
from scheduler.step_result import StepResult
from tests.scheduler.fake_worker import (
    EOS,
    FakeWorker,
    request_message,
    worker_for,
)
from tests.scheduler.invariants import check

ABORT = Finished(reason=FinishReason.ABORT, message="gone")


class Bench:
    """A scheduler with blocks of 4 tokens and a fake worker; everything that came out, by request."""

    def __init__(self, num_blocks: int = 16, **options: Any) -> None:
        defaults = {
            "block_size": 4,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 16,
            "max_model_len": 1000,
            "eos_token_ids": [EOS],
            "prefix_cache": True,
            "fingerprint": "test",
            "watermark_blocks": 0,
        }
        self.pool = BlockPool(num_blocks)
        self.scheduler = Scheduler(pool=self.pool, **(defaults | options))  # type: ignore[arg-type]
        self.worker: FakeWorker = worker_for(self.scheduler, options.get("max_num_seqs", 4))
        self.output: dict[str, list[int]] = {}
        self.finished: dict[str, Finished] = {}
        self.cached: dict[str, int] = {}

    def add(self, request_id: str, prompt: list[int] | range, **options: Any) -> Finished | None:
        return self.scheduler.add(self.scheduler.make_request(request_message(request_id, prompt, **options)))

    def plan(self) -> tuple[ForwardBatch, SampledTokens]:
        batch = self.scheduler.schedule()
        assert batch is not None
        check(self.scheduler)
        return batch, self.worker.execute(batch)

    def process(self, sampled: SampledTokens) -> StepResult:
        self.worker.processed_step = sampled.step
        result = self.scheduler.update(sampled)
        check(self.scheduler)
        for request_id, token_ids in zip(result.request_ids, result.token_ids, strict=True):
            self.output.setdefault(request_id, []).extend(token_ids)
        assert not self.finished.keys() & result.finished.keys()
        assert not self.cached.keys() & result.started.keys()
        self.finished |= result.finished
        self.cached |= {request_id: started.cached_tokens for request_id, started in result.started.items()}
        return result

    def step(self) -> ForwardBatch:
        batch, sampled = self.plan()
        self.process(sampled)
        return batch

    def run(self, limit: int = 1000) -> int:
        """Steps until nothing is left."""
        steps = 0
        while self.scheduler.has_work:
            self.step()
            steps += 1
            assert steps < limit
        return steps


def shape(batch: ForwardBatch) -> list[tuple[int, int, int, bool]]:
    return [(row.row, row.start, row.num_tokens, row.sample) for row in batch.rows]
