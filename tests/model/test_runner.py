"""The worker on real checkpoints: what it loads, what it refuses, and that a step's tokens are the network's."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from model.batch import ForwardBatch, NewRow, SamplingParams, ScheduledRow
from model.config import CheckpointError, load_config
from model.inputs import StepInputs
from model.pool_size import ConfigError
from model.reference import reference_logits
from model.runner import ModelRunner, load_runner
from tests.checkpoints import make_checkpoint, read_tensors, write_tensors

GREEDY = SamplingParams(max_tokens=20, temperature=0.0)


def load(path: Path, **options: Any) -> ModelRunner:
    return load_runner(path, **{"max_num_seqs": 4, "num_threads": 1, "progress": False} | options)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("runner"), "v2-yarn")


def prefill(row: int, prompt: list[int], blocks: list[int]) -> tuple[NewRow, ScheduledRow]:
    new = NewRow(row=row, tokens=array("I", prompt), num_prompt_tokens=len(prompt), params=GREEDY)
    return new, ScheduledRow(row, 0, len(prompt), blocks, sample=True)


def test_greedy_tokens_are_those_of_the_naive_twin(checkpoint: Path) -> None:
    runner = load(checkpoint)
    config, weights = load_config(checkpoint), read_tensors(checkpoint)
    sequences = [[11, 12, 13], [(7 * i) % 250 + 2 for i in range(70)]]
    new, rows = zip(*(prefill(i, list(s), [2 * i + 1, 2 * i]) for i, s in enumerate(sequences)), strict=True)
    batch = ForwardBatch(0, list(rows), list(new))
    for step in range(1, 7):
        sampled = runner.execute(batch)
        assert (sampled.step, sampled.rows) == (step - 1, [0, 1])
        for sequence, token in zip(sequences, sampled.token_ids, strict=True):
            assert token == reference_logits(config, weights, sequence)[-1].argmax().item()
            sequence.append(token)
        batch = ForwardBatch(step, [ScheduledRow(i, len(s) - 1, 1, sample=True) for i, s in enumerate(sequences)])


def test_rows_that_do_not_sample_give_no_token(checkpoint: Path) -> None:
    runner = load(checkpoint)
    whole = runner.execute(ForwardBatch(0, *([x] for x in reversed(prefill(0, [5, 6, 7, 8], [3]))))).token_ids
    new, _ = prefill(1, [5, 6, 7, 8], [])
    first = runner.execute(ForwardBatch(1, [ScheduledRow(1, 0, 3, [9])], [new]))
    assert (first.rows, first.token_ids) == ([], [])
    assert runner.execute(ForwardBatch(2, [ScheduledRow(1, 3, 1, sample=True)])).token_ids == whole


def test_logits_that_are_not_finite_end_one_row_only(checkpoint: Path) -> None:
    runner = load(checkpoint)
    runner.model.model.embed_tokens.weight[77] = torch.nan
    new, rows = zip(prefill(0, [5, 6], [0]), prefill(1, [5, 77], [1]), prefill(2, [5, 6], [2]), strict=True)
    good, bad, again = runner.execute(ForwardBatch(0, list(rows), list(new))).token_ids
    assert bad == -1
    assert good == again >= 0


def test_a_network_that_computes_nothing_finite_is_refused_at_the_start(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "v2")
    tensors = read_tensors(path)
    tensors["lm_head.weight"].fill_(3e38)
    write_tensors(path, tensors)
    with pytest.raises(CheckpointError, match="logits are not finite in float32"):
        load(path)


def test_what_the_engine_tells_the_front_end(checkpoint: Path) -> None:
    runner = load(checkpoint, max_model_len=1000, num_blocks=40)
    config = load_config(checkpoint)
    assert runner.model_type == "deepseek_v2"
    assert (runner.device, runner.dtype, runner.ops) == ("cpu", "float32", "eager")
    assert runner.instruction_set is None
    assert runner.prefill_attention is None
    assert (runner.max_model_len, runner.num_blocks) == (1000, 40)
    assert (runner.vocab_size, tuple(runner.eos_token_ids)) == (config.vocab_size, (1,))
    assert runner.cache_bytes_per_token == config.latent_dim * config.num_hidden_layers * 4
    assert runner.weight_bytes == 4 * config.num_parameters()
    assert len(runner.fingerprint) == 64
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("file_dtype", "asked", "expected"),
    [
        (torch.float32, "auto", "float32"),
        (torch.bfloat16, "auto", "bfloat16"),
        (torch.float16, "auto", "bfloat16"),
        (torch.float32, "bfloat16", "bfloat16"),
        (torch.bfloat16, "float32", "float32"),
    ],
)
def test_dtype(tmp_path: Path, file_dtype: torch.dtype, asked: str, expected: str) -> None:
    runner = load(make_checkpoint(tmp_path, "v3", dtype=file_dtype), dtype=asked, num_blocks=8)
    assert runner.dtype == expected
    assert runner.cache.data.dtype == getattr(torch, expected)
    assert runner.execute(ForwardBatch(0, *([x] for x in reversed(prefill(3, [5, 6], [7]))))).token_ids[0] >= 0


def test_the_shortest_model_warms_up(checkpoint: Path) -> None:
    assert load(checkpoint, max_model_len=2, num_blocks=1, max_num_batched_tokens=1).max_model_len == 2


def test_what_cannot_be_met_is_refused_before_anything_is_loaded(checkpoint: Path) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="device cuda: torch finds no usable GPU"):
            load(checkpoint, device="cuda")
    with pytest.raises(ConfigError, match="max_model_len 1000 needs 16 blocks"):
        load(checkpoint, max_model_len=1000, num_blocks=15)
    with pytest.raises(ConfigError, match=r"kv_cache_memory 1048576\.00 GiB needs"):
        load(checkpoint, kv_cache_memory=1 << 50)


def test_a_model_beyond_the_memory_is_refused_by_its_config_alone(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.runner.available_memory", lambda: 1 << 20)
    with pytest.raises(CheckpointError, match="does not fit"):
        load(checkpoint)


def test_a_step_that_contradicts_the_rows_is_an_error_and_computes_nothing(checkpoint: Path) -> None:
    runner = load(checkpoint)
    new, row = prefill(0, [5, 6, 7], [0])
    runner.execute(ForwardBatch(0, [row], [new]))
    before = runner.cache.data.clone()
    with pytest.raises(ValueError, match="step 1"):
        runner.execute(ForwardBatch(1, [ScheduledRow(0, 9, 1, sample=True)]))
    torch.testing.assert_close(runner.cache.data, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("room", [1, 3, 40])
def test_a_step_whose_activations_do_not_fit_is_computed_in_parts(
    checkpoint: Path, room: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Prompts and a decoding row, cut anywhere; nothing in the rows or the cache tells it from a step that fits."""
    prompts = [[(7 * i) % 250 + 2 for i in range(70)], [5, 6, 7], [9]]
    new, rows = zip(*(prefill(i, list(p), [2 * i + 1, 2 * i]) for i, p in enumerate(prompts)), strict=True)
    decode = [ScheduledRow(i, len(p), 1, sample=True) for i, p in enumerate(prompts)]
    batches = [ForwardBatch(0, list(rows), list(new)), ForwardBatch(1, decode)]
    exact = load(checkpoint)
    exact.cache.data.zero_()
    expected = [exact.execute(batch).token_ids for batch in batches]

    runner = load(checkpoint)
    runner.cache.data.zero_()
    compute, network = runner._compute, runner.model.__class__.__call__

    def within(call: Callable[..., Any], inputs: StepInputs) -> Any:
        if inputs.num_tokens > room:
            raise torch.OutOfMemoryError("no room")
        return call(inputs, runner.cache)

    monkeypatch.setattr(runner, "_compute", lambda inputs, _: within(compute, inputs))
    monkeypatch.setattr(
        runner.model.__class__, "__call__", lambda self, inputs, _: within(partial(network, self), inputs)
    )
    new, rows = zip(*(prefill(i, list(p), [2 * i + 1, 2 * i]) for i, p in enumerate(prompts)), strict=True)
    batches = [ForwardBatch(0, list(rows), list(new)), ForwardBatch(1, decode)]
    assert [runner.execute(batch).token_ids for batch in batches] == expected
    assert "a step of 74 tokens is computed in parts" in caplog.text
    torch.testing.assert_close(runner.cache.data, exact.cache.data, rtol=1e-3, atol=1e-3)


