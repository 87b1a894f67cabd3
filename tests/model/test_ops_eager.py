"""Each eager operation against the formula it stands for, written out token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.config import DeepseekConfig
from model.inputs import StepInputs
from model.latent_cache import BLOCK_SIZE, LatentCache
from model.ops.eager import attention
from model.ops.eager.ops import EagerOps
from model.ops.interface import Routing, SwigluWeights, unpacked
from model.rope_config import RopeConfig
from model.rotary import Rotation, inverse_frequencies, rotate_pairs, rotation

CONFIG = DeepseekConfig(
    model_type="deepseek_v2",
    vocab_size=64,
    hidden_size=48,
    intermediate_size=64,
    moe_intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    n_shared_experts=1,
    n_routed_experts=12,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    topk_method="greedy",
    scoring_func="softmax",
    norm_topk_prob=False,
    routed_scaling_factor=1.0,
    first_k_dense_replace=1,
    moe_layer_freq=1,
    q_lora_rank=None,
    kv_lora_rank=40,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=12,
    rms_norm_eps=1e-6,
    attention_bias=False,
    tie_word_embeddings=False,
    max_position_embeddings=1 << 18,
    rope=RopeConfig(10000.0),
    num_nextn_predict_layers=0,
    eos_token_ids=(1,),
    bos_token_id=0,
    dtype=None,
)
OPS = EagerOps()
GREEDY = CONFIG
GROUPED = replace(CONFIG, topk_method="group_limited_greedy", routed_scaling_factor=16.0)
NOAUX = replace(CONFIG, topk_method="noaux_tc", scoring_func="sigmoid", norm_topk_prob=True, routed_scaling_factor=2.5)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- attention ---------------------------------------------------------------------------------------------------


def step_of(rows: Sequence[tuple[int, int]], seed: int = 0) -> tuple[StepInputs, int]:
    """Rows of (query tokens, context length) with blocks in random order; and the number of blocks there are."""
    counts = [-(-context // BLOCK_SIZE) for _, context in rows]
    order = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(seed)).tolist()
    blocks = [[order.pop() for _ in range(count)] for count in counts]
    spans = [range(context - queries, context) for queries, context in rows]
    query_start = [0]
    for span in spans:
        query_start.append(query_start[-1] + len(span))
    tables = torch.full((len(rows), max(counts) + 2), -1, dtype=torch.int32)
    for i, row_blocks in enumerate(blocks):
        tables[i, : len(row_blocks)] = torch.tensor(row_blocks)
    slots = [blocks[i][p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for i, span in enumerate(spans) for p in span]
    tokens = query_start[-1]
    step = StepInputs(
        token_ids=torch.zeros(tokens, dtype=torch.int64),
        positions=torch.tensor([p for span in spans for p in span]),
        slot_mapping=torch.tensor(slots),
        query_start=query_start,
        context_lens=[context for _, context in rows],
        block_tables=tables,
        sample_index=torch.tensor(query_start[1:]) - 1,
    )
    return step, sum(counts) + 3


def attend(rows: Sequence[tuple[int, int]], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """What the operation gives for rows of a NaN-filled cache, and what softmax attention gives in float64."""
    config, layer = CONFIG, 1
    step, num_blocks = step_of(rows)
    cache = LatentCache(num_blocks, config.num_hidden_layers, config.latent_dim, dtype)
    cache.data.fill_(torch.nan)
    heads, rank, tokens = config.num_attention_heads, config.kv_lora_rank, step.num_tokens
    q_nope = randn(tokens, heads, config.qk_nope_head_dim, seed=1).to(dtype) * 2
    q_rope = randn(tokens, heads, config.qk_rope_head_dim, seed=2).to(dtype) * 2
    w_uk = randn(heads, config.qk_nope_head_dim, rank, seed=3).to(dtype) / rank**0.5
    w_uv = randn(heads, config.v_head_dim, rank, seed=4).to(dtype) / rank**0.5
    contexts = [randn(length, config.latent_dim, seed=5 + i).to(dtype) for i, length in enumerate(step.context_lens)]
    tables = [table[: -(-len(c) // BLOCK_SIZE)] for table, c in zip(step.block_tables, contexts, strict=True)]
    # What was computed in steps before lies in the cache ...
    for table, context, start, stop in zip(tables, contexts, step.query_start, step.query_start[1:], strict=False):
        for i in range(len(context) - (stop - start)):
            cache.data[table[i // BLOCK_SIZE], layer, i % BLOCK_SIZE] = context[i]
        if len(context) - (stop - start) > 0:  # as the clearing of begun blocks in those steps left it
            block = table[(len(context) - (stop - start) - 1) // BLOCK_SIZE]
            cache.data[block, layer] = cache.data[block, layer].nan_to_num(0.0)
    call = OPS.attention(step, cache, config)
    # ... and the layer writes this step's own latents before it attends.
    own = torch.cat([c[-(b - a) :] for c, a, b in zip(contexts, step.query_start, step.query_start[1:], strict=False)])
    cache.data[step.slot_mapping // BLOCK_SIZE, layer, step.slot_mapping % BLOCK_SIZE] = own
    found = call(layer, q_nope, q_rope, OPS.pack_latent(w_uk, w_uv))

    expected = []
    for r, context in enumerate(contexts):
        latents, shared = context.double().split([rank, config.qk_rope_head_dim], dim=1)
        for token in range(step.query_start[r], step.query_start[r + 1]):
            seen = int(step.positions[token]) + 1
            keys = torch.einsum("kr,hdr->hkd", latents[:seen], w_uk.double())
            values = torch.einsum("kr,hdr->hkd", latents[:seen], w_uv.double())
            scores = torch.einsum("hd,hkd->hk", q_nope[token].double(), keys)
            scores += q_rope[token].double() @ shared[:seen].T
            weights = (scores * config.softmax_scale).softmax(-1)
            expected.append(torch.einsum("hk,hkd->hd", weights, values))
    return found, torch.stack(expected)


ROWS = {
    "one token": [(1, 1)],
    "decode": [(1, 65), (1, 64), (1, 200), (1, 1), (1, 130)],
    "decode, very different contexts": [(1, 3), (1, 700), (1, 90), (1, 1500), (1, 800)],
    "prompt": [(150, 150)],
    "short chunk on a long prefix": [(7, 300)],
    "long chunk on a prefix": [(200, 330)],
    "mixed": [(1, 64), (70, 70), (1, 129), (5, 210), (1, 128), (180, 250), (2, 2)],
}


@pytest.mark.parametrize("workspace", [attention.WORKSPACE, 1])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_attention_over_paged_rows(
    rows: list[tuple[int, int]], workspace: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with the smallest workspace, where every block of keys is a chunk of its own."""
    monkeypatch.setattr(attention, "WORKSPACE", workspace)
    found, expected = attend(rows)
    assert (found - expected).abs().max() < 2e-5


