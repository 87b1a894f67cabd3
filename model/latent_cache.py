"""The paged latent cache: for every token and layer the normalised latent and the rotated shared key, nothing else.

Block-major (`data[block, layer, token, width]`): one block with all its layers is one contiguous piece
of memory, so that saving, moving or sharing a block is one copy. A layer is a strided view.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.large_pages import LargePages

BLOCK_SIZE = 64
"""Tokens a block. `scheduler.config.BLOCK_SIZE` is the same number: hashes and kernels rely on it."""


class LatentCache:
    """[num_blocks, num_layers, BLOCK_SIZE, latent_dim] of the run dtype; the first kv_lora_rank numbers of a
    token are the latent, the rest its rotated key.
    """

    def __init__(
        self, num_blocks: int, num_layers: int, latent_dim: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        """Reserves the memory without touching it: the system backs a block when its first token is written."""
        shape = (num_blocks, num_layers, BLOCK_SIZE)
        if torch.device(device).type == "cpu":
            self.data = LargePages().empty(*shape, latent_dim * dtype.itemsize).view(dtype)
        else:
            self.data = torch.empty((*shape, latent_dim), dtype=dtype, device=device)

    @property
    def num_blocks(self) -> int:
        return self.data.shape[0]

    @property
    def num_layers(self) -> int:
        return self.data.shape[1]

    @property
    def block_bytes(self) -> int:
        """Bytes one block occupies, all layers."""
        return math.prod(self.data.shape[1:]) * self.data.itemsize

    def layer(self, index: int) -> Tensor:
        """[num_blocks, BLOCK_SIZE, latent_dim]: a strided view of one layer."""
        return self.data[:, index]
