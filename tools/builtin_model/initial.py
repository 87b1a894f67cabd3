"""The weights that training starts from: normal ones, and heads that match text with its earlier copy.

Copying and recall do not form by themselves within the tokens that a small computer can train on, so the heads they
need (induction heads, arXiv 2209.11895) are set by hand; nothing is frozen, and training is free to move them.

- A constant: column 0 of the embedding is the same for every token.
- Neighbour heads (layer 0): from that constant alone, the shared rope key and the rope queries of head n make an
  attention that looks n + 1 tokens back, whatever the tokens are. Each writes a code of the token that it finds into
  columns of its own, which the embedding leaves empty.
- Matching heads (head 0 of layers 1-4): the query is the code of the token so many places back, the key what a
  neighbour head wrote; what they find they write as it was embedded, so that the head's rows recognise it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import DeepseekConfig
from model.rotary import inverse_frequencies
from tools.builtin_model.layout import Layout, is_matrix

CONSTANT = 4.0
SHARED = 0.8
"""Of an embedding's variance, shared by tokens that are the same word: " Dublin", "Dublin", " dublin"."""
HEAD_SCALE = 0.02
NEIGHBOURS = 3
"""Layer 0's heads that look 1, 2, ... tokens back."""
NEIGHBOUR_PAIRS = 5
"""Pairs of rope dimensions they use: the shortest wavelengths."""
NEIGHBOUR_STRENGTH = 7.0
"""Length of their rope queries and keys in each pair."""
MATCH_SCALE = 3.0
MATCH_OUTPUT = 0.6


class Match(NamedTuple):
    """Head 0 of `layer` finds the tokens that have `key_back` tokens before them what the query has `query_back`."""

    layer: int
    query_back: int
    key_back: int


MATCHES = (Match(1, 0, 1), Match(2, 0, 1), Match(3, 1, 2), Match(4, 2, 3))
"""What follows the same token (twice); the value after "key separator"; the value after "key word separator"."""


def write_initial(config: DeepseekConfig, layout: Layout, flat: Tensor, texts: Sequence[str], seed: int) -> None:
    """Fills the buffer [layout.size]; `texts` are the tokens' texts, by id."""
    generator = torch.Generator().manual_seed(seed)
    weights = layout.views(flat)
    for name, weight in weights.items():
        if name.endswith("norm"):
            weight.fill_(1.0)
        elif is_matrix(name) or name.endswith(".gate"):
            residual = name.endswith(("o_proj", "down_proj"))
            gain = 1 / math.sqrt(2 * config.num_hidden_layers) if residual else 1.0
            weight.normal_(0.0, gain / math.sqrt(weight.shape[-1]), generator=generator)
    weights["embed_tokens"].copy_(_embedding(texts, config, generator))
    weights["lm_head"].copy_(HEAD_SCALE * weights["embed_tokens"])
    weights["lm_head"][:, 0] = 0.0
    layers = [_Attention(config, weights, layer) for layer in range(config.num_hidden_layers)]
    _set_neighbours(config, layers[0])
    for match in MATCHES:
        _set_match(config, layers[0], layers[match.layer], match)


def _columns(config: DeepseekConfig, back: int) -> slice:
    """Where the neighbour head writes that looks so many tokens back."""
    width = config.v_head_dim
    return slice(1 + (back - 1) * width, 1 + back * width)


def _num_reserved(config: DeepseekConfig) -> int:
    """Columns in front that say nothing of the token itself: the constant's and the neighbour heads'."""
    return 1 + NEIGHBOURS * config.v_head_dim


def _embedding(texts: Sequence[str], config: DeepseekConfig, generator: torch.Generator) -> Tensor:
    """[tokens, D] of unit variance; what cannot be decoded or is empty is a word of its own."""
    words: dict[str, int] = {}
    numbers = []
    for token, text in enumerate(texts):
        word = text.strip().lower()
        numbers.append(words.setdefault(word if word and "\ufffd" not in word else f"\0{token}", len(words)))
    shared = torch.randn(len(words), config.hidden_size, generator=generator)[numbers]
    own = torch.randn(len(texts), config.hidden_size, generator=generator)
    embedding = math.sqrt(SHARED) * shared + math.sqrt(1 - SHARED) * own
    reserved = _num_reserved(config)
    embedding[:, :reserved] = 0.0
    # All equally long: else the norm would make another constant of every token's.
    embedding *= math.sqrt(config.hidden_size - reserved) / embedding.norm(dim=1, keepdim=True)
    embedding[:, 0] = CONSTANT
    return embedding


