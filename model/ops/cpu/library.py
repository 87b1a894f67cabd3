"""The compiled kernels (kernels/abi.h) as functions of tensors; shapes and strides are theirs, nothing is checked.

A call releases the GIL. Unless said otherwise tensors are bfloat16, their last dimension is contiguous, and what a
function computes goes to the tensor that is named for it.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
from collections.abc import Callable, Mapping
from ctypes import byref, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from enum import IntEnum
from functools import cache
from typing import Any

import torch
from torch import Tensor

from model.ops.cpu.build import LIBRARY, X86_64

ABI = 7
"""LATENTD_ABI of the library that this file describes."""

ISAS = (*X86_64, "portable")
"""Instruction sets, the best first."""

logger = logging.getLogger(__name__)


class Format(IntEnum):
    """What a packed weight's numbers are."""

    BF16 = 0
    INT8 = 1
    INT4 = 2
    INT8_INPUTS = 3
    """INT8 of the transposed weight: the absorbed and the expanded form of a matrix are the same numbers so."""


class AttentionShape(ctypes.Structure):
    """`latentd_attention_shape`. Keeps addresses only: the tensors must outlive it."""

    _fields_ = (
        ("rows", c_int64),
        ("tokens", c_int64),
        ("query_start", c_void_p),
        ("context_lens", c_void_p),
        ("block_tables", c_void_p),
        ("max_blocks", c_int64),
        ("cache", c_void_p),
        *((name, c_int64) for name in ("layers", "block_size", "heads", "rank", "rope", "nope", "value")),
        ("scale", c_float),
    )


class RouterShape(ctypes.Structure):
    """`latentd_router_shape`."""

    _fields_ = (
        *((name, c_int64) for name in ("experts", "groups", "top_groups", "per_token")),
        *((name, c_int) for name in ("sigmoid", "two_best_per_group", "normalise")),
        ("scaling", c_float),
    )


# What a function returns, then what it takes. c: int, f: float, i: int64, n: nothing, p: pointer, s: size, t: text;
# r: int64, the number of the call's rows, w: pointer to its workspace.
SIGNATURES = {
    "abi": "c ",
    "isa": "t ",
    "use_isa": "c p",
    "set_threads": "n c",
    "packed_bytes": "s cii",
    "pack": "n cpiip",
    "linear": "n cpipriipppic",
    "rms_norm": "n pipfripi",
    "gather": "n pprip",
    "rotation": "n ppfripp",
    "argmax": "n prip",
    "draw": "n prippppppp",
    "rope_and_cache": "n pipipfppppii",
    "attention_workspace": "s p",
    "attention": "n cpipiipiippppw",
    "router_workspace": "s ri",
    "router": "n ppirippppw",
    "moe_workspace": "s riiiii",
    "moe": "n cpiriiiippppippppw",
    "mlp": "n cpiriippppw",
    "function": "p p",
    "replay": "s piipps",
}
_TYPES: dict[str, Any] = {
    "c": c_int,
    "f": c_float,
    "i": c_int64,
    "n": None,
    "p": c_void_p,
    "r": c_int64,
    "s": c_size_t,
    "t": c_char_p,
    "w": c_void_p,
}


