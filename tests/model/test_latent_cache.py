"""Latents in 8 bits: what they are rounded to, where they lie, and what that does to a network's answers."""

from __future__ import annotations

from array import array
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

import model
from model.batch import SamplingParams
from model.config import load_config
from model.fp8_latents import from_fp8, to_fp8
from model.latent_cache import BLOCK_SIZE, LatentCache
from model.pool_size import ConfigError
from model.runner import load_runner
from scheduler.messages import AddRequest
from tests.checkpoints import make_checkpoint
from tests.model.engine import Engine, Outcome

BUILTIN = Path(model.__file__).parent / "builtin"
LAYERS, RANK, ROPE = 3, 40, 24


def test_a_number_changes_by_a_sixteenth_at_most() -> None:
    latents = torch.randn(200, RANK, generator=torch.Generator().manual_seed(1))
    latents *= torch.logspace(-6, 6, 200)[:, None]  # tokens of any size
    latents[0, 0], latents[1] = 2.0**-13 * latents[0].abs().max(), 0.0
    numbers, scales = to_fp8(latents)
    assert torch.equal(torch.frexp(scales).mantissa, torch.full((200,), 0.5))
    rounded = from_fp8(numbers, scales, torch.float32)
    half_a_step = torch.maximum(latents.abs() / 16, scales[:, None] * 2.0**-10)
    assert ((rounded - latents).abs() <= half_a_step).all()
    assert torch.equal(from_fp8(numbers, scales, torch.bfloat16).float(), rounded)
    largest = latents[2:].abs().amax(1) / scales[2:]
    assert ((largest > 224) & (largest <= 448)).all()


def test_the_scale_is_the_smallest_that_suffices() -> None:
    scales = to_fp8(torch.tensor([[448.0, 1], [448.01, 1], [224, 1], [1.75, -1], [1, -1.7500002]]))[1]
    assert scales.tolist() == [1, 2, 0.5, 2**-8, 2**-7]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so(value: float) -> None:
    latents = torch.ones(2, RANK)
    latents[1, 3] = value
    rounded = from_fp8(*to_fp8(latents), torch.float32)
    assert rounded[0].eq(1).all()
    assert rounded[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fp8", [False, True])
def test_what_is_written_is_read(dtype: torch.dtype, fp8: bool) -> None:
    cache = LatentCache(4, LAYERS, RANK + ROPE, dtype, fp8_latents=RANK if fp8 else 0)
    token = RANK + 4 + ROPE * dtype.itemsize if fp8 else (RANK + ROPE) * dtype.itemsize
    assert cache.block_bytes == BLOCK_SIZE * LAYERS * token
    cache.data.view(torch.uint8).fill_(255)  # NaN
    lines = torch.randperm(4 * LAYERS * BLOCK_SIZE, generator=torch.Generator().manual_seed(2))[:300]
    numbers = torch.randn(300, RANK + ROPE, generator=torch.Generator().manual_seed(3)).to(dtype)
    latents, keys = numbers.split([RANK, ROPE], dim=1)
    cache.write(lines, latents, keys)
    expected = torch.cat((from_fp8(*to_fp8(latents), dtype), keys), dim=1) if fp8 else numbers
    assert torch.equal(cache.read(lines), expected)
    pages = cache.read_pages(torch.arange(4 * LAYERS)).flatten(0, 1)
    assert torch.equal(pages[lines], expected)
    untouched = torch.ones(len(pages), dtype=torch.bool)
    untouched[lines] = False
    assert pages[untouched][:, RANK:].isnan().all()
    layer = cache.planes(1, RANK)
    for line, key in zip(lines.tolist(), keys, strict=True):
        if line // BLOCK_SIZE % LAYERS == 1:
            assert torch.equal(layer.keys[line // BLOCK_SIZE // LAYERS, line % BLOCK_SIZE], key)


def requests(vocab_size: int) -> list[AddRequest]:
    """Prompts with one beginning, the last of them a prefix of the first."""
    rng = np.random.default_rng(5)
    beginning = rng.integers(2, vocab_size, size=150).tolist()
    prompts = [beginning, [*beginning[:70], *rng.integers(2, vocab_size, size=40).tolist()], [5, 6], beginning[:100]]
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=1)
    return [
        AddRequest(request_id=str(i), prompt=array("I", prompt).tobytes(), params=params)
        for i, prompt in enumerate(prompts)
    ]


def generate(model_dir: Path, kv_cache_dtype: str, budget: int, preempt_every: int | None = None) -> Outcome:
    engine = Engine(model_dir, kv_cache_dtype=kv_cache_dtype, budget=budget)
    return engine.generate(requests(engine.runner.vocab_size), preempt_every=preempt_every)


def test_chunks_and_preemption_change_nothing(tmp_path: Path) -> None:
    """What a latent is rounded to depends on its token alone."""
    model_dir = make_checkpoint(tmp_path, "v2-yarn")
    whole, parts = generate(model_dir, "fp8", 512), generate(model_dir, "fp8", 24, preempt_every=4)
    assert parts.num_preemptions > 0
    assert parts.tokens == whole.tokens


def test_on_a_cpu_plain_torch_computes(tmp_path: Path) -> None:
    model_dir = make_checkpoint(tmp_path, "v2", dtype=torch.bfloat16)
    load = partial(load_runner, model_dir, kv_cache_dtype="fp8", num_blocks=4, progress=False)
    runner = load()
    assert runner.ops in ("eager", "onednn")
    assert runner.dtype == "bfloat16"
    assert runner.cache_bytes_per_token == load_config(model_dir).cache_bytes_per_token(2, fp8=True)
    with pytest.raises(ConfigError, match=r"quantization int8 .* they read latents in bfloat16: choose kv_cache_dtype"):
        load(quantization="int8")


def test_the_builtin_model_says_the_same() -> None:
    """Latents of a trained network: what it expects of a text, token by token."""
    text = (BUILTIN / "README.md").read_text(encoding="utf-8")
    prompt = Tokenizer.from_file(str(BUILTIN / "tokenizer.json")).encode(text).ids[:400]
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
    message = AddRequest(request_id="a", prompt=array("I", prompt).tobytes(), params=params)
    exact, rounded = (
        np.array([entry[0] for entry in engine.generate([message]).prompt_logprobs[0].logprobs])
        for engine in (Engine(BUILTIN), Engine(BUILTIN, kv_cache_dtype="fp8"))
    )
    assert 0 < np.abs(rounded - exact).mean() < 0.15
    assert abs(rounded.mean() - exact.mean()) < 0.02