@pytest.mark.parametrize("expand", [False, True], ids=["mla_attention", "mla_prefill"])
def test_both_forms_agree(expand: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_expanding_is_cheaper", lambda *_: expand)
    monkeypatch.setattr(attention, "WORKSPACE", 50_000)
    for rows in ([(1, 500)], [(30, 30)], [(30, 400)], [(190, 390)]):
        found, expected = attend(rows)
        assert (found - expected).abs().max() < 2e-5


def test_the_form_that_needs_fewer_multiplications_is_taken() -> None:
    v2_lite = replace(
        CONFIG, num_attention_heads=16, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
    )
    cheaper = attention._expanding_is_cheaper
    assert not cheaper(1, 1, v2_lite)
    assert not cheaper(1, 100_000, v2_lite)
    assert not cheaper(16, 16, v2_lite)
    assert cheaper(17, 17, v2_lite)
    assert cheaper(512, 512, v2_lite)
    assert cheaper(512, 131_072, v2_lite)
    assert not cheaper(64, 131_072, v2_lite)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_in_low_precision(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for workspace in (attention.WORKSPACE, 1):
        monkeypatch.setattr(attention, "WORKSPACE", workspace)
        found, expected = attend(ROWS["mixed"], dtype)
        assert found.dtype == dtype
        assert (found - expected).abs().mean() < (0.01 if dtype == torch.bfloat16 else 0.002)


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest result of any operation."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result._base is None and not func.__name__.startswith("index_fill"):
            self.nbytes = max(self.nbytes, result.nbytes)
        return result


def test_the_workspace_does_not_grow_with_the_context() -> None:
    """A chunk of 512 tokens and decode rows at 131,072 tokens, in views of one block to keep the cache small."""
    context, heads = 131_072, CONFIG.num_attention_heads
    cache = LatentCache(9, 1, CONFIG.latent_dim, torch.float32)
    cache.data.zero_()
    own = torch.arange(512)
    step = StepInputs(
        token_ids=torch.zeros(514, dtype=torch.int64),
        positions=torch.cat((context - 512 + own, torch.tensor([context - 2, context - 1]))),
        slot_mapping=torch.cat((own, torch.tensor([8 * BLOCK_SIZE + 1, 8 * BLOCK_SIZE + 2]))),
        query_start=[0, 512, 513, 514],
        context_lens=[context, context - 1, context],
        block_tables=torch.full((3, context // BLOCK_SIZE), 8, dtype=torch.int32),
        sample_index=torch.tensor([511]),
    )
    with LargestTensor() as largest:
        call = OPS.attention(step, cache, CONFIG)
        call(
            0,
            randn(514, heads, CONFIG.qk_nope_head_dim),
            randn(514, heads, CONFIG.qk_rope_head_dim),
            OPS.pack_latent(
                randn(heads, CONFIG.qk_nope_head_dim, CONFIG.kv_lora_rank),
                randn(heads, CONFIG.v_head_dim, CONFIG.kv_lora_rank),
            ),
        )
    assert 0 < largest.nbytes <= 4 * attention.WORKSPACE


def test_a_poisoned_neighbour_or_a_reused_block_does_not_spread() -> None:
    """NaN of other rows, in blocks this row owns now, must not reach it: what was begun is cleared."""
    step, num_blocks = step_of([(1, 1), (1, 64), (1, 130)])
    cache = LatentCache(num_blocks, 2, CONFIG.latent_dim, torch.float32)
    cache.data.fill_(torch.nan)
    cache.data[step.block_tables[1, 0]] = 1.0
    cache.data[step.block_tables[2, :2].long()] = torch.nan
    cache.data[step.block_tables[2, 2], :] = 1.0
    heads = CONFIG.num_attention_heads
    call = OPS.attention(step, cache, CONFIG)
    cache.data[step.slot_mapping // BLOCK_SIZE, 0, step.slot_mapping % BLOCK_SIZE] = 1.0
    found = call(
        0,
        randn(3, heads, CONFIG.qk_nope_head_dim),
        randn(3, heads, CONFIG.qk_rope_head_dim),
        OPS.pack_latent(
            randn(heads, CONFIG.qk_nope_head_dim, CONFIG.kv_lora_rank),
            randn(heads, CONFIG.v_head_dim, CONFIG.kv_lora_rank),
        ),
    )
    assert found[:2].isfinite().all()
    assert found[2].isnan().all()


# --- norms, rotation and the write to the cache ------------------------------------------------------------------


def test_rms_norm_takes_its_statistics_in_float32() -> None:
    x = randn(5, 2048) * 300  # squares beyond float16's largest number
    weight = 1 + 0.1 * randn(2048, seed=1)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 0.004)):
        given, gain = x.to(dtype), weight.to(dtype)
        exact = given.double() * (given.double().square().mean(-1, keepdim=True) + 0.5).rsqrt() * gain.double()
        found = OPS.rms_norm(given, gain, 0.5)
        assert found.dtype == dtype
        assert (found - exact).abs().max() < tolerance


def test_rms_norm_uses_its_eps() -> None:
    assert OPS.rms_norm(torch.full((1, 4), 1e-3), torch.ones(4), 3e-6)[0, 0].item() == pytest.approx(0.5)


def test_rope_and_cache_writes_its_slots_and_nothing_else() -> None:
    cache = LatentCache(4, 3, CONFIG.latent_dim, torch.float32)
    cache.data.fill_(-7.0)
    kv, q_rope = randn(3, CONFIG.latent_dim), randn(3, CONFIG.num_attention_heads, CONFIG.qk_rope_head_dim, seed=1)
    gain = 1 + 0.1 * randn(CONFIG.kv_lora_rank, seed=2)
    turn = rotation(torch.tensor([63, 64, 900]), inverse_frequencies(CONFIG.rope, CONFIG.qk_rope_head_dim), 1.0)
    slots = torch.tensor([2 * BLOCK_SIZE + 63, 0, 3 * BLOCK_SIZE + 4])
    turned = OPS.rope_and_cache(q_rope, kv, gain, 1e-6, turn, slots, cache, 1)
    assert torch.equal(turned, rotate_pairs(q_rope, turn))
    rank = CONFIG.kv_lora_rank
    for token, (block, offset) in enumerate(((2, 63), (0, 0), (3, 4))):
        written = cache.data[block, 1, offset]
        normed = kv[token, :rank] * (kv[token, :rank].square().mean() + 1e-6).rsqrt() * gain
        assert torch.allclose(written[:rank], normed, atol=1e-6)
        key = rotate_pairs(kv[token : token + 1, None, rank:], Rotation(turn.cos[token, None], turn.sin[token, None]))
        assert torch.equal(written[rank:], key.flatten())
        cache.data[block, 1, offset] = -7.0
    assert (cache.data == -7.0).all()


# --- router and experts ------------------------------------------------------------------------------------------


def routed_by_hand(x: Tensor, weight: Tensor, bias: Tensor | None, config: DeepseekConfig) -> list[dict[int, float]]:
    """Expert -> weight for each token, by sorting lists."""
    result = []
    size = config.n_routed_experts // config.n_group
    for token in x.double():
        logits = weight.double() @ token
        scores = (logits.softmax(0) if config.scoring_func == "softmax" else logits.sigmoid()).tolist()
        ranked = scores if bias is None else [s + b for s, b in zip(scores, bias.tolist(), strict=True)]
        allowed = range(config.n_routed_experts)
        if config.topk_method != "greedy":
            tops = 2 if config.topk_method == "noaux_tc" else 1
            strength = [sum(sorted(ranked[g * size : (g + 1) * size])[-tops:]) for g in range(config.n_group)]
            kept = sorted(range(config.n_group), key=strength.__getitem__)[-config.topk_group :]
            allowed = [e for e in allowed if e // size in kept]
        chosen = sorted(allowed, key=ranked.__getitem__)[-config.num_experts_per_tok :]
        total = sum(scores[e] for e in chosen) if config.norm_topk_prob else 1.0
        result.append({e: scores[e] / total * config.routed_scaling_factor for e in chosen})
    return result


@pytest.mark.parametrize("shift", [0.0, -2.0], ids=["", "all biased scores negative"])
@pytest.mark.parametrize("config", [GREEDY, GROUPED, NOAUX], ids=["greedy", "group_limited_greedy", "noaux_tc"])
def test_router(config: DeepseekConfig, shift: float) -> None:
    x, weight = randn(200, config.hidden_size), randn(config.n_routed_experts, config.hidden_size, seed=1) * 0.3
    bias = 0.3 * randn(config.n_routed_experts, seed=2) + shift if config.topk_method == "noaux_tc" else None
    routing = OPS.router(x, weight, bias, config)
    assert routing.weights.dtype == torch.float32
    expected = routed_by_hand(x, weight, bias, config)
    for experts, weights, wanted in zip(routing.experts.tolist(), routing.weights.tolist(), expected, strict=True):
        assert dict(zip(experts, weights, strict=True)) == pytest.approx(wanted, rel=1e-4)


def test_router_multiplies_in_float32_whatever_the_activations_are() -> None:
    x, weight = randn(64, CONFIG.hidden_size).bfloat16(), randn(12, CONFIG.hidden_size, seed=1) * 0.3
    found, exact = OPS.router(x, weight, None, CONFIG), OPS.router(x.float(), weight, None, CONFIG)
    assert torch.equal(found.experts, exact.experts)
    assert torch.equal(found.weights, exact.weights)


def experts_of(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, SwigluWeights]:
    hidden, width, num = CONFIG.hidden_size, CONFIG.moe_intermediate_size, CONFIG.n_routed_experts
    gate_up, down = randn(num, 2 * width, hidden, seed=3) * 0.2, randn(num, hidden, width, seed=4) * 0.3
    shared_gate_up = torch.cat((randn(width, hidden, seed=5), randn(width, hidden, seed=6))) * 0.2
    shared_down = randn(hidden, width, seed=7) * 0.3
    return gate_up.to(dtype), down.to(dtype), SwigluWeights(shared_gate_up.to(dtype), shared_down.to(dtype))


def moe_by_hand(x: Tensor, routing: Routing, gate_up: Tensor, down: Tensor, shared: SwigluWeights | None) -> Tensor:
    x, gate_up, down = x.double(), gate_up.double(), down.double()
    silu = torch.nn.functional.silu
    result = torch.zeros_like(x)
    for token in range(len(x)):
        for expert, weight in zip(routing.experts[token].tolist(), routing.weights[token].double(), strict=True):
            gate, up = (gate_up[expert] @ x[token]).chunk(2)
            result[token] += weight * (down[expert] @ (silu(gate) * up))
        if shared is not None:
            s_gate, s_up = unpacked(shared.gate_up).double().chunk(2)
            s_down = unpacked(shared.down).double()
            result[token] += s_down @ (silu(s_gate @ x[token]) * (s_up @ x[token]))
    return result


@pytest.mark.parametrize("num_tokens", [1, 2, 9, 130])
@pytest.mark.parametrize("with_shared", [True, False])
def test_moe(num_tokens: int, with_shared: bool) -> None:
    x = randn(num_tokens, CONFIG.hidden_size)
    gate_up, down, shared_weights = experts_of()
    shared = shared_weights if with_shared else None
    routing = OPS.router(x, randn(CONFIG.n_routed_experts, CONFIG.hidden_size, seed=1), None, CONFIG)
    found = OPS.moe(x, routing, SwigluWeights(gate_up, down), shared, torch.zeros_like(x))
    assert (found - moe_by_hand(x, routing, gate_up, down, shared)).abs().max() < 1e-4


def test_moe_runs_only_the_experts_that_are_hit() -> None:
    """Experts nobody is routed to are not read: their weights may be anything."""
    gate_up, down, _ = experts_of()
    gate_up[5:], down[5:] = torch.nan, torch.nan
    routing = Routing(torch.tensor([[0, 2, 4], [4, 1, 0]]), torch.full((2, 3), 0.5))
    x = randn(2, CONFIG.hidden_size)
    found = OPS.moe(x, routing, SwigluWeights(gate_up, down), None, torch.zeros_like(x))
    assert (found - moe_by_hand(x, routing, gate_up, down, None)).abs().max() < 1e-4


def test_moe_sums_experts_in_float32() -> None:
    """Two experts that cancel each other: a bfloat16 sum would lose the third."""
    gate_up, down, _ = experts_of(torch.bfloat16)
    gate_up[1], down[1] = gate_up[0], -down[0]
    routing = Routing(torch.tensor([[0, 2, 1]]), torch.tensor([[1000.0, 1.0, 1000.0]]))
    x = randn(1, CONFIG.hidden_size).bfloat16()
    third = Routing(torch.tensor([[2]]), torch.ones(1, 1))
    only = OPS.moe(x, third, SwigluWeights(gate_up, down), None, torch.zeros_like(x))
    found = OPS.moe(x, routing, SwigluWeights(gate_up, down), None, torch.zeros_like(x))
    assert found.dtype == torch.bfloat16
    assert (found - only).abs().max() <= 0.01 * only.abs().max()


def test_mlp() -> None:
    _, _, weights = experts_of()
    x = randn(3, CONFIG.hidden_size)
    none = Routing(torch.zeros(3, 0, dtype=torch.int64), torch.zeros(3, 0))
    expected = moe_by_hand(x, none, *experts_of()[:2], weights)
    assert (OPS.mlp(x, weights, torch.zeros_like(x)) - expected).abs().max() < 1e-5
