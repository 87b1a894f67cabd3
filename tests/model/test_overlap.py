"""Steps that are launched before the tokens of the one before are known: every request gets the text it gets alone.
With drafts, which follow from known tokens, steps go one by one on the same device, and the text is that too.

On a CPU rows and device share their memory, and a token would be known too early for the test: here they have two, as
with a GPU, and the host's learns a step's tokens when that step is collected.
"""

from __future__ import annotations

import socket
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.batch import ForwardBatch, SamplingParams
from model.launched import LaunchedStep
from model.runner import ModelRunner, load_runner
from scheduler.block_pool import BlockPool
from scheduler.channel import EngineChannel
from scheduler.config import BLOCK_SIZE
from scheduler.grammar import CheckpointGrammars
from scheduler.main_loop import Engine
from scheduler.messages import AbortRequests, AddRequest, Finished, FinishReason, Grammar, Shutdown
from scheduler.outbox import Outbox
from scheduler.reader import Inbox
from scheduler.scheduler import Scheduler
from tests.checkpoints import make_checkpoint
from tests.model.engine import Oracle
from tests.scheduler.invariants import check

TOKENIZER = Path(__file__).parents[2] / "model" / "builtin"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("overlap"), "v2-yarn", tokenizer=TOKENIZER)


@dataclass(frozen=True)
class Served:
    tokens: dict[str, list[int]]
    finished: dict[str, Finished]
    logprobs: dict[str, Any]
    num_preemptions: int
    most_in_flight: int
    draft_tokens: int
    accepted_tokens: int


class Watched:
    """A runner with two memories whose steps in flight are counted, and one of which may run out of memory."""

    def __init__(self, runner: ModelRunner, inbox: Inbox, abort_at: dict[int, str], fail_at: int | None) -> None:
        self._runner, self._inbox, self._abort_at, self._fail_at = runner, inbox, abort_at, fail_at
        runner._rows._apart = True
        runner._rows._history = torch.full_like(runner._rows._history, 7)
        self.in_flight = self.most_in_flight = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def launch(self, batch: ForwardBatch) -> Any:
        if batch.step in self._abort_at:
            self._inbox.put(AbortRequests([self._abort_at[batch.step]]))
        if batch.step == self._fail_at:
            self._fail_at = None
            self._runner.prepare(batch)  # as far as it came
            raise MemoryError("no room")
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        launched = self._runner.launch(batch)

        class Collected:
            def collect(_) -> Any:  # noqa: N805
                self.in_flight -= 1
                return launched.collect()

        assert isinstance(launched, LaunchedStep)
        return Collected()


def serve(
    model_dir: Path,
    requests: list[AddRequest],
    overlap: bool,
    *,
    num_blocks: int = 200,
    budget: int = 512,
    abort_at: dict[int, str] | None = None,
    fail_at: int | None = None,
    answers: dict[str, list[int]] | None = None,
) -> Served:
    """`answers`: what to draft, four tokens in five; None: no drafts."""
    runner = load_runner(
        model_dir, max_model_len=768, max_num_seqs=16, num_blocks=num_blocks, num_threads=1, progress=False
    )
    scheduler = Scheduler(
        pool=BlockPool(num_blocks),
        block_size=BLOCK_SIZE,
        max_num_seqs=16,
        max_num_batched_tokens=budget,
        max_model_len=runner.max_model_len,
        eos_token_ids=runner.eos_token_ids,
        prefix_cache=True,
        fingerprint=runner.fingerprint,
        watermark_blocks=0,
        speculative=answers is not None,
    )
    grammars = CheckpointGrammars(model_dir / "tokenizer.json", runner.vocab_size, runner.eos_token_ids)
    inbox = Inbox()
    with socket.socket() as nowhere:  # nothing is sent, since there is no writer
        outbox = Outbox(EngineChannel(nowhere))
    watched = Watched(runner, inbox, abort_at or {}, fail_at)
    for message in requests:
        if message.grammar is not None:
            grammars.add(message.request_id, message.grammar)
        request = scheduler.make_request(message)
        if answers is not None and request.drafter is not None:
            request.drafter = Oracle(request.tokens, answers[request.request_id])
        inbox.put(request)
    inbox.put(Shutdown(1000.0))
    Engine(scheduler, watched, grammars, inbox, outbox, overlap).run()
    check(scheduler)
    assert scheduler.pool.free_count == num_blocks
    assert not len(grammars)
    output = outbox.take(0)
    assert output is not None
    stats = scheduler.stats()
    return Served(
        dict(zip(output.request_ids, output.token_ids, strict=True)),
        output.finished,
        output.logprobs,
        stats.num_preemptions,
        watched.most_in_flight,
        stats.draft_tokens,
        stats.accepted_tokens,
    )


