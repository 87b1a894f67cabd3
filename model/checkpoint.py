"""A checkpoint folder's tensors, found and checked before anything is allocated: safetensors headers only, no torch.

Only safetensors are read (https://github.com/huggingface/safetensors, "Format"), with an own reader, because a header
is a claim by whoever wrote the file: each is compared with the file's size, and the names and shapes with those that
config.json implies. Pickles are never opened. Files may be symbolic links, as in the hub's cache, but an index names
plain files of its own folder only.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import msgspec

from model.config import CheckpointError, DeepseekConfig, expected_tensors
from model.json_file import read_json_object

logger = logging.getLogger(__name__)

INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 32 << 20
MAX_TENSORS = 1 << 18
"""Bounds of one file's header (Kimi-K2 in a single file would have 70,000 tensors in 11 MB)."""
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Types a weight may have, by safetensors' names; tensors of one checkpoint may differ."""
FP8 = "F8_E4M3"
"""A type that a matrix may have beside those: its numbers need scales."""
_ITEMSIZES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_ITEMSIZES |= {"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
_QUANTIZED = {
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "weight_packed": "compressed-tensors",
}
"""Last components of names that only quantised checkpoints have."""
_PICKLES = ("bin", "pt", "pth")
_NEVER_OPENED = (*_PICKLES, "pkl", "ckpt", "py")
_SAMPLE_BYTES = 64
_METADATA = "__metadata__"


class _HeaderEntry(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor's little-endian, row-major bytes lie: [start, end) counted from the beginning of `file`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """safetensors' name: `F32`, `F16`, `BF16` or `F8_E4M3`."""
    file: Path
    start: int
    end: int
    scale: TensorInfo | None = None
    """Of `F8_E4M3`: what the blocks are multiplied with, `F32` or `F8_E8M0`."""

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint that the network is filled from, all of them present and of the right shape."""

    config: DeepseekConfig
    tensors: dict[str, TensorInfo]
    """By the hub's names, which are those of `expected_tensors`."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights as they are in the files."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def file_dtype(self) -> str:
        """The type most of the bytes have: `float32`, `float16`, `bfloat16` or `float8_e4m3fn`."""
        sizes: Counter[str] = Counter()
        for tensor in self.tensors.values():
            sizes[tensor.dtype] += tensor.nbytes
        return (DTYPES | {FP8: "float8_e4m3fn"})[sizes.most_common(1)[0][0]]

    @property
    def file_stamps(self) -> list[tuple[str, int, int]]:
        """Name, size and time of change of each weight file: what an edit within a tensor changes."""
        scales = [tensor.scale for tensor in self.tensors.values() if tensor.scale is not None]
        files = sorted({tensor.file for tensor in (*self.tensors.values(), *scales)})
        stats = [(file.name, file.stat()) for file in files]
        return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]

    def by_file(self) -> dict[Path, list[TensorInfo]]:
        files: dict[Path, list[TensorInfo]] = {}
        for tensor in self.tensors.values():
            files.setdefault(tensor.file, []).append(tensor)
        return files

    @cached_property
    def fingerprint(self) -> str:
        """64 hex digits that tell this model from another, a fine-tune of the same shape included.

        Hash of the config, of names, types and shapes, and of 64 bytes at the beginning, middle and end of every
        tensor: cheap where hashing all of the content would take as long as loading it.
        """
        digest = hashlib.sha256(repr(self.config).encode())
        for file, tensors in self.by_file().items():
            with file.open("rb") as stream:
                for tensor in tensors:
                    digest.update(repr((tensor.name, tensor.dtype, tensor.shape)).encode())
                    digest.update(_sample(stream.fileno(), tensor))
        return digest.hexdigest()


def open_checkpoint(model_dir: Path, config: DeepseekConfig) -> Checkpoint:
    """Reads the headers of all weight files of a folder and compares names and shapes with `config`.

    Raises CheckpointError, one line naming file and tensor, for a missing, truncated or malformed file, a missing,
    unknown, repeated or misshapen tensor, and for forms that are not read (pickles, quantised or converted weights).
    """
    if foreign := sorted(file.name for ending in _NEVER_OPENED for file in model_dir.glob(f"*.{ending}")):
        logger.info("%s: code and pickles are never run or opened: %s", model_dir, ", ".join(foreign[:5]))
    index = model_dir / INDEX_FILE
    weight_map = _read_weight_map(index) if index.exists() else None
    files = (
        _weight_files(model_dir) if weight_map is None else sorted({model_dir / name for name in weight_map.values()})
    )
    found: dict[str, TensorInfo] = {}
    for file in files:
        for tensor in read_header(file):
            if tensor.name in found:
                raise CheckpointError(f"{file}: tensor {tensor.name} is in {found[tensor.name].file.name} too")
            found[tensor.name] = tensor
    for name, file_name in (weight_map or {}).items():
        if name not in found or found[name].file.name != file_name:
            raise CheckpointError(f"{model_dir / file_name}: tensor {name} is missing, which {INDEX_FILE} promises")
    return Checkpoint(config, _select(model_dir, config, found))


def read_header(file: Path) -> list[TensorInfo]:
    """The tensors of one safetensors file, in the order of their bytes; every claim is checked against its size."""
    raw, start, size = _read_raw(file)
    raw.pop(_METADATA, None)
    if len(raw) > MAX_TENSORS:
        raise CheckpointError(f"{file}: more than {MAX_TENSORS} tensors")
    try:
        entries = {name: msgspec.json.decode(entry, type=_HeaderEntry) for name, entry in raw.items()}
    except msgspec.MsgspecError as error:
        raise CheckpointError(f"{file}: malformed safetensors header: {error}") from None
    return _place(file, entries, start, size)


def read_metadata(file: Path) -> dict[str, str]:
    """What a safetensors file says of itself."""
    raw, _, _ = _read_raw(file)
    try:
        return msgspec.json.decode(raw.get(_METADATA, b"{}"), type=dict[str, str])
    except msgspec.MsgspecError as error:
        raise CheckpointError(f"{file}: malformed safetensors metadata: {error}") from None


def _read_raw(file: Path) -> tuple[dict[str, msgspec.Raw], int, int]:
    """The header's entries, where the bytes behind it begin, and the file's size."""
    if not file.is_file():  # a named pipe would block
        raise CheckpointError(f"{file}: not a file")
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            start = stream.read(64)
            if start.startswith(b"version https://git-lfs"):
                raise CheckpointError(f"{file}: a Git-LFS pointer, not the weights themselves (run `git lfs pull`)")
            length = int.from_bytes(start[:8], "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{file}: truncated, or not a safetensors file (header of {length} bytes)")
            stream.seek(8)
            header = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from None
    try:
        return msgspec.json.decode(header, type=dict[str, msgspec.Raw]), 8 + length, size
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{file}: malformed safetensors header: {error}") from None


def _place(file: Path, entries: dict[str, _HeaderEntry], data_start: int, size: int) -> list[TensorInfo]:
    """Checks that the tensors tile the bytes after the header exactly."""
    tensors = []
    position = data_start
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        start, end = (data_start + offset for offset in entry.data_offsets)
        problem = None
        if entry.dtype not in _ITEMSIZES:
            problem = f"unknown dtype {entry.dtype[:20]}"
        elif len(entry.shape) > 8 or min(entry.shape, default=1) < 0:
            problem = "impossible shape"
        elif math.prod(entry.shape) * _ITEMSIZES[entry.dtype] != end - start:
            problem = f"shape {entry.shape} of {entry.dtype} does not fill its {end - start} bytes"
        elif start != position:
            problem = "overlaps the tensor before it or leaves a gap"
        elif end > size:
            problem = f"the file is truncated: the tensor ends at byte {end}, the file at {size}"
        if problem:
            raise CheckpointError(f"{file}: tensor {_short(name)}: {problem}")
        tensors.append(TensorInfo(name, tuple(entry.shape), entry.dtype, file, start, end))
        position = end
    if position != size:
        raise CheckpointError(f"{file}: {size - position} bytes after the last tensor")
    return tensors


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map: must map tensors to files")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", file_name):
            raise CheckpointError(f"{index}: weight_map: {_short(name)}: not a plain name of a .safetensors file")
        if not (index.parent / file_name).is_file():
            raise CheckpointError(
                f"{index.parent / file_name}: no such file, but {INDEX_FILE} has {_short(name)} there"
            )
    return weight_map


def _weight_files(model_dir: Path) -> list[Path]:
    """All weight files of a folder without an index."""
    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        if pickles := sorted(file.name for ending in _PICKLES for file in model_dir.glob(f"*.{ending}")):
            raise CheckpointError(f"{model_dir / pickles[0]}: pickled weights are never loaded; convert to safetensors")
        raise CheckpointError(f"{model_dir}: no .safetensors files")
    for file in files:
        if re.fullmatch(r"model\d+-mp\d+\.safetensors", file.name):
            raise CheckpointError(f"{file}: converted for DeepSeek's own inference code; the original files are needed")
    return files


def _select(model_dir: Path, config: DeepseekConfig, found: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors the config asks for, out of those found; CheckpointError unless the two sets agree."""
    stacked = any(_is_stacked_expert(name) for name in found)
    expected = _stacked(config) if stacked else expected_tensors(config)
    scales = {_scale_name(name): name for name in expected if name in found and found[name].dtype == FP8}
    known = expected.keys() | scales.keys()
    unknown = [name for name in found if name not in known and not _is_ignored(name, config)]
    for name in unknown:
        if form := _QUANTIZED.get(name.rpartition(".")[2]):
            raise CheckpointError(f"{found[name].file}: tensor {name}: {form} quantised weights are not supported yet")
    if missing := [name for name in expected if name not in found]:
        raise CheckpointError(f"{model_dir}: missing tensor{_listed(missing)}")
    if unknown:
        raise CheckpointError(f"{found[unknown[0]].file}: unknown tensor{_listed(unknown)}")
    for name, shape in expected.items():
        tensor = found[name]
        if tensor.dtype not in (*DTYPES, FP8):
            raise CheckpointError(
                f"{tensor.file}: tensor {name}: dtype {tensor.dtype}: must be F32, F16, BF16 or, with scales, {FP8}"
            )
        if tensor.shape != shape:
            raise CheckpointError(
                f"{tensor.file}: tensor {name}: shape {list(tensor.shape)}, but config.json implies {list(shape)}"
            )
    if config.tie_word_embeddings and "lm_head.weight" in found:
        _compare_tied(found["model.embed_tokens.weight"], found["lm_head.weight"])
    for name in scales.values():
        found[name] = replace(found[name], scale=_scale_of(config, found[name], found))
    if stacked:
        found |= _experts_of(config, found)
    return {name: found[name] for name in expected_tensors(config)}


def _scale_name(name: str) -> str:
    """`X.weight` has `X.weight_scale_inv` beside it, which is multiplied with in spite of its name."""
    return name + "_scale_inv"


def _scale_of(config: DeepseekConfig, weight: TensorInfo, found: dict[str, TensorInfo]) -> TensorInfo:
    """The scales of an fp8 weight, which may lie in another file."""
    fp8 = f"{weight.file}: tensor {weight.name}: dtype {FP8}"
    if config.fp8_block is None:
        raise CheckpointError(f"{fp8}, but config.json has no quantization_config with a weight_block_size")
    if len(weight.shape) != 2:
        raise CheckpointError(f"{fp8}: only matrices may be fp8")
    if _scale_name(weight.name) not in found:
        raise CheckpointError(f"{fp8}, but tensor {_scale_name(weight.name)} is missing")
    scale = found[_scale_name(weight.name)]
    shape = tuple(-(-size // block) for size, block in zip(weight.shape, config.fp8_block, strict=True))
    if scale.dtype not in ("F32", "F8_E8M0") or scale.shape != shape:
        raise CheckpointError(
            f"{scale.file}: tensor {scale.name}: {scale.dtype} {list(scale.shape)}, but it must be F32 or F8_E8M0 and "
            f"{list(shape)}, a scale for each block of {list(config.fp8_block)}"
        )
    return scale


def _is_stacked_expert(name: str) -> bool:
    return name.endswith(".mlp.experts.gate_up_proj")


def _stacked(config: DeepseekConfig) -> dict[str, tuple[int, ...]]:
    """`expected_tensors` in the layout transformers 5 holds in memory: gate rows first, then up rows."""
    tensors = {name: shape for name, shape in expected_tensors(config).items() if ".mlp.experts." not in name}
    experts, width, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
    for layer in filter(config.is_moe_layer, range(config.num_hidden_layers)):
        prefix = f"model.layers.{layer}.mlp.experts."
        tensors[prefix + "gate_up_proj"] = (experts, 2 * width, hidden)
        tensors[prefix + "down_proj"] = (experts, hidden, width)
    return tensors


def _experts_of(config: DeepseekConfig, found: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors of single experts, which lie one behind the other in the stacked ones."""
    experts = {}
    for layer in filter(config.is_moe_layer, range(config.num_hidden_layers)):
        prefix = f"model.layers.{layer}.mlp.experts."
        for stacked, names in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
            whole = found[prefix + stacked]
            shape = (whole.shape[1] // len(names), whole.shape[2])
            size = whole.nbytes // (config.n_routed_experts * len(names))
            for index in range(config.n_routed_experts * len(names)):
                name = f"{prefix}{index // len(names)}.{names[index % len(names)]}.weight"
                start = whole.start + index * size
                experts[name] = TensorInfo(name, shape, whole.dtype, whole.file, start, start + size)
    return experts


def _is_ignored(name: str, config: DeepseekConfig) -> bool:
    """Old files' rotation frequencies, multi-token-prediction layers, and the output projection of a tied model."""
    if name.endswith(".rotary_emb.inv_freq"):
        return True
    if name == "lm_head.weight":
        return config.tie_word_embeddings
    layer = re.match(r"model\.layers\.(\d{1,6})\.", name)
    return layer is not None and 0 <= int(layer[1]) - config.num_hidden_layers < config.num_nextn_predict_layers


def _compare_tied(embedding: TensorInfo, lm_head: TensorInfo) -> None:
    samples = []
    for tensor in (embedding, lm_head):
        with tensor.file.open("rb") as stream:
            samples.append((tensor.shape, tensor.dtype, _sample(stream.fileno(), tensor)))
    if samples[0] != samples[1]:
        logger.warning("%s: lm_head.weight differs from the embedding it is tied to and is ignored", lm_head.file)


def _sample(descriptor: int, tensor: TensorInfo) -> bytes:
    """Bytes from the beginning, middle and end of a tensor."""
    last = max(tensor.start, tensor.end - _SAMPLE_BYTES)
    places = (tensor.start, (tensor.start + last) // 2, last)
    return b"".join(os.pread(descriptor, min(_SAMPLE_BYTES, tensor.nbytes), place) for place in places)


def _listed(names: list[str]) -> str:
    """` a`, or `s a, b, c and 4 more`."""
    plural = "s" if len(names) > 1 else ""
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{plural} {', '.join(map(_short, names[:3]))}{rest}"


def _short(name: str) -> str:
    """A name of the file as one short printable line."""
    text = repr(name)[1:-1]
    return text if len(text) <= 120 else text[:117] + "..."
