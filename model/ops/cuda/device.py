"""What the kernels' sizes follow from. Without a GPU, under Triton's interpreter, there is room for everything."""

from __future__ import annotations

import torch
import triton

KERNEL_MEMORY = 99 << 10
"""Bytes of shared memory that every GPU needs which runs the kernels: Ampere and what came after have them."""


def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def shared_memory(device: torch.device) -> int:
    """Bytes that a program can have: 227 KiB on an H100, 163 KiB on an A100, 99 KiB on a card for games."""
    if device.type != "cuda":
        return 227 << 10
    properties = triton.runtime.driver.active.utils.get_device_properties(torch.cuda.current_device())
    return int(properties["max_shared_mem"])
