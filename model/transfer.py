"""Numbers between host and device, without the host waiting for what the device is doing.

On a CPU both are the same memory, and nothing is copied.
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """On a GPU behind what was launched there before, from memory that the driver reads by itself."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class ToHost:
    """Tensors on their way to the host: on a GPU they set out when what was launched before this has run."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors, self._arrived = tensors, None
        if tensors and tensors[0].device.type == "cuda":
            self._tensors = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
            for target, tensor in zip(self._tensors, tensors, strict=True):
                target.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def wait(self) -> list[Tensor]:
        """Them, on the host."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensors
