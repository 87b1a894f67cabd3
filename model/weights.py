"""Fills an allocated network from a checkpoint: mapped files, tensor by tensor, no second copy in memory.

A shard is mapped, each piece of a tensor is viewed in place and copied into its parameter (which converts it), and the
pages that were read are given back: resident memory while loading is the network and at most one piece more.
"""

from __future__ import annotations

import logging
import mmap
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from model.checkpoint import Checkpoint, TensorInfo
from model.config import CheckpointError

logger = logging.getLogger(__name__)

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PIECE_BYTES = 8 << 20
_EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.experts\.)(\d+)\.(gate|up|down)_proj\.weight")
"""A tensor of one expert in hub layout; the network holds the experts of a layer stacked."""


def load_weights(
    model: nn.Module,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    progress: bool,
    loaded: Callable[[str], None] = lambda name: None,
) -> None:
    """Fills every parameter of `model` from `checkpoint`, each exactly once.

    `model` was allocated in `dtype` on `device`; its parameters have the hub's names, except that a layer's routed
    experts are stacked: `experts.gate_up_proj` [E, 2I, D] (gate rows first) and `experts.down_proj` [E, D, I].
    A parameter's own type decides what its weights become: router weights and correction biases stay float32.
    `progress` draws a bar of bytes on stderr; `loaded` is called with the name of each parameter that is complete, and
    may take it away.

    Raises CheckpointError for a norm weight or bias that is not finite and for a file that has shrunk since its header
    was read, RuntimeError where model and checkpoint do not have the same tensors.
    """
    if dtype is torch.float16 and checkpoint.config.model_type == "deepseek_v2":
        logger.warning("float16 overflows in deep DeepSeek-V2 models; bfloat16 has the range they need")
    parameters = dict(model.state_dict())
    sizes = {name: parameter.numel() for name, parameter in parameters.items()}
    filled: Counter[str] = Counter()
    bar = tqdm(
        total=checkpoint.weight_bytes,
        desc=f"Loading weights to {device.type}",
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        file=sys.stderr,
        disable=not progress,
    )
    with bar, torch.no_grad():
        for file, tensors in checkpoint.by_file().items():
            tensors.sort(key=lambda tensor: tensor.start)
            with _map(file, tensors[-1].end) as mapping:
                for tensor in tensors:
                    name, target = _destination(tensor.name, parameters)
                    _copy(mapping, tensor, target)
                    filled[name] += target.numel()
                    bar.update(tensor.nbytes)
                    if filled[name] == sizes[name]:
                        del target, parameters[name]
                        loaded(name)
    unfilled = [name for name, size in sizes.items() if filled[name] != size]
    if unfilled:
        raise RuntimeError(f"parameters not filled exactly once: {', '.join(unfilled[:3])}")


def _map(file: Path, size: int) -> mmap.mmap:
    try:
        with file.open("rb") as stream:
            if os.fstat(stream.fileno()).st_size < size:  # reading past the end would kill the process
                raise CheckpointError(f"{file}: has shrunk since its header was read")
            # A private mapping: torch wants a writable buffer, and nothing is ever written to it.
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from None


def _destination(name: str, parameters: dict[str, Tensor]) -> tuple[str, Tensor]:
    """The parameter a tensor of the file belongs to, and the part of it that the tensor fills."""
    expert = _EXPERT.fullmatch(name)
    if expert is None:
        parameter_name = name
    else:
        parameter_name = expert[1] + ("down_proj" if expert[3] == "down" else "gate_up_proj")
    if parameter_name not in parameters:
        raise RuntimeError(f"the network has no parameter for tensor {name}")
    target = parameters[parameter_name]
    if expert is not None:
        target = target[int(expert[2])]
        if expert[3] != "down":
            target = target.chunk(2)[expert[3] == "up"]
    return parameter_name, target


def _copy(mapping: mmap.mmap, tensor: TensorInfo, target: Tensor) -> None:
    """Copies and converts one tensor piece by piece, giving the file's pages back behind it."""
    if target.shape != torch.Size(tensor.shape):
        raise RuntimeError(f"tensor {tensor.name} is {list(tensor.shape)}, its parameter {list(target.shape)}")
    dtype = _DTYPES[tensor.dtype]
    flat = target.view(-1)
    piece = _PIECE_BYTES // dtype.itemsize
    for first in range(0, flat.numel(), piece):
        count = min(piece, flat.numel() - first)
        offset = tensor.start + first * dtype.itemsize
        flat[first : first + count].copy_(torch.frombuffer(mapping, dtype=dtype, count=count, offset=offset))
        begin = offset - offset % mmap.PAGESIZE
        mapping.madvise(mmap.MADV_DONTNEED, begin, offset + count * dtype.itemsize - begin)
    if len(tensor.shape) == 1 and not bool(torch.isfinite(target).all()):
        raise CheckpointError(f"{tensor.file}: tensor {tensor.name}: has values that are not finite")
