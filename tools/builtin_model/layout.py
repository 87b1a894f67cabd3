"""Where every weight lies in the one flat float32 buffer that the training processes share.

Weights are stacked as the network multiplies them: gate rows above up rows, all experts of a layer in one tensor.
What AdamW trains comes first, so that it is one slice; Muon trains the matrices behind it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import DeepseekConfig

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Layout:
    shapes: dict[str, tuple[int, ...]]
    """Name -> shape, in the order of the buffer; linear weights are [..., out, in]."""
    adamw_size: int
    """Elements in front that AdamW trains: embedding, head, routers and norms."""

    @property
    def size(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of a buffer [size], by name."""
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        parts = torch.split(flat, sizes)
        return {name: part.view(shape) for part, (name, shape) in zip(parts, self.shapes.items(), strict=True)}


def is_matrix(name: str) -> bool:
    """Whether Muon trains it: what maps activations to activations, the router apart."""
    return name.endswith(("_proj", "_mqa"))


def make_layout(config: DeepseekConfig) -> Layout:
    hidden, heads = config.hidden_size, config.num_attention_heads
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens": (config.vocab_size, hidden),
        "lm_head": (config.vocab_size, hidden),
        "norm": (hidden,),
    }

    def feed_forward(name: str, width: int, *stack: int) -> None:
        shapes[f"{name}.gate_up_proj"] = (*stack, 2 * width, hidden)
        shapes[f"{name}.down_proj"] = (*stack, hidden, width)

    for index in range(config.num_hidden_layers):
        layer = f"layers.{index}"
        shapes |= {
            f"{layer}.input_layernorm": (hidden,),
            f"{layer}.post_attention_layernorm": (hidden,),
            f"{layer}.self_attn.q_proj": (heads * config.qk_head_dim, hidden),
            f"{layer}.self_attn.kv_a_proj_with_mqa": (config.latent_dim, hidden),
            f"{layer}.self_attn.kv_a_layernorm": (config.kv_lora_rank,),
            f"{layer}.self_attn.kv_b_proj": (
                heads * (config.qk_nope_head_dim + config.v_head_dim),
                config.kv_lora_rank,
            ),
            f"{layer}.self_attn.o_proj": (hidden, heads * config.v_head_dim),
        }
        if config.is_moe_layer(index):
            shapes[f"{layer}.mlp.gate"] = (config.n_routed_experts, hidden)
            feed_forward(f"{layer}.mlp.experts", config.moe_intermediate_size, config.n_routed_experts)
            feed_forward(f"{layer}.mlp.shared_experts", config.n_shared_experts * config.moe_intermediate_size)
        else:
            feed_forward(f"{layer}.mlp", config.intermediate_size)
    shapes = dict(sorted(shapes.items(), key=lambda item: is_matrix(item[0])))
    return Layout(shapes, sum(math.prod(shape) for name, shape in shapes.items() if not is_matrix(name)))


def hub_weights(weights: Weights) -> dict[str, Tensor]:
    """The same weights one tensor a projection and expert, under the names of the published checkpoints."""
    return {name: tensor for stacked in weights.items() for name, tensor in _unstacked(*stacked)}


def _unstacked(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if tensor.dim() == 3:
        for expert, matrix in enumerate(tensor):
            yield from _unstacked(name.replace(".experts.", f".experts.{expert}."), matrix)
    elif name.endswith("gate_up_proj"):
        for part, matrix in zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True):
            yield from _unstacked(name.replace("gate_up_proj", part), matrix)
    else:
        yield ("" if name == "lm_head" else "model.") + name + ".weight", tensor
