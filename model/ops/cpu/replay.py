"""Record and replay: a step of the network as one call of the library.

The network runs once on tensors whose contents nobody reads, and the calls it makes of the library are written down
instead of made. What changes from step to step stays open in a recording: the number T of tokens and S of sampled
ones, the inputs' addresses, and all memory between calls, which is given in bytes a row: values that are needed at the
same time lie side by side, others one over the other. So one recording serves steps of every size.
"""

from __future__ import annotations

import ctypes
import struct
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, auto
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model.config import DeepseekConfig
from model.inputs import StepInputs
from model.latent_cache import BLOCK_SIZE, LatentCache
from model.ops.cpu.library import SIGNATURES, AttentionShape, Library
from model.ops.interface import Network

ALIGNMENT = 64
"""Bytes: a line of the cache, so that no two values share one."""


class Base(IntEnum):
    """What an argument counts from (`latentd_base`)."""

    ZERO = 0
    """A constant: numbers, and addresses of weights."""
    TOKENS = auto()
    """Memory of T rows between calls."""
    SAMPLES = auto()
    """Memory of S rows between calls."""
    NUM_TOKENS = auto()
    NUM_SAMPLES = auto()
    WORKSPACE = auto()
    SHAPE = auto()
    """The step's `AttentionShape`."""
    TOKEN_IDS = auto()
    POSITIONS = auto()
    SLOT_MAPPING = auto()
    SAMPLE_INDEX = auto()


