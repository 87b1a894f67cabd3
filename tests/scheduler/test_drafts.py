"""Drafts under the scheduler's rule: what is guessed and what is true, to the last token and block."""

from __future__ import annotations

from typing import Any

import pytest

from model.batch import Logprobs
from scheduler.messages import Finished, FinishReason, Grammar
from scheduler.ngram import MAX_DRAFTS, NgramDrafter
from tests.scheduler.bench import Bench
from tests.scheduler.fake_worker import NAN_SEED_BIT, request_message, run_alone
from tests.scheduler.invariants import check

ABORT = Finished(reason=FinishReason.ABORT)


def answer(prompt: list[int], count: int, seed: int = 0) -> list[int]:
    return run_alone(prompt, request_message("", prompt, max_tokens=count, seed=seed).params, 10_000)[0]


class Guesses:
    """Makes a bench's requests guess `text` wherever it is said, up to `right` tokens in a row, then one wrong."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, right: int = MAX_DRAFTS) -> None:
        self.texts: list[list[int]] = []
        self.right = right
        monkeypatch.setattr(NgramDrafter, "propose", lambda drafter: self.propose(drafter._tokens.tolist()))

    def propose(self, tokens: list[int]) -> list[int]:
        for text in self.texts:
            if text[: len(tokens)] == tokens:
                follows = text[len(tokens) : len(tokens) + MAX_DRAFTS]
                return follows[: self.right] + [15 - token for token in follows[self.right :]]
        return []


class DraftBench(Bench):
    def __init__(self, monkeypatch: pytest.MonkeyPatch, right: int = MAX_DRAFTS, **options: Any) -> None:
        super().__init__(**{"speculative": True, "block_size": 32, "max_num_batched_tokens": 64} | options)
        self.guesses = Guesses(monkeypatch, right)

    def add(self, request_id: str, prompt: list[int] | range, **options: Any) -> Finished | None:
        self.guesses.texts.append([*prompt, *answer(list(prompt), 100, options.get("seed", 0))])
        return super().add(request_id, prompt, **options)

    def drafts(self) -> list[int]:
        """Runs a step; how many drafts each row had."""
        return [len(row.drafts) for row in self.step().rows]


def test_drafts_that_are_right_come_in_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = DraftBench(monkeypatch)
    bench.add("a", [1, 2, 3], max_tokens=20)
    assert bench.drafts() == [0]
    batch, sampled = bench.plan()
    assert (batch.rows[0].start, batch.rows[0].num_tokens, batch.num_tokens) == (3, 9, 9)
    assert len(bench.process(sampled).token_ids[0]) == 9
    bench.run()
    assert bench.output["a"] == answer([1, 2, 3], 20)
    stats = bench.scheduler.stats()
    assert (stats.num_steps, stats.generation_tokens) == (4, 20)
    assert (stats.num_drafts, stats.draft_tokens, stats.accepted_tokens) == (2, 16, 16)


@pytest.mark.parametrize("right", range(4))
def test_a_step_gives_the_right_beginning_and_one_more(monkeypatch: pytest.MonkeyPatch, right: int) -> None:
    bench = DraftBench(monkeypatch, right)
    bench.add("a", [4, 5], max_tokens=12)
    bench.step()
    batch, sampled = bench.plan()
    assert len(batch.rows[0].drafts) == MAX_DRAFTS
    assert bench.process(sampled).token_ids == [answer([4, 5], 12)[1 : right + 2]]
    bench.run()
    assert bench.output["a"] == answer([4, 5], 12)


def test_drafts_take_what_is_left_and_the_oldest_request_first(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = DraftBench(monkeypatch, max_num_batched_tokens=16)
    for name in "abc":
        bench.add(name, [ord(name), 1, 2], max_tokens=40)
    bench.step()
    assert bench.drafts() == [8, 5, 0]
    bench.add("d", [9] * 12, max_tokens=1)
    assert [(row.num_tokens, len(row.drafts)) for row in bench.step().rows] == [(2, 1), (1, 0), (1, 0), (12, 0)]


def test_drafts_take_no_block(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = DraftBench(monkeypatch, block_size=4, num_blocks=3)
    bench.add("a", [1, 2], max_tokens=10)
    bench.step()
    bench.add("b", [3, 4, 5, 6], max_tokens=1)
    used = []
    while bench.scheduler.has_work:
        batch = bench.step()
        used.append([(row.start, row.num_tokens, len(row.drafts), row.new_blocks != []) for row in batch.rows])
    assert used[0] == [(2, 2, 1, False), (0, 4, 0, True)]
    assert used[1:] == [[(4, 4, 3, True)], [(8, 3, 2, True)]]
    assert bench.scheduler.stats().num_preemptions == 0


def test_no_step_is_planned_for_a_request_until_its_drafts_are_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = DraftBench(monkeypatch, right=1)
    bench.add("a", [1, 2, 3], max_tokens=9)
    bench.step()
    _, sampled = bench.plan()
    assert bench.scheduler.schedule() is None
    bench.add("b", [7, 8], max_tokens=1)
    batch, sampled_b = bench.plan()
    assert [row.start for row in batch.rows] == [0]
    bench.process(sampled)
    bench.process(sampled_b)
    bench.run()
    assert bench.output == {"a": answer([1, 2, 3], 9), "b": answer([7, 8], 1)}


def test_a_token_in_flight_leaves_nothing_to_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = DraftBench(monkeypatch)
    bench.add("a", [1, 2, 3], max_tokens=9)
    _, first = bench.plan()
    _, second = bench.plan()
    bench.process(first)
    third, sampled = bench.plan()
    assert third.rows[0].drafts == []
    bench.process(second)
    bench.process(sampled)
    bench.run()
    assert bench.output["a"] == answer([1, 2, 3], 9)


def test_a_stop_token_amid_drafts_ends_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    text = answer([1, 2, 3], 9)
    stop = text[4]
    assert stop not in text[:4]
    bench = DraftBench(monkeypatch)
    bench.add("a", [1, 2, 3], max_tokens=20, stop_token_ids=(stop,), logprobs=0)
    bench.step()
    _, sampled = bench.plan()
    assert len(sampled.token_ids) > 4
    result = bench.process(sampled)
    assert result.token_ids == [text[1:5]]
    assert result.logprobs["a"] == Logprobs([[token] for token in text[1:5]], [[4.0], [5.0], [6.0], [7.0]])
    assert bench.finished["a"] == Finished(reason=FinishReason.STOP, stop_token_id=stop)
    assert bench.pool.free_count == bench.pool.num_blocks
    assert bench.scheduler.stats().generation_tokens == 5


@pytest.mark.parametrize("max_tokens", range(1, 14))
def test_max_tokens_is_kept_to_the_token(monkeypatch: pytest.MonkeyPatch, max_tokens: int) -> None:
    bench = DraftBench(monkeypatch)
    bench.add("a", [1, 2, 3], max_tokens=max_tokens)
    bench.run()
    assert bench.output["a"] == answer([1, 2, 3], max_tokens)
    assert bench.finished["a"].reason is FinishReason.LENGTH


@pytest.mark.parametrize("max_model_len", range(5, 16))
def test_the_context_is_filled_to_the_last_token(monkeypatch: pytest.MonkeyPatch, max_model_len: int) -> None:
    bench = DraftBench(monkeypatch, max_model_len=max_model_len)
    bench.add("a", [1, 2, 3], max_tokens=100)
    bench.run()
    assert bench.output["a"] == answer([1, 2, 3], max_model_len - 3)


def test_broken_logits_behind_a_right_draft_come_after_its_token(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = DraftBench(monkeypatch)
    bench.add("a", [1, 2, 3], max_tokens=20, seed=NAN_SEED_BIT)
    bench.guesses.texts[-1] += [5] * 20
    bench.run()
    assert bench.output["a"] == answer([1, 2, 3], 20, NAN_SEED_BIT)
    assert len(bench.output["a"]) == 2
    assert bench.finished["a"].code == "nan_logits"
    assert bench.scheduler.stats().accepted_tokens == 1
    assert bench.pool.cached_count == 0


def test_what_is_guessed_wrong_is_never_found_in_the_prefix_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = DraftBench(monkeypatch, right=2, block_size=4)
    prompt = [1, 2, 3]
    bench.add("a", prompt, max_tokens=14)
    bench.run()
    true = [*prompt, *answer(prompt, 14)]
    bench.add("b", [*true, 9], max_tokens=4)  # the worker compares every slot that it reads
    bench.run()
    assert bench.cached["b"] == 16
    assert bench.output["b"] == answer([*true, 9], 4)


@pytest.mark.parametrize("right", [0, 2, MAX_DRAFTS])
def test_a_request_preempted_with_drafts_in_flight_loses_nothing(monkeypatch: pytest.MonkeyPatch, right: int) -> None:
    bench = DraftBench(monkeypatch, right, block_size=8)
    bench.add("a", [1, 2, 3], max_tokens=20)
    bench.step()
    batch, sampled = bench.plan()
    assert batch.rows[0].drafts
    bench.scheduler._preempt(bench.scheduler._running[-1])
    check(bench.scheduler)
    bench.process(sampled)
    bench.run()
    assert bench.output["a"] == answer([1, 2, 3], 20)
    assert bench.cached["a"] == 0


def test_an_abort_with_drafts_in_flight_gives_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = DraftBench(monkeypatch)
    bench.add("a", [1, 2, 3], max_tokens=20)
    bench.step()
    _, sampled = bench.plan()
    assert bench.scheduler.finish("a", ABORT)
    assert bench.process(sampled).token_ids == []
    assert bench.finished["a"] == ABORT
    assert bench.pool.free_count == bench.pool.num_blocks


def test_nothing_is_guessed_under_a_grammar_or_without_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    for options, grammar in (({}, Grammar("regex", "x")), ({"speculative": False}, None)):
        bench = DraftBench(monkeypatch, **options)
        bench.add("a", [1, 2, 3], max_tokens=9, grammar=grammar)
        bench.run()
        assert bench.output["a"] == answer([1, 2, 3], 9)
        assert bench.scheduler.stats().draft_tokens == 0


def test_the_same_tokens_give_the_same_batches() -> None:
    def batches() -> list[list[tuple[int, int, list[int]]]]:
        bench = Bench(speculative=True, block_size=32)
        for index in range(3):
            bench.add(str(index), [1, 2, 3] * 4, max_tokens=30, seed=index)
        planned = []
        while bench.scheduler.has_work:
            planned.append([(row.start, row.num_tokens, row.drafts) for row in bench.step().rows])
        return planned

    assert batches() == batches()
    assert any(drafts for batch in batches() for _, _, drafts in batch)
