"""Products with weights, which on a CPU may lie in oneDNN's own layout: at few rows it reads them two to three times as
fast as a plain tensor, which it would lay out anew in every call."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[T, in] times weight [out, in] transposed, plus bias: [T, out]."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]
    return F.linear(x, weight, bias)


def can_lay_out(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `lay_out` helps: for bfloat16 on a CPU that multiplies it."""
    return dtype is torch.bfloat16 and device.type == "cpu" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def lay_out(weight: Tensor) -> Tensor:
    """A copy of weight [out, in] in oneDNN's layout, for `linear` alone."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, 1)  # type: ignore[no-any-return]
