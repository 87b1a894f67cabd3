"""What the benchmarks are run on: checkpoints of made-up weights that are what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.make_checkpoint import SHAPES, make
from model.checkpoint import open_checkpoint
from model.config import load_config
from server.tokenizer import load_tokenizer
from tests.checkpoints import read_tensors
from tests.model.harness import Driver, load_model, random_tokens

SMALL = {
    "vocab_size": 4200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
}


def checkpoint(folder: Path, **overrides: Any) -> Path:
    assert make(folder, SHAPES["lite"] | SMALL | overrides, shard_bytes=300_000) == 0
    return folder


@pytest.mark.parametrize(("shape", "billions", "active"), [("lite", 15.7, 2.45), ("narrow", 1.24, 0.48)])
def test_the_shapes_have_the_parameters_they_are_named_for(
    shape: str, billions: float, active: float, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPES[shape]))
    config = load_config(tmp_path)
    assert config.num_parameters() / 1e9 == pytest.approx(billions, rel=0.01)
    assert config.num_active_parameters() / 1e9 == pytest.approx(active, rel=0.02)


def test_a_made_checkpoint_is_a_checkpoint(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    config = load_config(path)
    opened = open_checkpoint(path, config)
    assert len(opened.by_file()) > 2
    assert opened.weight_bytes == 2 * config.num_parameters()
    for name, tensor in read_tensors(path).items():
        assert tensor.isfinite().all(), name
        if tensor.dim() == 2 and tensor.numel() > 4000:
            assert len(tensor.unique(dim=0)) == len(tensor), name


def test_its_answers_are_neither_all_alike_nor_uniform(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    logprobs = Driver(load_model(path)).run(random_tokens(100, 4000), 100)
    assert len(logprobs.argmax(-1).unique()) > 60
    entropy = -(logprobs.exp() * logprobs).sum(-1).mean()
    assert 1 < entropy < torch.tensor(4200.0).log() - 1


def test_its_tokenizer_knows_every_id(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    tokenizer = load_tokenizer(path, 4200)
    texts = {tokenizer.token_bytes(i).decode() for i in range(4096, 4200)}
    assert len(texts) == 104
    assert all(text.strip().isalpha() for text in texts)


def test_a_full_disk_is_said_before_any_weight_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("benchmarks.make_checkpoint.shutil.disk_usage", lambda folder: usage)
    assert make(tmp_path, SHAPES["lite"] | SMALL) == 1
    assert "0.0 GB are free" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.safetensors"))
