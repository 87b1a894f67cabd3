"""Muon for the matrices and AdamW for the rest, each process updating its own share of the flat buffers.

Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/) replaces the momentum of a matrix by the nearest
matrix whose singular values are near 1; the scale of its updates, 0.2 sqrt(larger side), is that of Moonlight
(arXiv 2502.16982, 2.2), so that their root mean square is 0.2 of the rate whatever the shape.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from tools.builtin_model.layout import Layout, is_matrix

MOMENTUM = 0.95
WEIGHT_DECAY = 0.05
NEWTON_SCHULZ_STEPS = 4
ADAMW_BETAS = (0.9, 0.95)
ADAMW_EPS = 1e-8
ADAMW_CLIP = 1.0
"""Bound on the norm of all gradients that AdamW takes."""
AVERAGE_DECAY = 0.97
"""A step, of the running mean of the weights that is evaluated and exported."""


@dataclass(frozen=True)
class Rates:
    matrices: float
    others: float
    """Of embedding, head and routers; norms take half."""


class Optimiser:
    """Of one process; `weights` and `average` are [layout.size], `gradients` [processes, layout.size]."""

    def __init__(self, layout: Layout, weights: Tensor, average: Tensor, gradients: Tensor, rank: int) -> None:
        self.adamw_gradients = gradients[:, : layout.adamw_size]
        own = _shares(layout, len(gradients))[rank]
        by_name = [layout.views(flat) for flat in (weights, average, *gradients)]
        self.parameters = [
            _parameter(name, [views[name] for views in by_name]) for name in layout.shapes if name in own
        ]

    def step(self, rates: Rates) -> None:
        """Takes the mean of the processes' gradients."""
        norm = self.adamw_gradients.mean(0).norm().item()
        clip = min(1.0, ADAMW_CLIP / max(norm, 1e-12))
        for parameter in self.parameters:
            parameter.step(rates, clip)
            parameter.average.lerp_(parameter.weight, 1 - AVERAGE_DECAY)


class _Parameter(ABC):
    def __init__(self, weight: Tensor, average: Tensor, gradients: list[Tensor]) -> None:
        self.weight, self.average, self.gradients = weight, average, gradients
        self.momentum = torch.zeros_like(weight)

    @property
    def gradient(self) -> Tensor:
        return torch.stack(self.gradients).mean(0)

    @abstractmethod
    def step(self, rates: Rates, clip: float) -> None: ...


class _Matrices(_Parameter):
    """[n, out, in]: matrices of one shape, each orthogonalised by itself."""

    def step(self, rates: Rates, clip: float) -> None:
        gradient = self.gradient
        self.momentum.mul_(MOMENTUM).add_(gradient)
        update = orthogonalised(gradient.add_(self.momentum, alpha=MOMENTUM))
        scale = 0.2 * math.sqrt(max(self.weight.shape[1:]))
        self.weight.mul_(1 - rates.matrices * WEIGHT_DECAY).add_(update, alpha=-rates.matrices * scale)


class _Others(_Parameter):
    def __init__(self, weight: Tensor, average: Tensor, gradients: list[Tensor]) -> None:
        super().__init__(weight, average, gradients)
        self.squares = torch.zeros_like(weight)
        self.steps = 0

    def step(self, rates: Rates, clip: float) -> None:
        self.steps += 1
        first, second = ADAMW_BETAS
        gradient = self.gradient.mul_(clip)
        self.momentum.lerp_(gradient, 1 - first)
        self.squares.lerp_(gradient.square_(), 1 - second)
        scale = (self.squares / (1 - second**self.steps)).sqrt_().add_(ADAMW_EPS)
        rate = rates.others * (0.5 if self.weight.dim() == 1 else 1.0) / (1 - first**self.steps)
        self.weight.addcdiv_(self.momentum, scale, value=-rate)


def orthogonalised(matrices: Tensor) -> Tensor:
    """[n, out, in] -> bfloat16 [n, out, in] with singular values of about 1: Newton-Schulz iterations of degree 5."""
    x: Tensor = matrices.bfloat16()
    if tall := x.shape[1] > x.shape[2]:
        x = x.transpose(1, 2)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        square = x @ x.transpose(1, 2)
        x = 3.4445 * x + torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315) @ x
    return x.transpose(1, 2) if tall else x


def _parameter(name: str, tensors: list[Tensor]) -> _Parameter:
    if is_matrix(name):
        tensors = [_as_matrices(name, tensor) for tensor in tensors]
    weight, average, *gradients = tensors
    return (_Matrices if is_matrix(name) else _Others)(weight, average, gradients)


def _as_matrices(name: str, tensor: Tensor) -> Tensor:
    """[n, out, in]: gate and up of a feed-forward apart, and every expert."""
    if name.endswith("gate_up_proj"):
        return tensor.view(-1, tensor.shape[-2] // 2, tensor.shape[-1])
    return tensor.view(-1, *tensor.shape[-2:])


def _shares(layout: Layout, processes: int) -> list[set[str]]:
    """Names by process: the costliest first, each to the process that has least to do."""
    costs = {name: _cost(name, shape) for name, shape in layout.shapes.items()}
    shares: list[set[str]] = [set() for _ in range(processes)]
    loads = [0.0] * processes
    for name in sorted(costs, key=lambda name: -costs[name]):
        process = loads.index(min(loads))
        shares[process].add(name)
        loads[process] += costs[name]
    return shares


def _cost(name: str, shape: tuple[int, ...]) -> float:
    """Multiplications of a step; one element of AdamW takes about as long as 200 of them."""
    size = math.prod(shape)
    if not is_matrix(name):
        return 200.0 * size
    rows = shape[-2] // 2 if name.endswith("gate_up_proj") else shape[-2]
    small = min(rows, shape[-1])
    return NEWTON_SCHULZ_STEPS * (2.0 * size * small + size / max(rows, shape[-1]) * small * small)
