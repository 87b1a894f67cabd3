"""Writes a run's averaged weights as an ordinary checkpoint folder, and proves that the file computes the same."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.config import DeepseekConfig, expected_tensors
from model.reference import reference_logits
from tools.builtin_model.layout import Layout, Weights, hub_weights
from tools.builtin_model.network import Network, attention_bias
from tools.builtin_model.shape import hub_config
from tools.builtin_model.state import load_state, open_data, token_ids_of
from tools.builtin_model.windows import Mix

CHECKED_DOCUMENTS = 50
TOLERANCE = 2e-3
"""Largest difference of two float32 logits: both round, in another order."""
FLIPPED_DOCUMENTS = 2
"""So many may be further apart: where two experts are all but tied, rounding decides which one a token goes to."""
GENERATION = {"do_sample": True, "temperature": 0.3, "top_p": 0.9, "max_new_tokens": 256}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, help="folder that `data` wrote")
    parser.add_argument("--run", type=Path, required=True, help="folder that `train` wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")


def run(arguments: argparse.Namespace) -> None:
    data, state = open_data(arguments.data), load_state(arguments.run)
    write_checkpoint(arguments.out, data.config, data.layout, state.average, *token_ids_of(data.tokenizer))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(arguments.data / name, arguments.out / name)
    worst = check_checkpoint(arguments.out, data.config, data.layout, state.average, data.mixes["val"])
    print(f"{arguments.out}: {state.tokens:,} tokens of training; logits within {worst:.1e} of the reference")


def write_checkpoint(folder: Path, config: DeepseekConfig, layout: Layout, average: Tensor, bos: int, eos: int) -> None:
    """config.json, generation_config.json and model.safetensors (bfloat16)."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", hub_config(bos, eos, vocab_size=config.vocab_size))
    _write_json(folder / "generation_config.json", {"bos_token_id": bos, "eos_token_id": eos} | GENERATION)
    weights = {
        name: tensor.to(torch.bfloat16).contiguous().clone()
        for name, tensor in hub_weights(layout.views(average)).items()
    }
    expected = expected_tensors(config)
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == expected
    file = folder / "model.safetensors"
    save_file({name: weights[name] for name in expected}, file, metadata={"format": "pt"})
    file.chmod(0o644)


@torch.inference_mode()
def check_checkpoint(folder: Path, config: DeepseekConfig, layout: Layout, average: Tensor, documents: Mix) -> float:
    """The largest difference between the training network's logits and those that the reference computes from the
    file, in float32 and over the first documents; raises where it is too large in more than `FLIPPED_DOCUMENTS` or
    another token is the likeliest."""
    stored = load_file(folder / "model.safetensors")
    rounded: Weights = layout.views(average.to(torch.bfloat16).float())
    network, worst, flipped = Network(config, torch.float32), 0.0, 0
    for start, stop in list(zip(documents.starts, documents.starts[1:], strict=False))[:CHECKED_DOCUMENTS]:
        tokens = documents.tokens[start:stop].tolist()
        hidden, _ = network.hidden(
            rounded, torch.tensor([tokens]), attention_bias(torch.zeros(1, len(tokens)), torch.float32)
        )
        ours, reference = network.logits(rounded, hidden[0]), reference_logits(config, stored, tokens)
        difference = (ours - reference).abs().max().item()
        flipped += difference > TOLERANCE
        best = reference.topk(2).values
        clear = best[:, 0] - best[:, 1] > 2 * difference
        if flipped > FLIPPED_DOCUMENTS or not torch.equal(ours.argmax(-1)[clear], reference.argmax(-1)[clear]):
            raise SystemExit(f"{folder}: the file computes other logits than the training network, by {difference:.1e}")
        worst = max(worst, difference)
    return worst


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
