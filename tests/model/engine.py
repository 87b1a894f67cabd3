"""Scheduler and model in one process, for tests of both together."""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from model.batch import Logprobs
from model.launched import LaunchedStep
from model.runner import load_runner
from scheduler.block_pool import BlockPool
from scheduler.config import BLOCK_SIZE
from scheduler.messages import AddRequest
from scheduler.ngram import MAX_DRAFTS, NgramDrafter
from scheduler.scheduler import Scheduler
from tests.scheduler.invariants import check

NUM_ROWS = 32


@dataclass(frozen=True)
class Outcome:
    tokens: list[list[int]]
    cached_tokens: list[int]
    logprobs: list[Logprobs]
    prompt_logprobs: list[Logprobs]
    """Empty where a request did not ask."""
    num_preemptions: int
    accepted_tokens: int
    """Drafts that were right."""

    @classmethod
    def together(cls, parts: list[Outcome]) -> Outcome:
        """Of several calls, as if it were one."""
        return cls(
            tokens=[tokens for part in parts for tokens in part.tokens],
            cached_tokens=[cached for part in parts for cached in part.cached_tokens],
            logprobs=[column for part in parts for column in part.logprobs],
            prompt_logprobs=[column for part in parts for column in part.prompt_logprobs],
            num_preemptions=sum(part.num_preemptions for part in parts),
            accepted_tokens=sum(part.accepted_tokens for part in parts),
        )


class Oracle(NgramDrafter):
    """Guesses a known answer, and every fifth token of it wrong: all numbers of drafts are accepted."""

    def __init__(self, tokens: array[int], answer: list[int]) -> None:
        super().__init__(tokens)
        self._known = [*tokens, *answer]

    def propose(self) -> list[int]:
        first = len(self._tokens)
        return [
            token if place % 5 else token ^ 1
            for place, token in enumerate(self._known[first : first + MAX_DRAFTS], start=first)
        ]


class Engine:
    """Scheduler and model in one process, stepping until nothing is left."""

    def __init__(
        self,
        model_dir: Path,
        *,
        dtype: str = "float32",
        quantization: str = "none",
        kv_cache_dtype: str = "auto",
        num_blocks: int = 1024,
        budget: int = 512,
        prefix_cache: bool = True,
        watermark_blocks: int | None = None,
        speculative: bool = False,
    ) -> None:
        self.runner = load_runner(
            model_dir,
            dtype=dtype,
            quantization=quantization,
            kv_cache_dtype=kv_cache_dtype,
            max_model_len=768,
            max_num_seqs=NUM_ROWS,
            num_blocks=num_blocks,
            num_threads=1,
            progress=False,
        )
        self.scheduler = Scheduler(
            pool=BlockPool(num_blocks),
            block_size=BLOCK_SIZE,
            max_num_seqs=NUM_ROWS,
            max_num_batched_tokens=budget,
            max_model_len=self.runner.max_model_len,
            eos_token_ids=self.runner.eos_token_ids,
            prefix_cache=prefix_cache,
            fingerprint=self.runner.fingerprint,
            watermark_blocks=watermark_blocks,
            speculative=speculative,
        )

    def generate(
        self,
        requests: list[AddRequest],
        preempt_every: int | None = None,
        answers: list[list[int]] | None = None,
        overlap: bool = False,
    ) -> Outcome:
        """Run to the end; with `preempt_every`, the newest running request gives way every so many steps. `overlap`:
        every step is launched before the one before it is collected.

        `answers`: what to guess, instead of what n-grams do.
        """
        tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
        cached: dict[str, int] = {}
        logprobs = {request.request_id: Logprobs([], []) for request in requests}
        prompt_logprobs = {request.request_id: Logprobs([], []) for request in requests}
        before = self.scheduler.stats()
        for index, message in enumerate(requests):
            request = self.scheduler.make_request(message)
            if answers is not None:
                request.drafter = Oracle(request.tokens, answers[index])
            assert self.scheduler.add(request) is None
        launched: deque[LaunchedStep] = deque()
        while self.scheduler.has_work or launched:
            batch = self.scheduler.schedule()
            assert batch is not None or launched
            if batch is not None:
                launched.append(self.runner.launch(batch))
                if preempt_every and batch.step % preempt_every == preempt_every - 1 and self.scheduler._running:
                    self.scheduler._preempt(self.scheduler._running[-1])
                if overlap and len(launched) == 1:
                    continue
            result = self.scheduler.update(launched.popleft().collect())
            cached |= {request_id: started.cached_tokens for request_id, started in result.started.items()}
            for column, news in ((logprobs, result.logprobs), (prompt_logprobs, result.prompt_logprobs)):
                for request_id, entries in news.items():
                    column[request_id].extend(entries)
            for request_id, new in zip(result.request_ids, result.token_ids, strict=True):
                tokens[request_id] += new
        check(self.scheduler)
        after = self.scheduler.stats()
        return Outcome(
            tokens=list(tokens.values()),
            cached_tokens=[cached[request.request_id] for request in requests],
            logprobs=list(logprobs.values()),
            prompt_logprobs=list(prompt_logprobs.values()),
            num_preemptions=after.num_preemptions - before.num_preemptions,
            accepted_tokens=after.accepted_tokens - before.accepted_tokens,
        )