def test_a_single_token_that_does_not_fit_is_an_error(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = load(checkpoint)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(runner, "_compute", full)
    new, row = prefill(0, [5], [0])
    with pytest.raises(MemoryError):
        runner.execute(ForwardBatch(0, [row], [new]))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_after_a_lack_of_memory_and_a_reset_it_computes_the_same(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    runner = load(checkpoint)
    whole = runner.execute(ForwardBatch(0, *([x] for x in reversed(prefill(0, [5, 6, 7, 8], [3]))))).token_ids

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(runner, "_compute", fail)
        with pytest.raises(MemoryError):
            runner.execute(ForwardBatch(1, *([x] for x in reversed(prefill(1, [9], [2]))), released_rows=[0]))
    runner.reset()
    for row in (0, 1):
        new, scheduled = prefill(row, [5, 6, 7, 8], [row])
        assert runner.execute(ForwardBatch(2, [scheduled], [new])).token_ids == whole


@pytest.mark.parametrize("rows", [1, 3])
def test_a_capture_that_runs_out_of_memory(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Its end hides why; several rows are computed in parts, which need no graph."""
    runner = load(checkpoint)
    new, scheduled = zip(*(prefill(i, [5 + i], [i]) for i in range(rows)), strict=True)
    batch = ForwardBatch(0, list(scheduled), list(new))
    expected = runner.execute(batch).token_ids
    runner.reset()

    def capture(*_: object) -> None:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    monkeypatch.setattr(runner, "_compute", capture)
    if rows == 1:
        with pytest.raises(MemoryError, match="during capture"):
            runner.execute(batch)
    else:
        assert runner.execute(batch).token_ids == expected


def test_any_other_error_comes_out_as_it_is(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = load(checkpoint)
    monkeypatch.setattr(runner, "_compute", lambda *_: (_ for _ in ()).throw(RuntimeError("a shape does not fit")))
    with pytest.raises(RuntimeError, match="a shape does not fit"):
        runner.execute(ForwardBatch(0, *([x] for x in reversed(prefill(0, [5], [3])))))