class Library:
    def __init__(self, functions: Mapping[str, Callable[..., Any]], empty: Callable[..., Tensor]) -> None:
        """Functions by their name in SIGNATURES. `empty` makes the tensors that go from one to the next, as torch's."""
        self.functions = functions
        self.empty = empty
        self._linear = functions["linear"]
        self._rms_norm = functions["rms_norm"]
        self._gather = functions["gather"]
        self._rotation = functions["rotation"]
        self._argmax = functions["argmax"]
        self._draw = functions["draw"]
        self._rope_and_cache = functions["rope_and_cache"]
        self._attention = functions["attention"]
        self._router = functions["router"]
        self._moe = functions["moe"]
        self._mlp = functions["mlp"]

    @property
    def abi(self) -> int:
        return int(self.functions["abi"]())

    @property
    def digest(self) -> str:
        """64 hex digits that tell this build from another, whose packed weights may lie otherwise."""
        return hashlib.sha256(LIBRARY.read_bytes()).hexdigest()

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return bytes(self.functions["isa"]()).decode()

    def use_isa(self, name: str) -> bool:
        """Another instruction set, for tests. False where this machine does not run it."""
        return int(self.functions["use_isa"](name.encode())) == 0

    def set_threads(self, threads: int) -> None:
        self.functions["set_threads"](threads)

    def packed_bytes(self, format: Format, n: int, k: int) -> int:
        return int(self.functions["packed_bytes"](format, n, k))

    def pack(self, format: Format, weight: Tensor, packed: Tensor) -> None:
        """weight [N, K], or [K, N] for INT8_INPUTS, contiguous; packed [packed_bytes] uint8."""
        n, k = weight.T.shape if format == Format.INT8_INPUTS else weight.shape
        self.functions["pack"](format, weight.data_ptr(), n, k, packed.data_ptr())

    def linear(
        self,
        format: int,
        x: Tensor,
        weight: Tensor,
        y: Tensor,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> None:
        """x [M, K], weight packed [N, K], y [M, N], also float32; residual has y's strides and may be y."""
        m, k = x.shape
        self._linear(
            *(format, x.data_ptr(), x.stride(0), weight.data_ptr(), m, y.shape[1], k, _pointer(bias)),
            *(_pointer(residual), y.data_ptr(), y.stride(0), y.dtype == torch.float32),
        )

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, y: Tensor) -> None:
        """x and y [M, D]."""
        self._rms_norm(x.data_ptr(), x.stride(0), weight.data_ptr(), eps, *x.shape, y.data_ptr(), y.stride(0))

    def gather(self, table: Tensor, index: Tensor, y: Tensor) -> None:
        """table [N, D], contiguous; index [M] int64; y [M, D]."""
        self._gather(table.data_ptr(), index.data_ptr(), *y.shape, y.data_ptr())

    def rotation(
        self, positions: Tensor, frequencies: Tensor, amplitude: float, cosines: Tensor, sines: Tensor
    ) -> None:
        """positions [M] int64, frequencies [pairs] float32; cosines and sines [M, pairs] float32."""
        self._rotation(
            *(positions.data_ptr(), frequencies.data_ptr(), amplitude, *cosines.shape),
            *(cosines.data_ptr(), sines.data_ptr()),
        )

    def argmax(self, x: Tensor, chosen: Tensor) -> None:
        """x [M, N] float32, contiguous; chosen [M] int64: the first of the largest, -1 where not all are finite."""
        self._argmax(x.data_ptr(), *x.shape, chosen.data_ptr())

    def draw(
        self,
        x: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
        seed: Tensor,
        position: Tensor,
        chosen: Tensor,
    ) -> None:
        """x [M, N] float32, contiguous, without NaN; temperature, top_p and min_p [M] float64, all else [M] int64."""
        self._draw(
            *(x.data_ptr(), *x.shape, temperature.data_ptr(), top_k.data_ptr(), top_p.data_ptr(), min_p.data_ptr()),
            *(seed.data_ptr(), position.data_ptr(), chosen.data_ptr()),
        )

    def rope_and_cache(
        self,
        shape: AttentionShape,
        layer: int,
        kv: Tensor,
        norm_weight: Tensor,
        eps: float,
        cosines: Tensor,
        sines: Tensor,
        slot_mapping: Tensor,
        q_rope: Tensor,
    ) -> None:
        """kv [T, rank + rope]; cosines and sines [T, rope / 2] float32; q_rope [T, H, rope] is turned in place."""
        self._rope_and_cache(
            *(byref(shape), layer, kv.data_ptr(), kv.stride(0), norm_weight.data_ptr(), eps, cosines.data_ptr()),
            *(sines.data_ptr(), slot_mapping.data_ptr(), q_rope.data_ptr(), q_rope.stride(0), q_rope.stride(1)),
        )

    def attention_workspace(self, shape: AttentionShape) -> int:
        return int(self.functions["attention_workspace"](byref(shape)))

    def attention(
        self,
        format: int,
        shape: AttentionShape,
        layer: int,
        q_nope: Tensor,
        q_rope: Tensor,
        absorb: Tensor,
        expand: Tensor,
        value: Tensor,
        output: Tensor,
        workspace: Tensor,
    ) -> None:
        """q_nope [T, H, dn], q_rope [T, H, dr]; packed weights, of BF16 all, of INT8 with absorb in INT8_INPUTS; output
        [T, H, dv], contiguous."""
        self._attention(
            *(format, byref(shape), layer, q_nope.data_ptr(), q_nope.stride(0), q_nope.stride(1)),
            *(q_rope.data_ptr(), q_rope.stride(0), q_rope.stride(1)),
            *(absorb.data_ptr(), expand.data_ptr(), value.data_ptr(), output.data_ptr(), workspace.data_ptr()),
        )

    def router_workspace(self, tokens: int, experts: int) -> int:
        return int(self.functions["router_workspace"](tokens, experts))

    def router(
        self,
        shape: RouterShape,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        experts: Tensor,
        weights: Tensor,
        workspace: Tensor,
    ) -> None:
        """x [T, D], weight [E, D] float32, bias [E] float32; experts [T, k] int32, weights [T, k] float32."""
        self._router(
            *(byref(shape), x.data_ptr(), x.stride(0), *x.shape, weight.data_ptr(), _pointer(bias)),
            *(experts.data_ptr(), weights.data_ptr(), workspace.data_ptr()),
        )

    def moe_workspace(self, tokens: int, d: int, width: int, experts: int, per_token: int, shared_width: int) -> int:
        return int(self.functions["moe_workspace"](tokens, d, width, experts, per_token, shared_width))

    def moe(
        self,
        format: int,
        x: Tensor,
        width: int,
        num_experts: int,
        chosen: Tensor,
        weights: Tensor,
        gate_up: Tensor,
        down: Tensor,
        shared: tuple[int, Tensor, Tensor] | None,
        residual: Tensor | None,
        y: Tensor,
        workspace: Tensor,
    ) -> None:
        """x [T, D]; chosen [T, k] int32, weights [T, k] float32; packed weights of all experts, one behind the other.
        shared: its width, gate_up and down. y and residual [T, D], contiguous."""
        shared_width, shared_gate_up, shared_down = shared or (0, None, None)
        self._moe(
            *(format, x.data_ptr(), x.stride(0), *x.shape, width, num_experts, chosen.shape[1], chosen.data_ptr()),
            *(weights.data_ptr(), gate_up.data_ptr(), down.data_ptr()),
            *(shared_width, _pointer(shared_gate_up), _pointer(shared_down)),
            *(_pointer(residual), y.data_ptr(), workspace.data_ptr()),
        )

    def mlp(
        self,
        format: int,
        x: Tensor,
        width: int,
        gate_up: Tensor,
        down: Tensor,
        residual: Tensor | None,
        y: Tensor,
        workspace: Tensor,
    ) -> None:
        """x [T, D], y and residual [T, D], contiguous; a workspace as of a MoE of no experts and this as shared MLP."""
        self._mlp(
            *(format, x.data_ptr(), x.stride(0), *x.shape, width, gate_up.data_ptr(), down.data_ptr()),
            *(_pointer(residual), y.data_ptr(), workspace.data_ptr()),
        )


