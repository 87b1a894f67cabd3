"""The tensors of a checkpoint, read one at a time and converted piece by piece.

What is resident while a network is made is the network and the tensors it is just packing. Files are read rather than
mapped: one that shrinks meanwhile is an error then, not the end of the process.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor
from tqdm import tqdm

from model.checkpoint import FP8, Checkpoint, TensorInfo
from model.config import CheckpointError
from model.ops.interface import LinearWeight
from model.quantization import apply_scales

logger = logging.getLogger(__name__)

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, FP8: torch.float8_e4m3fn}
_PIECE_BYTES = 2 << 20
_AHEAD_BYTES = 64 << 20
"""What the disk is asked for while the tensors before it are packed."""


class CheckpointWeights(AbstractContextManager["CheckpointWeights"]):
    """`model.deepseek.Weights` from a checkpoint. A context manager: at its end the files are closed."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        progress: bool,
        kept: Mapping[str, Sequence[LinearWeight]] | None = None,
    ) -> None:
        """`dtype` is the run dtype. `kept`, by name, was packed at an earlier start: what it was made of is not read.

        With `progress`, unless much was kept, a terminal gets a bar and the log else a line every tenth of the bytes.
        """
        if dtype is torch.float16 and checkpoint.config.model_type == "deepseek_v2":
            logger.warning("float16 overflows in deep DeepSeek-V2 models; bfloat16 has the range they need")
        self.made: dict[str, Sequence[LinearWeight]] = {}
        """What was packed, by name."""
        self._checkpoint, self._dtype, self._device, self._kept = checkpoint, dtype, device, kept or {}
        self._files: dict[Path, BinaryIO] = {}
        self._buffer = torch.empty(_PIECE_BYTES, dtype=torch.uint8)
        self._progress = Progress(checkpoint.weight_bytes, f"Loading weights to {device.type}", progress and not kept)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.close()
        for file in self._files.values():
            file.close()

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor by the hub's name, the caller's own, in `dtype` or else the run dtype.

        Raises CheckpointError for a tensor with a value that is not finite and for a file that has shrunk since
        its header was read.
        """
        tensor = self._checkpoint.tensors[name]
        if tensor.file not in self._files:
            self._files[tensor.file] = _open(tensor.file)
        target = torch.empty(tensor.shape, dtype=dtype or self._dtype, device=self._device)
        _fill(target, self._files[tensor.file], tensor, self._buffer)
        if tensor.scale is not None and self._checkpoint.config.fp8_block is not None:
            apply_scales(target, tensor.scale, self._checkpoint.config.fp8_block)
        self._progress.add(tensor.nbytes)
        return target

    def packed(self, name: str, pack: Callable[[], Sequence[LinearWeight]]) -> Sequence[LinearWeight]:
        if name in self._kept:
            return self._kept[name]
        self.made[name] = pack()
        return self.made[name]


class Progress:
    """How much has been read: a bar on a terminal, else a line in the log every tenth."""

    def __init__(self, total: int, title: str, shown: bool) -> None:
        self._total, self._title, self._done = total, title, 0
        self._lines = shown and not sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            desc=title,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            file=sys.stderr,
            disable=not shown or self._lines,
        )

    def add(self, size: int) -> None:
        before, self._done = self._done, self._done + size
        self._bar.update(size)
        if self._lines and 10 * before // self._total < 10 * self._done // self._total:
            logger.info("%s: %d %%", self._title, 100 * self._done // self._total)

    def close(self) -> None:
        self._bar.close()


def _open(file: Path) -> BinaryIO:
    try:
        return file.open("rb", buffering=0)
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from None


def _fill(target: Tensor, stream: BinaryIO, tensor: TensorInfo, buffer: Tensor) -> None:
    """Reads one tensor piece by piece: in place, or, where its type or device differs, by way of the buffer."""
    os.posix_fadvise(stream.fileno(), tensor.end, _AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
    dtype = _DTYPES[tensor.dtype]
    buffered = buffer.view(dtype)
    in_place = target.dtype is dtype and target.device.type == "cpu"
    offset = tensor.start
    total = torch.zeros((), device=target.device)
    for piece in torch.split(target.view(-1), len(buffered)):
        source = piece if in_place else buffered[: len(piece)]
        if os.preadv(stream.fileno(), [source.view(torch.uint8).numpy().data], offset) != source.nbytes:
            raise CheckpointError(f"{tensor.file}: tensor {tensor.name}: the file has shrunk since its header was read")
        offset += source.nbytes
        if not in_place:
            piece.copy_(source)
        total += piece.sum(dtype=torch.float32)  # NaN and infinity stay; at a hundredth of what `isfinite` costs
    if not bool(torch.isfinite(total)) and not bool(torch.isfinite(target).all()):
        raise CheckpointError(f"{tensor.file}: tensor {tensor.name}: has values that are not finite")
