"""The built-in checkpoint is an ordinary, complete folder of the family, and says what it is."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, DeepseekV2ForCausalLM

import model
from model.checkpoint import open_checkpoint
from model.config import load_config

BUILTIN = Path(model.__file__).parent / "builtin"


def test_config_is_a_v2_of_a_few_megabytes() -> None:
    config = load_config(BUILTIN)
    assert config.model_type == "deepseek_v2"
    assert config.vocab_size == 3072
    assert config.max_position_embeddings == 8192
    assert config.rope.yarn is not None
    assert config.softmax_scale == pytest.approx((0.1 * math.log(8) + 1) ** 2 / math.sqrt(64))
    assert sum(path.stat().st_size for path in BUILTIN.iterdir()) < 4 << 20


def test_tensors_are_those_of_the_config() -> None:
    config = load_config(BUILTIN)
    checkpoint = open_checkpoint(BUILTIN, config)
    assert sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values()) == config.num_parameters()


def test_weights_keep_activations_in_scale() -> None:
    weights = load_file(BUILTIN / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert all(tensor.isfinite().all() for tensor in weights.values())
    torch.set_num_threads(1)
    network = DeepseekV2ForCausalLM.from_pretrained(BUILTIN, dtype=torch.float32)
    with torch.inference_mode():
        logits = network(torch.arange(100, 164)[None]).logits
    assert 1.0 < logits.std().item() < 10.0


def test_says_that_it_is_untrained() -> None:
    assert json.loads((BUILTIN / "config.json").read_text())["latentd_untrained"] is True
    assert "not trained" in (BUILTIN / "README.md").read_text()


def test_tokens_of_the_config_are_those_of_the_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN)
    config = load_config(BUILTIN)
    generation = json.loads((BUILTIN / "generation_config.json").read_text())
    assert len(tokenizer) == config.vocab_size
    assert (tokenizer.bos_token_id, (tokenizer.eos_token_id,)) == (config.bos_token_id, config.eos_token_ids)
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    # Digits are single tokens, and the space before a number is inside its first one.
    assert tokenizer.tokenize("12 345") == ["1", "2", "Ġ3", "4", "5"]
