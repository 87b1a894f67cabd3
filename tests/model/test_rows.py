"""Rows: what a step reads is gathered as a plain loop over its tokens would, and rows forget their last request."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import pytest
import torch

from model.batch import ForwardBatch, NewRow, SamplingParams, ScheduledRow
from model.inputs import StepInputs
from model.latent_cache import BLOCK_SIZE
from model.rows import Rows
from model.sampler import SamplingInputs, limit


def new_row(row: int, tokens: list[int], num_prompt_tokens: int | None = None, **params: Any) -> NewRow:
    blocks = params.pop("block_table", [])
    return NewRow(
        row=row,
        tokens=array("I", tokens),
        num_prompt_tokens=len(tokens) if num_prompt_tokens is None else num_prompt_tokens,
        params=SamplingParams(max_tokens=10, **params),
        block_table=blocks,
    )


def run(rows: Rows, batch: ForwardBatch) -> StepInputs:
    rows.update(batch)
    return rows.step_inputs(batch)


def append(rows: Rows, sampled: list[int], token_ids: list[int]) -> None:
    """As a step does that samples these and has no drafts."""
    rows.learn(sampled, rows.feed(sampled, torch.tensor(token_ids)), token_ids)


def tokens_of(inputs: SamplingInputs, index: int) -> list[int]:
    """Prompt and output, as penalties see them."""
    tokens: list[int] = inputs.history[inputs.row[index], : inputs.position[index]].tolist()
    return tokens


def test_a_mixed_batch_is_gathered_token_by_token() -> None:
    rng = np.random.default_rng(0)
    tokens = [rng.integers(1 << 17, size=n).tolist() for n in (700, 1, 130, 65)]
    blocks = [rng.permutation(1000)[: -(-len(t) // BLOCK_SIZE)].tolist() for t in tokens]
    rows = Rows(max_num_seqs=6, max_model_len=900)
    spans = [(5, 0, 120, 512), (1, 1, 0, 1), (0, 2, 129, 1), (3, 3, 64, 1)]  # row, sequence, start, num_tokens
    batch = ForwardBatch(
        step=0,
        new_rows=[new_row(row, tokens[i], block_table=blocks[i][:1]) for row, i, _, _ in spans],
        rows=[
            ScheduledRow(row, start, n, new_blocks=blocks[i][1:], sample=start + n == len(tokens[i]))
            for row, i, start, n in spans
        ],
    )
    inputs = run(rows, batch)
    steps = [(i, position) for _, i, start, n in spans for position in range(start, start + n)]
    assert inputs.token_ids.tolist() == [tokens[i][position] for i, position in steps]
    assert inputs.positions.tolist() == [position for _, position in steps]
    assert inputs.slot_mapping.tolist() == [
        blocks[i][position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE for i, position in steps
    ]
    assert inputs.query_start == [0, 512, 513, 514, 515]
    assert inputs.context_lens == [632, 1, 130, 65]
    assert inputs.sample_index.tolist() == [512, 513, 514]
    assert inputs.block_tables.dtype == torch.int32
    for i, table in enumerate(inputs.block_tables.tolist()):
        assert table[: len(blocks[i])] == blocks[i]
    assert {inputs.token_ids.dtype, inputs.positions.dtype, inputs.slot_mapping.dtype} == {torch.int64}


def test_a_row_takes_its_sampled_tokens_itself() -> None:
    rows = Rows(max_num_seqs=2, max_model_len=64)
    prefill = [ScheduledRow(0, 0, 2, [7], sample=True), ScheduledRow(1, 0, 1, [3], sample=False)]
    run(rows, ForwardBatch(0, prefill, [new_row(0, [5, 6]), new_row(1, [8, 9])]))
    append(rows, [0], [41])
    decode = run(rows, ForwardBatch(1, [ScheduledRow(1, 1, 1, sample=True), ScheduledRow(0, 2, 1, sample=True)]))
    assert decode.token_ids.tolist() == [9, 41]
    assert decode.slot_mapping.tolist() == [3 * BLOCK_SIZE + 1, 7 * BLOCK_SIZE + 2]
    append(rows, [1, 0], [42, 43])
    assert run(rows, ForwardBatch(2, [ScheduledRow(0, 3, 1), ScheduledRow(1, 2, 1)])).token_ids.tolist() == [43, 42]


def test_a_row_can_run_again_before_its_token_is_known() -> None:
    """Several steps are launched before the first is collected, whose tokens come late and not in the way."""
    rows = Rows(max_num_seqs=2, max_model_len=64)
    first = [ScheduledRow(0, 0, 2, [7], sample=True), ScheduledRow(1, 0, 1, [3], sample=True)]
    run(rows, ForwardBatch(0, first, [new_row(0, [5, 6]), new_row(1, [8], frequency_penalty=1.0)]))
    places = [rows.feed([0, 1], torch.tensor([41, 51]))]
    for step, tokens in ((1, [42, 52]), (2, [43, 53])):
        batch = ForwardBatch(step, [ScheduledRow(1, step, 1, sample=True), ScheduledRow(0, step + 1, 1, sample=True)])
        assert run(rows, batch).token_ids.tolist() == [50 + step, 40 + step]
        sampling = rows.sampling_inputs([1, 0])
        assert sampling.position.tolist() == [step + 1, step + 2]
        assert tokens_of(sampling, 0) == [8, 51, 52, 53][: step + 1]
        places.append(rows.feed([1, 0], torch.tensor(tokens[::-1])))
    for sampled, place, tokens in zip(([0, 1], [1, 0], [1, 0]), places, ([41, 51], [52, 42], [53, 43]), strict=True):
        rows.learn(sampled, place, tokens)
    last = run(rows, ForwardBatch(3, [ScheduledRow(0, 4, 1, sample=True), ScheduledRow(1, 3, 1, sample=True)]))
    assert last.token_ids.tolist() == [43, 53]


def test_behind_drafts_a_row_samples_as_if_they_were_its_tokens() -> None:
    rows = Rows(max_num_seqs=3, max_model_len=64)
    prefill = [ScheduledRow(row, 0, 3, [row], sample=True) for row in range(2)]
    prompts = [new_row(0, [5, 6, 7], frequency_penalty=0.5), new_row(1, [8, 8, 8], bad_words=((30, 31, 32),))]
    run(rows, ForwardBatch(0, prefill, prompts))
    append(rows, [0, 1], [20, 30])
    drafted = ForwardBatch(
        1,
        [
            ScheduledRow(1, 3, 3, sample=True, drafts=[31, 40]),
            ScheduledRow(2, 0, 2, [2]),
            ScheduledRow(0, 3, 2, sample=True, drafts=[21]),
        ],
        [new_row(2, [1, 2, 3])],
    )
    inputs = run(rows, drafted)
    assert inputs.token_ids.tolist() == [30, 31, 40, 1, 2, 20, 21]
    assert inputs.positions.tolist() == [3, 4, 5, 0, 1, 3, 4]
    assert inputs.sample_index.tolist() == [0, 1, 2, 5, 6]
    assert drafted.sampled_rows == [1, 1, 1, 0, 0]
    sampling = rows.sampling_inputs(drafted.sampled_rows)
    assert sampling.position.tolist() == [4, 5, 6, 4, 5]
    assert [limits.banned.tolist() for limits in sampling.limits] == [[], [32], []]
    assert sampling.penalised.tolist() == [3, 4]
    assert [tokens_of(sampling, i) for i in (3, 4)] == [[5, 6, 7, 20], [5, 6, 7, 20, 21]]

    assert drafted.accepted([31, 41, 9, 21, 50]) == [0, 1, 3, 4]
    places = rows.feed(drafted.sampled_rows, torch.tensor([31, 41, 9, 21, 50]))
    rows.learn([1, 1, 0, 0], [places[i] for i in (0, 1, 3, 4)], [31, 41, 21, 50])
    after = run(rows, ForwardBatch(2, [ScheduledRow(1, 5, 1, sample=True), ScheduledRow(0, 5, 1, sample=True)]))
    assert after.token_ids.tolist() == [41, 50]
    assert rows.sampling_inputs([1, 0]).position.tolist() == [6, 6]


@pytest.mark.parametrize(
    ("token_ids", "accepted"),
    [([7, 8, 9], [0, 1, 2]), ([7, 1, 9], [0, 1]), ([1, 8, 9], [0]), ([-1, 8, 9], [0]), ([7, -1, -1], [0, 1])],
)
def test_drafts_are_accepted_up_to_the_first_that_is_wrong(token_ids: list[int], accepted: list[int]) -> None:
    batch = ForwardBatch(0, [ScheduledRow(4, 9, 2), ScheduledRow(1, 5, 3, sample=True, drafts=[7, 8])])
    assert batch.accepted(token_ids) == accepted


def test_a_row_whose_logits_were_not_finite_can_still_run_the_step_planned_ahead() -> None:
    rows = Rows(max_num_seqs=1, max_model_len=8)
    run(rows, ForwardBatch(0, [ScheduledRow(0, 0, 1, [0], sample=True)], [new_row(0, [5])]))
    append(rows, [0], [-1])
    assert run(rows, ForwardBatch(1, [ScheduledRow(0, 1, 1, sample=True)])).token_ids.tolist() == [0]


def test_a_full_row_takes_no_more() -> None:
    rows = Rows(max_num_seqs=1, max_model_len=2)
    run(rows, ForwardBatch(0, [ScheduledRow(0, 0, 2, [0], sample=True)], [new_row(0, [5, 6])]))
    append(rows, [0], [7])
    assert rows.sampling_inputs([0]).position.tolist() == [2]


def test_sampling_inputs_follow_the_order_of_the_batch() -> None:
    rows = Rows(max_num_seqs=4, max_model_len=64)
    seed = 2**64 - 1
    batch = ForwardBatch(
        0,
        [ScheduledRow(3, 0, 3, [0], sample=True), ScheduledRow(0, 0, 1, [1], sample=True)],
        [
            new_row(0, [1], temperature=0.5, top_k=4, top_p=0.7, min_p=0.1, seed=seed),
            new_row(3, [7, 8, 9], num_prompt_tokens=2, frequency_penalty=0.25, repetition_penalty=1.5),
        ],
    )
    run(rows, batch)
    inputs = rows.sampling_inputs([3, 0])
    assert inputs.temperature.tolist() == [1.0, 0.5]
    assert inputs.top_k.tolist() == [0, 4]
    assert inputs.top_p.tolist() == [1.0, 0.7]
    assert inputs.min_p.tolist() == [0.0, 0.1]
    assert inputs.seed.tolist() == [0, seed]
    assert inputs.position.tolist() == [3, 1]
    assert inputs.penalised.tolist() == [0]
    assert (tokens_of(inputs, 0), inputs.num_prompt_tokens[0]) == ([7, 8, 9], 2)
    assert (inputs.repetition[0], inputs.presence[0], inputs.frequency[0]) == (1.5, 0.0, 0.25)


def test_rows_that_are_greedy_and_nothing_else_need_no_parameters() -> None:
    rows = Rows(max_num_seqs=4, max_model_len=64)
    asked: list[dict[str, Any]] = [{}, {"logprobs": 3}, {"min_tokens": 2}, {"presence_penalty": 0.5}]
    new = [new_row(row, [5], temperature=0.0, **asked[row]) for row in range(4)]
    run(rows, ForwardBatch(0, [ScheduledRow(row, 0, 1, [row], sample=True) for row in range(4)], new))
    assert rows.sampling_inputs([0, 1]) is None
    assert rows.sampling_inputs([0, 2]) is not None
    assert rows.sampling_inputs([3, 1]) is not None
    assert rows.sampling_inputs([0, 1], {1: b"x"}) is not None
    run(rows, ForwardBatch(1, [ScheduledRow(0, 0, 1, [0], sample=True)], [new_row(0, [5])], released_rows=[0]))
    assert rows.sampling_inputs([0]) is not None


def drawable(rows: Rows, row: int, **bitmasks: bytes) -> set[int]:
    """Ids below 10 that the row can draw next."""
    limits = rows.sampling_inputs([row], {row: bitmasks["bitmask"]} if bitmasks else None).limits
    logits = torch.zeros(10)
    for each in limits:
        limit(logits, each)
    return set(logits.isfinite().nonzero().flatten().tolist())


def test_limits_follow_what_was_generated() -> None:
    rows = Rows(max_num_seqs=3, max_model_len=64, eos_token_ids=[1])
    batch = ForwardBatch(
        0,
        [ScheduledRow(row, 0, 2, [row], sample=True) for row in range(3)],
        [
            new_row(0, [5, 6], min_tokens=2, stop_token_ids=(4,), logit_bias={9: -100.0, 8: -99.0}),
            new_row(1, [5, 6], min_tokens=1, stop_token_ids=(4,), ignore_eos=True, allowed_token_ids=(1, 2, 3, 4)),
            new_row(2, [5, 6], bad_words=((7,), (6, 3), (5, 5, 2), (2, 3), ())),
        ],
    )
    run(rows, batch)
    everything = set(range(10))
    assert drawable(rows, 0) == everything - {1, 4, 9}
    assert drawable(rows, 1) == {1, 2, 3}
    assert drawable(rows, 2) == everything - {7}, "the prompt was not generated"
    append(rows, [0, 1, 2], [5, 1, 5])
    assert drawable(rows, 0) == everything - {1, 4, 9}
    assert drawable(rows, 1) == {1, 2, 3, 4}
    append(rows, [0, 2], [5, 5])
    assert drawable(rows, 0) == everything - {9}
    assert drawable(rows, 2) == everything - {7, 2}
    append(rows, [2], [6])
    assert drawable(rows, 2) == everything - {7, 3}
    assert drawable(rows, 2, bitmask=bytes([0b10001000, 0b10])) == {9}
    inputs = rows.sampling_inputs([0, 2])
    assert [(limits.index, limits.bitmask) for limits in inputs.limits] == [(0, None), (1, None)]
    assert inputs.limits[0].bias.tolist() == [-float("inf"), -99.0]


def test_a_grammar_limits_a_row_without_other_limits() -> None:
    rows = Rows(max_num_seqs=2, max_model_len=64)
    run(rows, ForwardBatch(0, [ScheduledRow(0, 0, 1, [0], sample=True)], [new_row(0, [5])]))
    assert not rows.sampling_inputs([0]).limits
    assert drawable(rows, 0, bitmask=bytes([0b101, 0])) == {0, 2}


@pytest.mark.parametrize(
    ("start", "num_tokens", "predicted"), [(0, 3, [2, 3, 4]), (3, 1, [5]), (0, 5, [2, 3, 4, 5]), (4, 1, []), (5, 1, [])]
)
def test_each_position_predicts_the_next_prompt_token(start: int, num_tokens: int, predicted: list[int]) -> None:
    rows = Rows(max_num_seqs=1, max_model_len=64)
    rows.update(ForwardBatch(0, [], [new_row(0, [1, 2, 3, 4, 5, 6], num_prompt_tokens=5)]))
    assert rows.predicted_prompt_tokens(ScheduledRow(0, start, num_tokens)) == predicted


def test_a_rebound_row_keeps_nothing_of_its_last_request() -> None:
    rows = Rows(max_num_seqs=1, max_model_len=256)
    first = new_row(0, [1] * 100, presence_penalty=1.0, temperature=0.0, seed=3, min_tokens=5)
    run(rows, ForwardBatch(0, [ScheduledRow(0, 0, 100, [4, 5], sample=True)], [first]))
    append(rows, [0], [17])
    second = new_row(0, [2], block_table=[9])
    inputs = run(rows, ForwardBatch(1, [ScheduledRow(0, 0, 1, sample=True)], [second], released_rows=[0]))
    assert inputs.token_ids.tolist() == [2]
    assert inputs.slot_mapping.tolist() == [9 * BLOCK_SIZE]
    sampling = rows.sampling_inputs([0])
    assert not sampling.penalised.size
    assert not sampling.limits
    assert (sampling.temperature.tolist(), sampling.seed.tolist(), sampling.position.tolist()) == ([1.0], [0], [1])


@pytest.mark.parametrize(
    "batch",
    [
        ForwardBatch(1, [ScheduledRow(0, 3, 1)]),  # a token that is not known
        ForwardBatch(1, [ScheduledRow(0, 0, 2, sample=True)]),  # samples before the newest token
        ForwardBatch(1, [ScheduledRow(0, 2, 0)]),
        ForwardBatch(1, [ScheduledRow(1, 0, 1)]),  # never bound
        ForwardBatch(1, [ScheduledRow(0, 2, 1)], [new_row(0, [1])]),  # still bound
        ForwardBatch(1, [ScheduledRow(1, 0, 65, [2])], [new_row(1, [1] * 65)]),  # a block short
        ForwardBatch(1, [ScheduledRow(1, 0, 1, [2, 3, 4])], [new_row(1, [1])]),  # more blocks than a request can have
        ForwardBatch(1, [], [new_row(1, [1] * 129)]),
        ForwardBatch(1, [], [new_row(1, [])]),
        ForwardBatch(1, [ScheduledRow(0, 2, 1)], released_rows=[1]),
        ForwardBatch(1, [ScheduledRow(0, 2, 2, drafts=[9])]),  # a draft where nothing is sampled
        ForwardBatch(1, [ScheduledRow(0, 1, 2, sample=True, drafts=[9])]),  # a draft in the place of a known token
        ForwardBatch(1, [ScheduledRow(0, 2, 127, [1], sample=True, drafts=[9] * 126)]),  # more drafts than fit
    ],
)
def test_a_batch_that_contradicts_the_rows_is_refused(batch: ForwardBatch) -> None:
    rows = Rows(max_num_seqs=2, max_model_len=128)
    run(rows, ForwardBatch(0, [ScheduledRow(0, 0, 3, [0])], [new_row(0, [1, 2, 3])]))
    with pytest.raises(ValueError, match=r"step 1|row [01]"):
        run(rows, batch)