class _Attention:
    """One layer's attention weights as views: by head where there are heads."""

    def __init__(self, config: DeepseekConfig, weights: dict[str, Tensor], layer: int) -> None:
        name, heads, nope = f"layers.{layer}.self_attn", config.num_attention_heads, config.qk_nope_head_dim
        query = weights[f"{name}.q_proj"].view(heads, -1, config.hidden_size)
        self.nope_query, self.rope_query = query[:, :nope], query[:, nope:]
        compress = weights[f"{name}.kv_a_proj_with_mqa"]
        self.latent, self.rope_key = compress[: config.kv_lora_rank], compress[config.kv_lora_rank :]
        expand = weights[f"{name}.kv_b_proj"].view(heads, -1, config.kv_lora_rank)
        self.key, self.value = expand[:, :nope], expand[:, nope:]
        self.output = weights[f"{name}.o_proj"].view(config.hidden_size, heads, -1).transpose(0, 1)

    def reads(self, head: int) -> Tensor:
        """[v, D]: the head's value as a function of the layer's input, the latent norm apart; unit rows."""
        return _unit_rows(self.value[head] @ self.latent)


def _unit_rows(matrix: Tensor) -> Tensor:
    return F.normalize(matrix, dim=1)


def _set_neighbours(config: DeepseekConfig, layer: _Attention) -> None:
    """A rope query turned n tokens back meets the key of the token n places before: a^2 cos(0) in every pair."""
    used, reserved = 2 * NEIGHBOUR_PAIRS, _num_reserved(config)
    # The norm before the layer divides by the embedding's root mean square.
    mean_square = (CONSTANT**2 + config.hidden_size - reserved) / config.hidden_size
    gain = NEIGHBOUR_STRENGTH / CONSTANT * math.sqrt(mean_square)
    angles = inverse_frequencies(config.rope, config.qk_rope_head_dim)[:NEIGHBOUR_PAIRS]
    layer.latent[:, :reserved] = 0.0
    layer.rope_key[:used] = 0.0
    layer.rope_key[0:used:2, 0] = gain
    layer.rope_query[:NEIGHBOURS] *= 0.1
    layer.rope_query[NEIGHBOURS:, :used] *= 0.1
    for head in range(NEIGHBOURS):
        back = head + 1
        layer.rope_query[head, :used] = 0.0
        layer.rope_query[head, 0:used:2, 0] = gain * (back * angles).cos()
        layer.rope_query[head, 1:used:2, 0] = -gain * (back * angles).sin()
        layer.nope_query[head] *= 0.1
        layer.value[head] = layer.value[0]
        layer.output[head] = 0.0
        layer.output[head, _columns(config, back)] = torch.eye(config.v_head_dim)


def _set_match(config: DeepseekConfig, neighbours: _Attention, layer: _Attention, match: Match) -> None:
    """Half of the latent carries the key, the other half the value: they share nothing."""
    half = config.v_head_dim
    identity = torch.eye(half)
    layer.nope_query[0] = 0.0
    if match.query_back:
        layer.nope_query[0, :, _columns(config, match.query_back)] = identity
    else:
        layer.nope_query[0] = neighbours.reads(0)
    layer.rope_query[0] *= 0.1
    layer.latent[:, : _num_reserved(config)] = 0.0
    layer.latent[:half] = 0.0
    layer.latent[:half, _columns(config, match.key_back)] = identity
    layer.key[0] = 0.0
    layer.key[0, :, :half] = MATCH_SCALE * identity
    layer.value[0, :, :half] = 0.0
    layer.output[0] = MATCH_OUTPUT * layer.reads(0).T
