"""The network as it is trained: whole windows of documents, every weight an argument, made for `torch.compile`.

The same function as `model/deepseek.py` computes with its cache (a test compares them through the exported file).
Windows hold several documents; the attention of a token ends at the start of its own. B windows of T tokens,
D hidden_size, H heads, E experts; matrix products are of `dtype`, the residual stream and the router float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from model.config import DeepseekConfig
from model.rotary import inverse_frequencies
from tools.builtin_model.layout import Weights
from tools.builtin_model.windows import Batch

LATENT_NORM_EPS = 1e-6
BALANCE_WEIGHT = 0.01
"""Of the load-balance loss (Switch Transformer, arXiv 2101.03961, 2.2), a layer: even routing costs 1."""
QUERY_CHUNK = 256
"""Queries attend in chunks, each to the keys up to its end: without this half of the products would be masked."""


class _Permuted(torch.autograd.Function):
    """x[order], with a gather for its gradient too: autograd cannot know that no row is taken twice."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x[order]

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return gradient[inverse], None, None


def _permuted(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    result: Tensor = _Permuted.apply(x, order, inverse)  # type: ignore[no-untyped-call]
    return result


def grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x [N, in], whose rows up to ends[e] (int32) belong to expert e; weight [E, out, in] -> [N, out]."""
    if x.dtype == torch.bfloat16 and hasattr(torch, "_grouped_mm"):
        product: Tensor = torch._grouped_mm(x, weight.transpose(1, 2), offs=ends)
        return product
    parts = x.tensor_split(ends[:-1].tolist())
    return torch.cat([F.linear(part, matrix) for part, matrix in zip(parts, weight, strict=True)])


class Network:
    def __init__(self, config: DeepseekConfig, dtype: torch.dtype) -> None:
        self.config, self.dtype = config, dtype
        positions = torch.arange(config.max_position_embeddings, dtype=torch.float32)
        angles = positions[:, None] * inverse_frequencies(config.rope, config.qk_rope_head_dim)
        # Only distances count, so a window's positions may run on through its documents.
        self.cos, self.sin = angles.cos(), angles.sin()

    def loss(self, weights: Weights, batch: Batch, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is minimised, the weighted mean of the targets' negative log-likelihood, the mean balance loss."""
        hidden, balance = self.hidden(weights, batch.token_ids, bias)
        logits = self.logits(weights, hidden.flatten(0, 1)[batch.positions])
        losses = F.cross_entropy(logits.float(), batch.targets, reduction="none")
        likelihood = (losses * batch.weights).sum() / batch.weights.sum().clamp(min=1.0)
        return likelihood + BALANCE_WEIGHT * balance, likelihood.detach(), balance.detach() / self.config.num_moe_layers

    def hidden(self, weights: Weights, token_ids: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """token_ids [B, T], bias [B, 1, T, T] of `attention_bias` -> [B, T, D] and the sum of the balance losses."""
        h = F.embedding(token_ids, weights["embed_tokens"])
        balance = h.new_zeros(())
        for layer in range(self.config.num_hidden_layers):
            name = f"layers.{layer}"
            h = h + self.attention(weights, layer, self.norm(h, weights[f"{name}.input_layernorm"]), bias)
            x = self.norm(h, weights[f"{name}.post_attention_layernorm"])
            if self.config.is_moe_layer(layer):
                y, layer_balance = self.mixture(weights, f"{name}.mlp", x.flatten(0, 1))
                h, balance = h + y.view_as(h), balance + layer_balance
            else:
                h = h + self.swiglu(weights, f"{name}.mlp", x)
        return self.norm(h, weights["norm"]), balance

    def logits(self, weights: Weights, hidden: Tensor) -> Tensor:
        """[S, D] -> [S, vocab_size]."""
        return self.linear(hidden, weights["lm_head"])

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x.to(self.dtype), weight.to(self.dtype))

    def norm(self, x: Tensor, gain: Tensor, eps: float | None = None) -> Tensor:
        x = x.float()
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + (self.config.rms_norm_eps if eps is None else eps))
        return (x * scale * gain).to(self.dtype)

    def rotated(self, x: Tensor) -> Tensor:
        """x [..., T, dim]: neighbours (x[2i], x[2i + 1]) are turned by position times frequency i."""
        length = x.shape[-2]
        cos, sin = self.cos[:length], self.sin[:length]
        first, second = x.float().view(*x.shape[:-1], -1, 2).unbind(-1)
        turned = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1)
        return turned.flatten(-2).to(self.dtype)

    def projections(self, weights: Weights, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, D], normed -> queries (times the softmax scale), keys and values [B, H, T, head dim]."""
        config, name = self.config, f"layers.{layer}.self_attn"
        batch, length, _ = x.shape
        heads, nope = config.num_attention_heads, config.qk_nope_head_dim

        def by_head(y: Tensor) -> Tensor:
            return y.view(batch, length, heads, -1).transpose(1, 2)

        queries = by_head(self.linear(x, weights[f"{name}.q_proj"]))
        compressed = self.linear(x, weights[f"{name}.kv_a_proj_with_mqa"])
        latent = compressed[..., : config.kv_lora_rank]
        latent = self.norm(latent, weights[f"{name}.kv_a_layernorm"], LATENT_NORM_EPS)
        shared_key = self.rotated(compressed[:, None, :, config.kv_lora_rank :])
        expanded = by_head(self.linear(latent, weights[f"{name}.kv_b_proj"]))
        queries = torch.cat((queries[..., :nope], self.rotated(queries[..., nope:])), dim=-1)
        keys = torch.cat((expanded[..., :nope], shared_key.expand(-1, heads, -1, -1)), dim=-1)
        return queries * config.softmax_scale, keys, expanded[..., nope:]

    def attention(self, weights: Weights, layer: int, x: Tensor, bias: Tensor) -> Tensor:
        """x [B, T, D], normed -> [B, T, D]."""
        queries, keys, values = self.projections(weights, layer, x)
        length, outputs = x.shape[1], []
        for start in range(0, length, QUERY_CHUNK):
            stop = min(start + QUERY_CHUNK, length)
            scores = queries[:, :, start:stop] @ keys[:, :, :stop].transpose(2, 3)
            shares = (scores + bias[:, :, start:stop, :stop]).softmax(-1)
            outputs.append(shares @ values[:, :, :stop])
        attended = torch.cat(outputs, dim=2).transpose(1, 2).flatten(2)
        return self.linear(attended, weights[f"layers.{layer}.self_attn.o_proj"])

    def swiglu(self, weights: Weights, name: str, x: Tensor) -> Tensor:
        gate, up = self.linear(x, weights[f"{name}.gate_up_proj"]).chunk(2, dim=-1)
        return self.linear(F.silu(gate) * up, weights[f"{name}.down_proj"])

    def mixture(self, weights: Weights, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, D] -> [N, D] and the layer's balance loss. Pairs of token and expert are sorted by expert."""
        experts, per_token = self.config.n_routed_experts, self.config.num_experts_per_tok
        scores = F.linear(x.float(), weights[f"{name}.gate"]).softmax(-1)
        shares, chosen = scores.topk(per_token, dim=-1)
        chosen = chosen.flatten()
        counts = (chosen[:, None] == torch.arange(experts)).sum(0)
        balance = experts * (counts / len(chosen) * scores.mean(0)).sum()
        ends = counts.cumsum(0).to(torch.int32)
        order = chosen.argsort()
        inverse = torch.empty_like(order).scatter(0, order, torch.arange(len(order)))
        pairs = _permuted(x[:, None].expand(-1, per_token, -1).flatten(0, 1), order, inverse)
        up_weight = weights[f"{name}.experts.gate_up_proj"].to(self.dtype)
        down_weight = weights[f"{name}.experts.down_proj"].to(self.dtype)
        gate, up = grouped_product(pairs, up_weight, ends).chunk(2, dim=-1)
        results = _permuted(grouped_product(F.silu(gate) * up, down_weight, ends), inverse, order)
        routed = (results.view(len(x), per_token, -1) * shares[..., None]).sum(1)
        return routed + self.swiglu(weights, f"{name}.shared_experts", x), balance


def attention_bias(documents: Tensor, dtype: torch.dtype) -> Tensor:
    """documents [B, T] (the number of each token's document) -> [B, 1, T, T]: 0, and -inf where none may look.

    Made outside of what is compiled, which would compare the numbers anew in every layer.
    """
    allowed = (documents[:, :, None] == documents[:, None, :]).tril()
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, float("-inf"))[:, None]
