"""The replayed network, against the same calls made one by one: equal to the last bit, whatever a step looks like."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.deepseek import DeepseekForCausalLM
from model.inputs import StepInputs
from model.ops.interface import Network
from tests.checkpoints import make_checkpoint
from tests.model.harness import Driver, Row, random_tokens
from tests.model.ops.test_cpu_network import KERNELS, KINDS, by_kernels

pytestmark = pytest.mark.skipif(KERNELS is None, reason="the kernels are not built")


class Pair:
    """The network twice over caches of their own, by single calls and replayed."""

    def __init__(self, model: DeepseekForCausalLM) -> None:
        self.driver = Driver(model)
        self.cache = Driver(model).cache
        self.replayed: Network = model.ops.recorded(model.compute, model.config)

    def step(self, *work: tuple[Row, int], sampled: list[int] | None = None) -> None:
        """One step of the next `n` tokens of each row; `sampled`: other tokens than the rows' last ones."""
        inputs = self.driver.inputs(work)
        if sampled is not None:
            inputs = replace(inputs, sample_index=torch.tensor(sampled, dtype=torch.int64))
        self.check(inputs)
        for row, num_tokens in work:
            row.num_computed += num_tokens

    def check(self, inputs: StepInputs) -> None:
        expected = self.driver.model.compute(inputs, self.driver.cache)
        found = self.replayed(inputs, self.cache)
        for one, other in zip(expected, found, strict=True):
            assert one.dtype == other.dtype
            assert one.isfinite().all()
            assert torch.equal(one, other)
        written = [cache.data.view(torch.int16) for cache in (self.driver.cache, self.cache)]
        assert torch.equal(*written)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("tied", "quantization"), [(False, "none"), (True, "none"), (False, "int8"), (False, "int4"), (True, "int4")]
)
def test_equal_to_single_calls(kind: str, tied: bool, quantization: str, tmp_path: Path) -> None:
    """Prompts in chunks, beside rows that decode, tokens that see another row's blocks, and nothing that is sampled."""
    path = make_checkpoint(tmp_path / "model", kind, tie_word_embeddings=tied, **KINDS[kind])
    pair = Pair(by_kernels(path, threads=2, quantization=quantization))
    first, second, third = (Row(random_tokens(n, 256, seed=n)) for n in (150, 70, 9))
    pair.step((first, 1))
    pair.step((first, 69), sampled=[])
    pair.step((first, 1), (second, 66))
    pair.step((second, 1), (third, 5), (first, 40), sampled=[0, 45])
    again = Row(first.tokens[:64] + random_tokens(6, 256), first.blocks[:1], num_computed=64)
    pair.step((first, 1), (again, 6), (third, 1), (second, 1))
    pair.step((first, 1), (second, 1), (third, 1), sampled=[2, 0])


def test_steps_of_every_size(tmp_path: Path) -> None:
    pair = Pair(by_kernels(make_checkpoint(tmp_path / "model", "v2-grouped", q_lora_rank=32), threads=2))
    for size in (70, *range(1, 70)):
        row = Row(random_tokens(size, 256, seed=size))
        pair.step((row, size))
        pair.driver.release(row)


@pytest.mark.parametrize("change", [{"n_shared_experts": None}, {"first_k_dense_replace": 0}, {"num_hidden_layers": 1}])
def test_other_networks(change: dict[str, int | None], tmp_path: Path) -> None:
    pair = Pair(by_kernels(make_checkpoint(tmp_path / "model", "v2", **change), threads=2))
    row = Row(random_tokens(80, 256))
    pair.step((row, 75))
    pair.step((row, 1))


def test_a_row_alone_and_among_others(tmp_path: Path) -> None:
    model = by_kernels(make_checkpoint(tmp_path / "model", "v2-yarn"), threads=2)
    replayed, driver = model.ops.recorded(model.compute, model.config), Driver(model)
    rows = [Row(random_tokens(n, 256, seed=n)) for n in (3, 64, 65, 200)]
    alone = [replayed(driver.inputs([(row, len(row.tokens))]), driver.cache)[1].clone() for row in rows]
    together = replayed(driver.inputs([(row, len(row.tokens)) for row in rows]), driver.cache)[1]
    assert torch.equal(torch.cat(alone), together)