def make_requests(vocab_size: int) -> list[AddRequest]:
    """Greedy and drawn, penalised and limited, with ends that nobody foresees, under grammars and not."""
    rng = np.random.default_rng(11)
    grammars = [None, None, None, Grammar("regex", "[a-z]{4,30}"), Grammar("json_schema", '{"enum": ["red", "green"]}')]
    requests = []
    for i in range(15):
        params: dict[str, Any] = {"max_tokens": 20, "seed": i, "temperature": (0.0, 0.9)[i % 2], "top_p": 0.95}
        if i % 3 == 1:
            params |= {"repetition_penalty": 1.3, "frequency_penalty": 0.4}
        if i % 4 == 2:
            words = rng.integers(2, vocab_size, size=(vocab_size * 4, 2))
            params |= {"bad_words": tuple((int(a), int(b)) for a, b in words), "min_tokens": 5}
        if i % 5 < 2:
            params |= {"stop_token_ids": tuple(range(i % 7, vocab_size, 12))}
        if i % 6 == 0:
            params |= {"logprobs": 2, "ignore_eos": True}
        prompt = rng.integers(2, vocab_size, size=(1, 60, 64, 130, 300)[i % 5])
        requests.append(
            AddRequest(
                request_id=f"r{i}",
                prompt=array("I", prompt.tolist()).tobytes(),
                params=SamplingParams(**params),
                grammar=grammars[i % 5],
            )
        )
    return requests


@pytest.fixture(scope="module")
def requests(model_dir: Path) -> list[AddRequest]:
    return make_requests(load_runner(model_dir, num_blocks=16, num_threads=1, progress=False).vocab_size)


@pytest.fixture(scope="module")
def plain(model_dir: Path, requests: list[AddRequest]) -> Served:
    served = serve(model_dir, requests, overlap=False)
    assert served.most_in_flight == 1
    reasons = [finished.reason for finished in served.finished.values()]
    assert reasons.count(FinishReason.STOP) > 3
    assert reasons.count(FinishReason.LENGTH) > 3
    assert len(reasons) == len(requests)
    return served


@pytest.fixture(params=[False, True], ids=["plain", "drafts"])
def answers(request: pytest.FixtureRequest, plain: Served) -> dict[str, list[int]] | None:
    return plain.tokens if request.param else None


def check_steps(served: Served, answers: dict[str, list[int]] | None) -> None:
    """Two in flight without drafts; with them one, and some are right and some wrong."""
    assert served.most_in_flight == (2 if answers is None else 1)
    assert answers is None or 5 < served.accepted_tokens < served.draft_tokens - 5


@pytest.mark.parametrize("budget", [512, 48])
def test_the_text_is_that_of_steps_one_by_one(
    model_dir: Path, requests: list[AddRequest], plain: Served, answers: dict[str, list[int]] | None, budget: int
) -> None:
    served = serve(model_dir, requests, overlap=True, budget=budget, answers=answers)
    check_steps(served, answers)
    assert served.tokens == plain.tokens
    assert served.finished == plain.finished
    assert served.logprobs.keys() == plain.logprobs.keys()
    for request_id, column in served.logprobs.items():
        assert column.token_ids == plain.logprobs[request_id].token_ids
        np.testing.assert_allclose(column.logprobs, plain.logprobs[request_id].logprobs, atol=1e-4)


def test_preempted_for_want_of_blocks(
    model_dir: Path, requests: list[AddRequest], plain: Served, answers: dict[str, list[int]] | None
) -> None:
    served = serve(model_dir, requests, overlap=True, num_blocks=13, answers=answers)
    check_steps(served, answers)
    assert served.num_preemptions > 0
    assert served.tokens == plain.tokens


def test_an_abort_takes_effect_between_steps_and_changes_nobody_else(
    model_dir: Path, requests: list[AddRequest], plain: Served, answers: dict[str, list[int]] | None
) -> None:
    longest = sorted(plain.tokens, key=lambda request_id: -len(plain.tokens[request_id]))[:3]
    first = 5 if answers is None else 2  # with drafts they need fewer steps
    abort_at = {first + i: request_id for i, request_id in enumerate(longest)}
    served = serve(model_dir, requests, overlap=True, abort_at=abort_at, answers=answers)
    check_steps(served, answers)
    for request_id, tokens in plain.tokens.items():
        own = served.tokens[request_id]
        assert own == tokens[: len(own)]
        if request_id in longest:
            assert served.finished[request_id].reason is FinishReason.ABORT
            assert len(own) < len(tokens)
        else:
            assert own == tokens


@pytest.mark.parametrize("fail_at", [1, 4, 9])
def test_a_launch_that_runs_out_of_memory_costs_one_request(
    model_dir: Path, requests: list[AddRequest], plain: Served, answers: dict[str, list[int]] | None, fail_at: int
) -> None:
    served = serve(model_dir, requests, overlap=True, fail_at=fail_at, answers=answers)
    check_steps(served, answers)
    failed = [request_id for request_id, end in served.finished.items() if end.code == "out_of_memory"]
    assert len(failed) == 1
    for request_id, tokens in plain.tokens.items():
        own = served.tokens.get(request_id, [])
        assert own == (tokens[: len(own)] if request_id in failed else tokens)


def test_who_is_complete_when_the_next_launch_fails_is_not_to_blame(model_dir: Path) -> None:
    """The newest prompt was computed in the step before, which succeeds, and nothing of it is in the one that fails."""
    prompt = array("I", range(2, 22)).tobytes()
    requests = [
        AddRequest(request_id=name, prompt=prompt, params=SamplingParams(max_tokens=number, ignore_eos=True))
        for name, number in (("long", 6), ("short", 1))
    ]
    served = serve(model_dir, requests, overlap=True, fail_at=1)
    assert served.finished["short"].reason is FinishReason.LENGTH
    assert len(served.tokens["short"]) == 1
    assert served.finished["long"].code == "out_of_memory"
