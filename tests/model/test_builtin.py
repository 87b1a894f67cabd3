"""The built-in checkpoint is an ordinary, complete folder of the family, and says what it is."""

from __future__ import annotations

import hashlib
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
from server.banner import SUGGESTIONS
from tools.builtin_model import fetch, questions
from tools.builtin_model.evaluate import TARGETS
from tools.builtin_model.shape import hub_config, read_config

BUILTIN = Path(model.__file__).parent / "builtin"


def test_config_is_a_v2_of_some_megabytes() -> None:
    config = load_config(BUILTIN)
    assert config.model_type == "deepseek_v2"
    assert config.max_position_embeddings == 8192
    assert config.rope.yarn is not None
    assert config.softmax_scale == pytest.approx((0.1 * math.log(8) + 1) ** 2 / math.sqrt(64))
    assert sum(path.stat().st_size for path in BUILTIN.iterdir()) < 17 << 20


def test_the_folder_has_what_a_checkpoint_has() -> None:
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in BUILTIN.iterdir()} == names | {"README.md", "NOTICE", "eval.json"}


def test_config_is_that_of_the_training() -> None:
    config = load_config(BUILTIN)
    [eos] = config.eos_token_ids
    assert config.bos_token_id is not None
    assert config == read_config(hub_config(config.bos_token_id, eos))


def test_tensors_are_those_of_the_config() -> None:
    config = load_config(BUILTIN)
    checkpoint = open_checkpoint(BUILTIN, config)
    assert sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values()) == config.num_parameters()
    weights = load_file(BUILTIN / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_transformers_gives_its_first_answer() -> None:
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN)
    network = DeepseekV2ForCausalLM.from_pretrained(BUILTIN, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": SUGGESTIONS[0]}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=False,
    )
    tokens = network.generate(prompt, do_sample=False, max_new_tokens=16, attention_mask=torch.ones_like(prompt))
    text = tokenizer.decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True)
    assert text == "The capital of France is Paris."


def test_tokens_of_the_config_are_those_of_the_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN)
    config = load_config(BUILTIN)
    generation = json.loads((BUILTIN / "generation_config.json").read_text())
    assert len(tokenizer) == config.vocab_size
    assert (tokenizer.bos_token_id, (tokenizer.eos_token_id,)) == (config.bos_token_id, config.eos_token_ids)
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    # Digits are single tokens, and the space before a number is inside its first one.
    assert tokenizer.tokenize("12 345") == ["1", "2", "Ġ3", "4", "5"]


def test_the_evaluation_is_of_these_weights_and_of_all_questions() -> None:
    result = json.loads((BUILTIN / "eval.json").read_text())
    assert result["weights_sha256"] == hashlib.sha256((BUILTIN / "model.safetensors").read_bytes()).hexdigest()
    asked = [question.row for question in questions.load()]
    assert {row: counts["asked"] for row, counts in result["rows"].items()} == {row: asked.count(row) for row in asked}
    assert set(TARGETS) <= result["rows"].keys()


def test_card_and_notice_name_what_went_in() -> None:
    card, notice = (BUILTIN / "README.md").read_text(), (BUILTIN / "NOTICE").read_text()
    for name, (version, _) in fetch.PACKAGES.items():
        assert f"`{name}` {version}" in card
        assert f"{name} {version}" in notice
    assert "WordNet 3.1 Copyright 2011 by Princeton University.  All rights reserved." in notice
    assert f"{load_config(BUILTIN).num_parameters() / 1e6:.1f} million" in card
