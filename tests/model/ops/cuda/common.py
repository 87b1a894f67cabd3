"""What the kernels' tests share. bfloat16 is not among the dtypes of the interpreter, which computes it wrongly."""

from __future__ import annotations

from typing import Any

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


class poisoned:  # noqa: N801, a verb
    """Within it, `torch.empty` gives NaN and -1: what a kernel does not write shows."""

    def __enter__(self) -> None:
        self._empty = torch.empty

        def empty(*args: Any, **kwargs: Any) -> Tensor:
            tensor = self._empty(*args, **kwargs)
            return tensor.fill_(torch.nan if tensor.is_floating_point() else -1)

        torch.empty = empty  # type: ignore[assignment]

    def __exit__(self, *_: object) -> None:
        torch.empty = self._empty
