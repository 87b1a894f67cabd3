"""What a training run reads and keeps: the data folder opened, and `state.pt` in the run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from model.config import DeepseekConfig
from tools.builtin_model import tokenizer as tokenizers
from tools.builtin_model.layout import Layout, hub_weights, make_layout
from tools.builtin_model.shape import hub_config, read_config
from tools.builtin_model.windows import Mix, load_mix

MIXES = ("short", "copy", "long", "recall", "val")


@dataclass(frozen=True)
class Data:
    tokenizer: Tokenizer
    config: DeepseekConfig
    layout: Layout
    mixes: dict[str, Mix]

    @property
    def texts(self) -> list[str]:
        """The tokens' texts, by id."""
        return [self.tokenizer.decode([token], skip_special_tokens=False) for token in range(self.config.vocab_size)]


@dataclass(frozen=True)
class State:
    """The optimiser's own state is not kept: after a new warm-up a run goes on as if it had been."""

    weights: Tensor
    average: Tensor
    tokens: int


def token_ids_of(tokenizer: Tokenizer) -> tuple[int, int]:
    """Begin and end token."""
    vocabulary = tokenizer.get_vocab()
    return vocabulary[tokenizers.BOS], vocabulary[tokenizers.EOS]


def open_data(folder: Path) -> Data:
    tokenizer = tokenizers.load(folder)
    bos, eos = token_ids_of(tokenizer)
    config = read_config(hub_config(bos, eos, vocab_size=tokenizer.get_vocab_size()))
    return Data(tokenizer, config, make_layout(config), {name: load_mix(folder, name, bos) for name in MIXES})


def read_checkpoint(folder: Path, layout: Layout, flat: Tensor) -> None:
    """Fills the buffer [layout.size] with an exported checkpoint's weights."""
    tensors = load_file(folder / "model.safetensors")
    for name, view in hub_weights(layout.views(flat)).items():
        view.copy_(tensors[name])


def load_state(run: Path) -> State:
    return State(**torch.load(run / "state.pt", weights_only=True))


def save_state(run: Path, state: State) -> None:
    """Whole or not at all."""
    new = run / "state.pt.new"
    torch.save({"weights": state.weights, "average": state.average, "tokens": state.tokens}, new)
    new.replace(run / "state.pt")
