"""The reference twin: what makes it worth comparing with. That it equals transformers is shown in test_fidelity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import DeepseekConfig, load_config
from model.reference import reference_logits
from tests.checkpoints import KINDS, make_checkpoint, random_weights, yarn
from tests.model.harness import random_tokens

TOKENS = random_tokens(96, 256)


def build(path: Path, kind: str, **overrides: Any) -> tuple[DeepseekConfig, dict[str, Tensor]]:
    config = load_config(make_checkpoint(path, kind, **overrides))
    return config, random_weights(config)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_float64_up_to_rounding(kind: str, tmp_path: Path) -> None:
    config, weights = build(tmp_path, kind)
    single, double = (reference_logits(config, weights, TOKENS, dtype) for dtype in (torch.float32, torch.float64))
    assert single.shape == (len(TOKENS), config.vocab_size)
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    assert (single - double).abs().max() < 1e-3


def test_a_token_changes_its_own_and_later_positions_only(tmp_path: Path) -> None:
    config, weights = build(tmp_path, "v3")
    changed = [*TOKENS[:50], (TOKENS[50] + 1) % 256, *TOKENS[51:]]
    difference = reference_logits(config, weights, TOKENS) - reference_logits(config, weights, changed)
    moved = difference.abs().amax(-1) > 1e-3
    assert not moved[:50].any()
    assert moved[50:].all()


@pytest.mark.parametrize(
    ("kind", "override"),
    [
        ("v2", {"rms_norm_eps": 0.01}),
        ("v2", {"rope_theta": 500.0}),
        ("v2", {"routed_scaling_factor": 1.5}),
        ("v2", {"norm_topk_prob": True}),
        ("v2", {"num_experts_per_tok": 3}),
        ("v2-yarn", {"rope_scaling": yarn(40, 1.0, 1.0)}),
        ("v2-yarn", {"rope_scaling": yarn(20, 0.707, 0.707)}),
        ("v2-yarn", {"rope_scaling": yarn(40, 0.707, 0.707, original_max_position_embeddings=4096)}),
        ("v2-grouped", {"topk_method": "greedy"}),
        ("v2-grouped", {"topk_group": 3}),
        ("v3", {"topk_group": 3}),
        ("v3", {"norm_topk_prob": False}),
        ("amp", {"rope_scaling": yarn(40, 0.5, 0.5)}),
    ],
    ids=str,
)
def test_every_number_of_the_config_moves_the_logits(kind: str, override: dict[str, Any], tmp_path: Path) -> None:
    """The test checkpoints are sensitive: a field that is misread shows far above the tolerance of 1e-4."""
    config, weights = build(tmp_path / "given", kind)
    other, _ = build(tmp_path / "other", kind, **override)
    difference = reference_logits(config, weights, TOKENS) - reference_logits(other, weights, TOKENS)
    assert difference.abs().max() > 0.05