def in_turn(gate: Tensor, up: Tensor) -> Tensor:
    """[..., I, D] each -> [..., 2I, D], as `moe` and `mlp` want it packed: 32 rows of gate, the same of up, and on."""
    *leading, width, hidden = gate.shape
    halves = [half.reshape(*leading, width // 32, 32, hidden) for half in (gate, up)]
    return torch.stack(halves, -3).reshape(*leading, 2 * width, hidden)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def load() -> Library:
    """OSError, whose text is the reason, where there are no kernels to be used."""
    if not LIBRARY.exists():
        raise OSError("they were not compiled when latentd was installed")
    shared = ctypes.CDLL(str(LIBRARY))
    functions: dict[str, Callable[..., Any]] = {}
    for name, signature in SIGNATURES.items():
        try:
            function = shared[f"latentd_{name}"]
        except AttributeError as error:
            raise OSError(str(error)) from None
        result, arguments = signature.split(" ")
        function.restype = _TYPES[result]
        function.argtypes = [_TYPES[letter] for letter in arguments]
        functions[name] = function
    loaded = Library(functions, torch.empty)
    if loaded.abi != ABI:
        raise OSError(f"{LIBRARY} is of another version (ABI {loaded.abi}, not {ABI})")
    return loaded


@cache
def library() -> Library | None:
    """None, and one line in the log, where there are no kernels to be used."""
    try:
        return load()
    except OSError as error:
        logger.warning("no CPU kernels, torch computes instead, several times slower: %s", error)
        return None
