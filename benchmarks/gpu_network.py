"""Groups of `benchmarks.gpu_suite`: the network against plain torch, and its steps beside their roofline."""

from __future__ import annotations

import math
from functools import partial
from itertools import product

import torch

from benchmarks.gpu_rig import Limits, Suite, clocked, daemon_ops, new_cache, random_model, step_inputs
from model.config import DeepseekConfig, expected_tensors
from model.inputs import StepInputs
from model.latent_cache import BLOCK_SIZE, LatentCache
from model.ops.eager.ops import EagerOps


def model(suite: Suite) -> bool:
    """bfloat16 costs about 1 % of the logits, and more where it makes a router choose another expert; with latents in 8
    bits also where it moves a number to the other side of a border of rounding, which is worth a sixteenth of it."""
    rows = 2 if suite.toy else 8
    blocks = rows * 16
    ops = daemon_ops(suite)
    compute = random_model(suite, ops, suite.dtype).compute
    exact = random_model(suite, EagerOps(), torch.float32).compute
    good = True
    bound = 0.05 if suite.dtype is torch.bfloat16 else 1e-4
    cases = {"decode": 1, "absorbed chunk": 3} if suite.toy else {"decode": 1, "absorbed chunk": 64, "expanded": 600}
    for fp8, (name, queries) in product((True, False), cases.items()):
        cache, exact_cache = _caches(suite, blocks, fp8)
        inputs = step_inputs(suite, queries, [queries + 5 + 30 * row for row in range(rows)], blocks)
        found, wanted = compute(inputs, cache)[1], exact(inputs, exact_cache)[1]
        error = float((found - wanted).norm() / wanted.norm())
        same = float((found.argmax(-1) == wanted.argmax(-1)).float().mean())
        in_fp8 = " in fp8" if fp8 else ""
        suite.report("model", f"{name}{in_fp8} against float32", relative_error=error, same_first=same)
        good &= error < bound * (2 if fp8 else 1)
    inputs = step_inputs(suite, 1, [70 + 30 * row for row in range(rows)], blocks)
    launched = compute(inputs, cache)[1]
    replayed = ops.recorded(compute, suite.config)
    replayed(inputs, cache)
    again = replayed(inputs, cache)[1]
    error = float((again - launched).norm() / launched.norm())
    alone = _row(inputs, 1)
    equal = bool((compute(alone, cache)[1][0] == launched[1]).all())
    suite.report("model", "replayed against launched", relative_error=error)
    suite.report("model", "a row alone and among others", bit_equal=equal)
    return good and error < bound


def _caches(suite: Suite, blocks: int, fp8: bool) -> tuple[LatentCache, LatentCache]:
    """The same numbers in the run dtype and in float32; latents in 8 bits are the same in both."""
    rank, layers = suite.config.kv_lora_rank, suite.config.num_hidden_layers
    cache = new_cache(suite, blocks, layers, fp8=fp8)
    exact = new_cache(suite, blocks, layers, torch.float32, fp8=fp8)
    for layer in range(layers):
        for source, target in zip(cache.planes(layer, rank), exact.planes(layer, rank), strict=True):
            if source is not None and target is not None:
                target.copy_(source)
    return cache, exact


def _row(inputs: StepInputs, row: int) -> StepInputs:
    one = slice(row, row + 1)
    context = inputs.context_lens[one]
    return StepInputs(
        inputs.token_ids[one], inputs.positions[one], inputs.slot_mapping[one], [0, 1], context,
        inputs.block_tables[one], inputs.sample_index[:1] * 0,
    )  # fmt: skip


def roofline(
    config: DeepseekConfig, limits: Limits, rows: int, context: int, itemsize: int, fp8: bool = False
) -> float:
    """Seconds of a decoding step: of each part, what takes longer, reading its bytes once or its operations. `fp8`: of
    the cached latents."""
    shapes = {name: math.prod(shape) for name, shape in expected_tensors(config).items()}
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    experts, chosen = config.n_routed_experts, config.num_experts_per_tok
    moe_layers = sum(config.is_moe_layer(layer) for layer in range(config.num_hidden_layers))
    touched = experts * (1 - (1 - chosen / experts) ** rows)
    dense = sum(n for name, n in shapes.items() if ".experts." not in name and "embed_tokens" not in name)
    keys = config.num_hidden_layers * rows * context
    parts = (
        (dense * itemsize, 2 * dense * rows),
        (moe_layers * touched * expert * itemsize, 2 * rows * moe_layers * chosen * expert),
        (
            rows * context * config.cache_bytes_per_token(itemsize, fp8),
            2 * keys * config.num_attention_heads * (config.latent_dim + config.kv_lora_rank),
        ),
    )
    return sum(limits.seconds(*part) for part in parts)


def step(suite: Suite) -> bool:
    config, limits = suite.config, suite.limits()
    ops = daemon_ops(suite)
    compute = random_model(suite, ops, suite.dtype).compute
    shapes = [(rows, 1024) for rows in (1, 8, 32, 64, 128, 256, 512)]
    shapes += [(1, 32768), (8, 8192), (32, 8192), (64, 8192), (128, 4096)]
    shapes = [(1, 64), (3, 66)] if suite.toy else shapes
    blocks = max(rows * -(-context // BLOCK_SIZE) for rows, context in shapes)
    for fp8 in (False, True):
        cache = new_cache(suite, blocks, config.num_hidden_layers, fp8=fp8)
        replayed = ops.recorded(compute, config)
        in_fp8 = " in fp8" if fp8 else ""
        for rows, context in shapes:
            inputs = step_inputs(suite, 1, [context] * rows, blocks)
            replayed(inputs, cache)
            seconds = clocked(partial(replayed, inputs, cache), 1 if suite.toy else 20)
            share = roofline(config, limits, rows, context, suite.dtype.itemsize, fp8) / seconds
            name = f"decode {rows} x {context}{in_fp8}"
            suite.report("step", name, ms=seconds * 1e3, **{"tok/s": rows / seconds}, share=share)
        if fp8:
            continue
        for tokens in (5,) if suite.toy else (512, 2048, 8192, 32768):
            inputs = step_inputs(suite, tokens, [tokens], blocks)
            compute(inputs, cache)
            seconds = clocked(partial(compute, inputs, cache), 1 if suite.toy else 3)
            suite.report("step", f"prompt of {tokens}", ms=seconds * 1e3, **{"tok/s": tokens / seconds})
    return True
