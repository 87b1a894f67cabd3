"""The paged latent cache: for every token and layer the normalised latent and the rotated shared key, nothing else.

Block-major (`data[block, layer, ...]`): one block with all its layers is one contiguous piece of memory, so that
saving, moving or sharing a block is one copy. A block of one layer is a page; a layer is a strided view.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from model.config import FP8_SCALE_BYTES
from model.fp8_latents import from_fp8, to_fp8
from model.large_pages import LargePages

BLOCK_SIZE = 64
"""Tokens a block. `scheduler.config.BLOCK_SIZE` is the same number: hashes and kernels rely on it."""


class Planes(NamedTuple):
    """Strided views of some pages."""

    latents: Tensor
    """[..., BLOCK_SIZE, r] run dtype, or uint8: 8-bit floats, a token's with one scale (see `model/fp8_latents.py`)"""
    scales: Tensor | None
    """[..., BLOCK_SIZE] float32; None where latents have the run dtype"""
    keys: Tensor
    """[..., BLOCK_SIZE, dr] run dtype"""


class LatentCache:
    """`data` is [num_blocks, num_layers, BLOCK_SIZE, latent_dim] of the run dtype: a token's latent, then its key.
    With `fp8_latents` it is uint8 [num_blocks, num_layers, bytes of a page], the three `Planes` behind each other.
    """

    def __init__(
        self,
        num_blocks: int,
        num_layers: int,
        latent_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        fp8_latents: int = 0,
    ) -> None:
        """`fp8_latents`: how many of a token's numbers, the first ones, are kept in 8 bits: kv_lora_rank or none.

        Reserves the memory without touching it: the system backs a block when its first token is written.
        """
        self.dtype = dtype
        self.latent_dim = latent_dim
        self._fp8_latents = fp8_latents
        width = latent_dim * dtype.itemsize
        if fp8_latents:
            width = fp8_latents + FP8_SCALE_BYTES + (latent_dim - fp8_latents) * dtype.itemsize
        shape = (num_blocks, num_layers, BLOCK_SIZE * width)
        on_cpu = torch.device(device).type == "cpu"
        self.data = LargePages().empty(*shape) if on_cpu else torch.empty(shape, dtype=torch.uint8, device=device)
        if not fp8_latents:
            self.data = self.data.view(dtype).view(*shape[:2], BLOCK_SIZE, latent_dim)

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

    def planes(self, layer: int, rank: int) -> Planes:
        """Of all blocks, one layer."""
        return self._planes(self.data[:, layer], rank)

    def write(self, lines: Tensor, latents: Tensor, keys: Tensor) -> None:
        """latents [n, r] and keys [n, dr] to lines [n] int64, (block * num_layers + layer) * BLOCK_SIZE + offset."""
        if not self._fp8_latents:
            self.data.view(-1, self.latent_dim).index_copy_(0, lines, torch.cat((latents, keys), dim=1))
            return
        planes = self._planes(self.data.flatten(0, 1), latents.shape[1])
        assert planes.scales is not None
        at = lines // BLOCK_SIZE, lines % BLOCK_SIZE
        planes.latents[at], planes.scales[at] = to_fp8(latents)
        planes.keys[at] = keys

    def read(self, lines: Tensor) -> Tensor:
        """Copies of lines [n], as in `write` -> [n, latent_dim] run dtype."""
        if not self._fp8_latents:
            return self.data.view(-1, self.latent_dim).index_select(0, lines)
        at = lines // BLOCK_SIZE, lines % BLOCK_SIZE
        planes = self._planes(self.data.flatten(0, 1), self._fp8_latents)
        assert planes.scales is not None
        return torch.cat((from_fp8(planes.latents[at], planes.scales[at], self.dtype), planes.keys[at]), dim=1)

    def read_pages(self, pages: Tensor) -> Tensor:
        """Copies of pages [n] int64, block * num_layers + layer -> [n, BLOCK_SIZE, latent_dim] run dtype."""
        whole = self.data.flatten(0, 1).index_select(0, pages)
        if not self._fp8_latents:
            return whole
        planes = self._planes(whole, self._fp8_latents)
        assert planes.scales is not None
        return torch.cat((from_fp8(planes.latents, planes.scales, self.dtype), planes.keys), dim=2)

    def _planes(self, pages: Tensor, rank: int) -> Planes:
        if not self._fp8_latents:
            return Planes(pages[..., :rank], None, pages[..., rank:])
        assert rank == self._fp8_latents
        scales, keys = BLOCK_SIZE * rank, BLOCK_SIZE * (rank + FP8_SCALE_BYTES)
        lines = (*pages.shape[:-1], BLOCK_SIZE, -1)
        return Planes(
            pages[..., :scales].view(lines),
            pages[..., scales:keys].view(torch.float32),
            pages[..., keys:].view(self.dtype).view(lines),
        )
