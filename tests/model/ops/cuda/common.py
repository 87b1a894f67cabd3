"""What the kernels' tests share. bfloat16 is not among the dtypes of the interpreter, which computes it wrongly."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Relative, in the Frobenius norm, against the eager twin in float32 on the same rounded inputs."""


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def relative_error(found: Tensor, exact: Tensor) -> float:
    assert found.shape == exact.shape
    return float((found.float() - exact.float()).norm() / exact.float().norm())


def flash_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """`model.ops.cuda.cudnn.Attend` as torch has it on every CPU, for values as wide as keys only."""
    wide = torch.nn.functional.pad(v, (0, q.shape[2] - v.shape[2]))
    found, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(x.to("cpu").unsqueeze(0).transpose(1, 2) for x in (q, k, wide)), 0.0, causal, scale=scale
    )
    return found[0].transpose(0, 1)[..., : v.shape[2]].to(q.device), lse[0].to(q.device)


def small_pieces(monkeypatch: pytest.MonkeyPatch, piece: int, most: int, keys: int) -> None:
    """Of prompts as short as those of tests."""
    for name, number in (("PIECE", piece), ("MOST_OF_A_PIECE", most), ("PIECE_KEYS", keys)):
        monkeypatch.setattr(f"model.ops.cuda.mla_prefill.{name}", number)


class poisoned:  # noqa: N801, a verb
    """Within it, `torch.empty` and `torch.empty_like` give NaN and -1: what a kernel does not write shows."""

    def __enter__(self) -> None:
        self._makers = {name: getattr(torch, name) for name in ("empty", "empty_like")}
        for name, make in self._makers.items():
            setattr(torch, name, partial(_poison, make))

    def __exit__(self, *_: object) -> None:
        for name, make in self._makers.items():
            setattr(torch, name, make)


def _poison(make: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    tensor = make(*args, **kwargs)
    return tensor.fill_(torch.nan if tensor.is_floating_point() else -1)
