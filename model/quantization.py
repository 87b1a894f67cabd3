"""fp8 weights of published checkpoints: e4m3 numbers with a scale for each block (DeepSeek-V3, arXiv 2412.19437, 3.3).

They are computed with in the run dtype, which holds every e4m3 number exactly; `--quantization` rounds them again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.checkpoint import TensorInfo
from model.config import CheckpointError

_DTYPES = {"F32": torch.float32, "F8_E8M0": torch.float8_e8m0fnu}


def apply_scales(weight: Tensor, scale: TensorInfo, block: tuple[int, int]) -> None:
    """weight [N, K], the numbers as they are in the file, times the scale of their block: in float32, rounded once.

    Blocks of `block` rows and columns begin at the first row and column; those at the end may be cut. Raises
    CheckpointError for a scale that is not finite and for a file that has shrunk since its header was read.
    """
    rows, columns = block
    scales = _read(scale).to(weight.device)
    for number, row_of_scales in enumerate(scales):
        some = weight[number * rows : (number + 1) * rows]
        some.copy_(some.float() * row_of_scales.repeat_interleave(columns)[: weight.shape[1]])


def _read(scale: TensorInfo) -> Tensor:
    """[blocks of rows, blocks of columns] float32"""
    try:
        with scale.file.open("rb") as stream:
            stream.seek(scale.start)
            content = bytearray(stream.read(scale.nbytes))
    except OSError as error:
        raise CheckpointError(f"{scale.file}: {error.strerror}") from None
    if len(content) < scale.nbytes:
        raise CheckpointError(f"{scale.file}: has shrunk since its header was read")
    scales = torch.frombuffer(content, dtype=_DTYPES[scale.dtype]).float().view(scale.shape)
    if not bool(scales.isfinite().all()):
        raise CheckpointError(f"{scale.file}: tensor {scale.name}: has values that are not finite")
    return scales