@dataclass(eq=False)
class Buffer:
    """Memory between calls, or an input, as the network saw it while it was recorded."""

    tensor: Tensor
    base: Base
    first: int | None = None
    """The call that mentions it first; None where none does, and for inputs."""
    last: int = 0
    offset: int = 0
    """Bytes a row before its own, of the memory of its base."""

    @property
    def row_bytes(self) -> int:
        return self.tensor[0].nbytes

    @property
    def end(self) -> int:
        return self.offset + -(-self.row_bytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Word:
    """An argument: so many bytes from where a buffer begins, or a number on top of a base."""

    of: Buffer | Base
    offset: int


class Argument(ctypes.Structure):
    """`latentd_argument`."""

    _fields_ = (("offset", ctypes.c_int64), ("base", ctypes.c_int32), ("scale", ctypes.c_int32))


@dataclass(frozen=True)
class Recording:
    names: list[str]
    """Of the functions, in the order of calls; the first `sizes` are those that say how much workspace is needed."""
    sizes: int
    arguments: ctypes.Array[Argument]
    row_bytes: dict[Base, int]
    """Of the memory of T and of S rows."""
    hidden: Buffer
    logits: Buffer
    kept: list[Any]
    """What lies at constant addresses and belongs to nobody else."""


class Recorder:
    """Stands where the library is while the network runs."""

    _TOKENS, _SAMPLES = 3, 2
    """T and S of that run; different, so that a number of rows says which it is."""

    def __init__(self) -> None:
        self.library = Library({name: partial(self._call, name) for name in SIGNATURES}, self._empty)
        self._calls: list[tuple[str, list[Word]]] = []
        self._sizes: dict[tuple[str, tuple[Word, ...]], None] = {}
        self._buffers: list[Buffer] = []
        self._starts: list[int] = []
        self._kept: list[Any] = []

    def record(self, network: Network, config: DeepseekConfig) -> Recording:
        """`network` must call `self.library` alone."""
        inputs = StepInputs(
            token_ids=self._input(Base.TOKEN_IDS, self._TOKENS),
            positions=self._input(Base.POSITIONS, self._TOKENS),
            slot_mapping=self._input(Base.SLOT_MAPPING, self._TOKENS),
            query_start=[0, self._TOKENS],
            context_lens=[self._TOKENS],
            block_tables=torch.zeros((1, 1), dtype=torch.int32),
            sample_index=self._input(Base.SAMPLE_INDEX, self._SAMPLES),
        )
        outputs = network(inputs, LatentCache(1, config.num_hidden_layers, config.latent_dim, torch.bfloat16))
        hidden, logits = (self._buffer_at(output.data_ptr()) for output in outputs)
        assert hidden is not None
        assert logits is not None
        hidden.last = logits.last = len(self._calls)  # to be read when all is done
        row_bytes = {base: self._place(base) for base in (Base.TOKENS, Base.SAMPLES)}
        calls = [*self._sizes, *self._calls]
        words = [_argument(word) for _, arguments in calls for word in arguments]
        arguments = (Argument * len(words))(*words)
        return Recording(
            [name for name, _ in calls], len(self._sizes), arguments, row_bytes, hidden, logits, self._kept
        )

    def _input(self, base: Base, rows: int) -> Tensor:
        tensor = torch.zeros(rows, dtype=torch.int64)
        self._add(Buffer(tensor, base))
        return tensor

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        tensor = torch.zeros(tuple(shape), dtype=dtype)
        self._add(Buffer(tensor, {self._TOKENS: Base.TOKENS, self._SAMPLES: Base.SAMPLES}[shape[0]]))
        return tensor

    def _add(self, buffer: Buffer) -> None:
        """By address; a buffer keeps its tensor, so that the address is not given away again."""
        place = bisect_right(self._starts, buffer.tensor.data_ptr())
        self._starts.insert(place, buffer.tensor.data_ptr())
        self._buffers.insert(place, buffer)

    def _buffer_at(self, address: int) -> Buffer | None:
        place = bisect_right(self._starts, address) - 1
        buffer = self._buffers[place]
        return buffer if place >= 0 and address < self._starts[place] + buffer.tensor.nbytes else None

    def _call(self, name: str, *arguments: Any) -> int:
        letters = SIGNATURES[name].split(" ")[1]
        words = [self._word(letter, argument) for letter, argument in zip(letters, arguments, strict=True)]
        if name.endswith("_workspace"):
            self._sizes[name, tuple(words)] = None
        else:
            self._calls.append((name, words))
        return 0

    def _word(self, letter: str, argument: Any) -> Word:
        if letter == "w":
            return Word(Base.WORKSPACE, 0)
        if letter == "r":
            return Word({self._TOKENS: Base.NUM_TOKENS, self._SAMPLES: Base.NUM_SAMPLES}[argument], 0)
        if letter == "f":
            return Word(Base.ZERO, *struct.unpack("<i", struct.pack("<f", argument)))
        if letter != "p" or argument is None:
            return Word(Base.ZERO, int(argument or 0))
        if not isinstance(argument, int):  # byref
            pointed_to = argument._obj
            if isinstance(pointed_to, AttentionShape):
                return Word(Base.SHAPE, 0)
            self._kept.append(pointed_to)
            return Word(Base.ZERO, ctypes.addressof(pointed_to))
        buffer = self._buffer_at(argument)
        if buffer is None:
            return Word(Base.ZERO, argument)
        if buffer.base in (Base.TOKENS, Base.SAMPLES):
            buffer.first = len(self._calls) if buffer.first is None else buffer.first
            buffer.last = len(self._calls)
        return Word(buffer, argument - buffer.tensor.data_ptr())

    def _place(self, base: Base) -> int:
        """Gives each buffer the lowest place that is free while it is in use; bytes a row of all together."""
        live: list[Buffer] = []
        size = 0
        used = [(buffer.first, buffer) for buffer in self._buffers if buffer.base is base and buffer.first is not None]
        for first, buffer in sorted(used, key=lambda pair: pair[0]):
            live = sorted((other for other in live if other.last >= first), key=lambda other: other.offset)
            for other in live:
                if buffer.end <= other.offset:
                    break
                buffer.offset = other.end
            live.append(buffer)
            size = max(size, buffer.end)
        return size


def _argument(word: Word) -> Argument:
    if isinstance(word.of, Base):
        return Argument(word.offset, word.of, 0)
    return Argument(word.offset, word.of.base, word.of.offset)


class StepRows:
    """What the kernels know of a step's rows, and what that points to."""

    def __init__(self, step: StepInputs, cache: LatentCache, config: DeepseekConfig) -> None:
        self.cache = cache
        self.shape = AttentionShape(
            cache=cache.data.data_ptr(),
            layers=cache.num_layers,
            block_size=BLOCK_SIZE,
            heads=config.num_attention_heads,
            rank=config.kv_lora_rank,
            rope=config.qk_rope_head_dim,
            nope=config.qk_nope_head_dim,
            value=config.v_head_dim,
            scale=config.softmax_scale,
        )
        self.take(step)

    def take(self, step: StepInputs) -> None:
        """Another step over the same cache."""
        self._kept = query_start, context_lens, block_tables = (
            array("i", step.query_start),
            array("i", step.context_lens),
            step.block_tables,
        )
        shape = self.shape
        shape.rows, shape.max_blocks = block_tables.shape
        shape.tokens = step.num_tokens
        shape.query_start = query_start.buffer_info()[0]
        shape.context_lens = context_lens.buffer_info()[0]
        shape.block_tables = block_tables.data_ptr()


class Replay:
    """The recorded network, as `Network`. Its outputs are overwritten by its next call.

    Between two steps of one size nothing is made anew: what a step needs beside the network is what one stream waits
    for, and all that it touches has to come back into the processor's caches, where the weights have just been.
    """

    def __init__(self, library: Library, recording: Recording, config: DeepseekConfig) -> None:
        self._recording, self._config = recording, config
        self._replay = library.functions["replay"]
        handles = [library.functions["function"](name.encode()) for name in recording.names]
        assert None not in handles, recording.names[handles.index(None)]
        self._handles = (ctypes.c_void_p * len(handles))(*handles)
        self._bases = (ctypes.c_int64 * (2 * len(Base)))()
        """An address and a number of rows of each."""
        self._memory = dict.fromkeys((Base.TOKENS, Base.SAMPLES), torch.empty(0, dtype=torch.uint8))
        self._workspace = torch.empty(0, dtype=torch.uint8)
        self._rows: StepRows | None = None
        self._size = (0, 0)
        """T and S of the last step."""
        self._outputs = (torch.empty(0), torch.empty(0))

    def __call__(self, inputs: StepInputs, cache: LatentCache) -> tuple[Tensor, Tensor]:
        if self._rows is None or self._rows.cache is not cache:
            self._rows = StepRows(inputs, cache, self._config)
        else:
            self._rows.take(inputs)
        tokens, samples = size = inputs.num_tokens, inputs.sample_index.numel()
        if size != self._size:
            self._resize(tokens, samples)
        addresses = {
            Base.TOKEN_IDS: inputs.token_ids.data_ptr(),
            Base.POSITIONS: inputs.positions.data_ptr(),
            Base.SLOT_MAPPING: inputs.slot_mapping.data_ptr(),
            Base.SAMPLE_INDEX: inputs.sample_index.data_ptr(),
            Base.SHAPE: ctypes.addressof(self._rows.shape),
        }
        for base, address in addresses.items():
            self._bases[2 * base] = address
        while needed := self._replayed():
            self._workspace = torch.empty(needed, dtype=torch.uint8)
            self._bases[2 * Base.WORKSPACE] = self._workspace.data_ptr()
        return self._outputs

    def _replayed(self) -> int:
        """0, or how much workspace is needed to do it."""
        recording = self._recording
        needed: int = self._replay(
            *(self._handles, recording.sizes, len(self._handles), recording.arguments),
            *(ctypes.addressof(self._bases), self._workspace.nbytes),
        )
        return needed

    def _resize(self, tokens: int, samples: int) -> None:
        """For steps of so many T and S."""
        self._size = tokens, samples
        for base, rows in ((Base.TOKENS, tokens), (Base.SAMPLES, samples)):
            size = rows * self._recording.row_bytes[base]
            if self._memory[base].nbytes < size:
                self._memory[base] = torch.empty(size, dtype=torch.uint8)
            self._bases[2 * base : 2 * base + 2] = [self._memory[base].data_ptr(), rows]
        self._bases[2 * Base.NUM_TOKENS] = tokens
        self._bases[2 * Base.NUM_SAMPLES] = samples
        self._outputs = self._output(self._recording.hidden, tokens), self._output(self._recording.logits, samples)

    def _output(self, buffer: Buffer, rows: int) -> Tensor:
        start = rows * buffer.offset
        memory = self._memory[buffer.base][start : start + rows * buffer.row_bytes]
        return memory.view(buffer.tensor.dtype).view(rows, *buffer.tensor.shape[1:])
