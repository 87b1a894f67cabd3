"""The network's parameters, precision and indifference to how tokens are batched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.config import expected_tensors, load_config
from model.deepseek import DeepseekForCausalLM, DeepseekMoE
from model.latent_cache import BLOCK_SIZE
from model.ops.eager.ops import EagerOps
from tests.checkpoints import KINDS, make_checkpoint, random_weights
from tests.model.harness import Driver, GivenWeights, Row, load_model, random_tokens


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_of_the_checkpoint_is_read_once(kind: str, tmp_path: Path) -> None:
    config = load_config(make_checkpoint(tmp_path, kind))
    expected = expected_tensors(config)
    weights = GivenWeights({n: t for n, t in random_weights(config).items() if n in expected}, torch.bfloat16)
    model = DeepseekForCausalLM(config, EagerOps(), weights)
    assert not weights.unread  # and what is read twice is a KeyError
    assert model.model.norm.weight.dtype is torch.bfloat16
    for layer in model.model.layers:
        if isinstance(layer.mlp, DeepseekMoE):
            assert layer.mlp.gate.weight.dtype is torch.float32


def test_nothing_but_latents_is_cached(tmp_path: Path) -> None:
    model = load_model(make_checkpoint(tmp_path, "v2"))
    driver = Driver(model, num_blocks=3)
    row = Row(random_tokens(100, 256))
    driver.step([(row, 100)])
    config = model.config
    assert driver.cache.data.shape == (3, config.num_hidden_layers, BLOCK_SIZE, config.kv_lora_rank + 16)
    assert driver.cache.block_bytes == BLOCK_SIZE * config.cache_bytes_per_token(4)
    layer = driver.cache.data[:, 1]
    assert layer[row.blocks[0]].isfinite().all()
    assert layer[row.blocks[1], : 100 - BLOCK_SIZE].isfinite().all()
    assert layer[driver.free[0]].isnan().all()


@pytest.mark.parametrize("kind", ["v2-grouped", "v3"])
def test_a_row_does_not_see_its_neighbours(kind: str, tmp_path: Path) -> None:
    """Different prompts in one ragged batch, each as alone: prefill, chunks and decode rows side by side."""
    model = load_model(make_checkpoint(tmp_path, kind))
    driver = Driver(model)
    prompts = [random_tokens(n, 256, seed=n) for n in (40, 66, 5, 300, 131)]
    alone = [driver.run(prompt, 10**6) for prompt in prompts]
    rows = [Row(prompt) for prompt in prompts]
    plans = [[39, 1], [1, 65], [2, 3], [299, 1], [70, 61]]
    parts = [driver.step(list(zip(rows, sizes, strict=True))) for sizes in zip(*plans, strict=True)]
    for i, expected in enumerate(alone):
        found = torch.cat([part[i] for part in parts])
        assert (found - expected).abs().max() < 3e-4


def test_decode_rows_in_any_order_and_grouping(tmp_path: Path) -> None:
    model = load_model(make_checkpoint(tmp_path, "moonlight"))
    driver = Driver(model)
    lengths = [1, 63, 64, 65, 200, 255, 256, 257, 600, 1030]
    rows = [Row(random_tokens(n + 1, 256, seed=n)) for n in lengths]
    for row, length in zip(rows, lengths, strict=True):
        driver.step([(row, length)])
    expected = [driver.run(row.tokens, 10**6)[-1] for row in rows]
    shuffled = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    for i, logprobs in zip(shuffled, driver.step([(rows[i], 1) for i in shuffled]), strict=True):
        assert (logprobs[0] - expected[i]).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_close_in_the_mean(dtype: torch.dtype, tmp_path: Path) -> None:
    """Tokens of a tiny random model flip between experts, so that only means can be compared: transformers' own
    bfloat16 is 0.135 from its float32 here."""
    path = make_checkpoint(tmp_path, "v2-yarn")
    tokens = random_tokens(300, 256)
    exact = Driver(load_model(path)).run(tokens, 300)
    model = load_model(path, dtype)
    for chunk in (300, 20):
        found = Driver(model).run(tokens, chunk)
        assert found.dtype == torch.float32
        assert (found - exact).abs().mean() < (0.2 if dtype == torch.bfloat16 else 0.03)
        assert (found.argmax(-1) == exact.argmax(-1)).float().mean() > 0.8


def test_bos_alone_and_the_last_position(tmp_path: Path) -> None:
    """The shortest prompt, and the last position the config allows: no table of angles that could end."""
    model = load_model(make_checkpoint(tmp_path, "v2", max_position_embeddings=131_072))
    driver = Driver(model, num_blocks=4)
    assert driver.run([0], 1).shape == (1, 256)
    far = Row(random_tokens(131_072, 256), num_computed=131_071)
    far.blocks = [driver.free[0]] * (131_072 // BLOCK_SIZE)
    driver.cache.data.zero_()
    assert driver.step([(far, 1)])[0].isfinite().all()
