"""Packed weights kept on disk, so that the next start reads them instead of packing (`--weights-cache`).

One safetensors file for each checkpoint, quantisation and build of the kernels. Its weights are read, not mapped:
the pages of a mapped file are small, which makes every token slower for good, and a file that shrinks kills who has
mapped it. Reading checks every byte.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import stat
import time
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import msgspec
from torch import Tensor

from model.checkpoint import Checkpoint, TensorInfo, read_header, read_metadata
from model.config import CheckpointError
from model.large_pages import LargePages
from model.memory import in_gib
from model.ops.interface import LinearWeight, PackedWeight

logger = logging.getLogger(__name__)

Kept = dict[str, Sequence[LinearWeight]]
"""Packed weights by name, as `model.deepseek.Weights.packed` returns them."""

_PIECE_BYTES = 4 << 20
_KEY, _ENTRIES = "key", "weights"
"""Keys of the file's metadata."""


class _Entry(msgspec.Struct, array_like=True):
    """What the file says of a packed weight besides its bytes."""

    name: str
    index: int
    """Among those of the same name."""
    format: int
    out_features: int
    in_features: int
    checksum: int
    """CRC-32 of the fields above and the bytes."""

    def seed(self, shape: Sequence[int]) -> int:
        fields = (self.name, self.index, self.format, self.out_features, self.in_features, *shape)
        return zlib.crc32(repr(fields).encode())


class WeightsCache:
    def __init__(self, folder: Path, checkpoint: Checkpoint, packing: str, threads: int) -> None:
        """`packing` says how weights are packed (`Ops.packing`). Nothing is read or written yet.

        Raises CheckpointError where everybody may write into `folder`: what lies there would be served unseen.
        """
        _require_private(folder)
        key = repr((checkpoint.fingerprint, checkpoint.file_stamps, packing))
        self._key = hashlib.sha256(key.encode()).hexdigest()
        self._threads = threads
        model = next(iter(checkpoint.by_file())).parent.name
        self.file = folder / f"{model}-{self._key[:16]}.safetensors"

    def read(self) -> Kept | None:
        """What an earlier start has written; None, with a line in the log, where there is nothing or it is damaged."""
        if not self.file.exists():
            logger.info("weights cache: nothing yet for this model in %s", self.file.parent)
            return None
        started = time.monotonic()
        try:
            kept = self._read()
        except (CheckpointError, msgspec.MsgspecError) as error:
            logger.warning("weights cache: damaged, packing again: %s", error)
            return None
        except OSError as error:
            logger.warning("weights cache: %s: %s; packing again", self.file, error.strerror)
            return None
        size, seconds = in_gib(self.file.stat().st_size), time.monotonic() - started
        logger.info("weights cache: %s from %s in %.1f s", size, self.file, seconds)
        return kept

    def write(self, made: Mapping[str, Sequence[LinearWeight]]) -> None:
        """For the next start. Another start that is writing the same is left to it; a disk that is full, or whatever
        else goes wrong, costs a warning."""
        temporary = self.file.with_suffix(".tmp")
        started = time.monotonic()
        try:
            self.file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Not opened to be emptied: who has the lock may be writing it.
            with os.fdopen(os.open(temporary, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not os.path.exists(temporary) or not os.path.samestat(os.fstat(stream.fileno()), temporary.stat()):
                    return  # it has just been finished by another
                try:
                    self._write(stream, made)
                    temporary.replace(self.file)
                except OSError:
                    temporary.unlink(missing_ok=True)
                    raise
            _sync(self.file.parent)
        except BlockingIOError:
            logger.info("weights cache: another start is writing %s", self.file)
        except OSError as error:
            logger.warning("weights cache: %s: %s; nothing is kept", self.file, error.strerror)
        else:
            logger.info("weights cache: %s written in %.1f s", self.file, time.monotonic() - started)

    def _read(self) -> Kept:
        metadata = read_metadata(self.file)
        if metadata.get(_KEY) != self._key:
            raise CheckpointError(f"{self.file}: of another model")
        entries = msgspec.json.decode(metadata.get(_ENTRIES, ""), type=list[_Entry])
        tensors = read_header(self.file)
        if len(entries) != len(tensors):
            raise CheckpointError(f"{self.file}: {len(tensors)} tensors, described are {len(entries)}")
        with self.file.open("rb") as stream, ThreadPoolExecutor(self._threads) as pool:
            pages = LargePages()
            read = [
                pool.submit(_read_tensor, stream, tensor, entry, pages.empty(*tensor.shape))
                for tensor, entry in zip(tensors, entries, strict=True)
            ]
            weights = [future.result() for future in read]
        kept: dict[str, list[LinearWeight]] = {}
        for entry, weight in zip(entries, weights, strict=True):
            kept.setdefault(entry.name, []).append(weight)
        return dict(kept)

    def _write(self, stream: BinaryIO, made: Mapping[str, Sequence[LinearWeight]]) -> None:
        entries, tensors = [], []
        for name, weights in made.items():
            for index, weight in enumerate(weights):
                assert isinstance(weight, PackedWeight)
                tensors.append(weight.data)
                entries.append(_Entry(name, index, int(weight.format), weight.out_features, weight.in_features, 0))
        with ThreadPoolExecutor(self._threads) as pool:
            for entry, checksum in zip(entries, pool.map(_checksum, entries, tensors), strict=True):
                entry.checksum = checksum
        header: dict[str, object] = {"__metadata__": {_KEY: self._key, _ENTRIES: msgspec.json.encode(entries).decode()}}
        end = 0
        for entry, tensor in zip(entries, tensors, strict=True):
            start, end = end, end + tensor.nbytes
            name = f"{entry.name}.{entry.index}"
            header[name] = {"dtype": "U8", "shape": list(tensor.shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        stream.truncate(0)
        os.posix_fallocate(stream.fileno(), 0, 8 + len(text) + end)  # a full disk is known before anything is written
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            for piece in _pieces(tensor):
                stream.write(piece)
        stream.flush()
        os.fsync(stream.fileno())


def _read_tensor(stream: BinaryIO, tensor: TensorInfo, entry: _Entry, data: Tensor) -> PackedWeight:
    offset, checksum = tensor.start, entry.seed(tensor.shape)
    for piece in _pieces(data):
        if os.preadv(stream.fileno(), [piece], offset) != len(piece):
            raise CheckpointError(f"{tensor.file}: tensor {tensor.name}: the file has shrunk")
        offset += len(piece)
        checksum = zlib.crc32(piece, checksum)
    if checksum != entry.checksum:
        raise CheckpointError(f"{tensor.file}: tensor {tensor.name}: its checksum is wrong")
    return PackedWeight(data, entry.format, entry.out_features, entry.in_features)


def _checksum(entry: _Entry, tensor: Tensor) -> int:
    checksum = entry.seed(tensor.shape)
    for piece in _pieces(tensor):
        checksum = zlib.crc32(piece, checksum)
    return checksum


def _pieces(tensor: Tensor) -> list[memoryview]:
    """The bytes of a contiguous uint8 tensor, which fit in a core's caches one by one."""
    whole = memoryview(tensor.view(-1).numpy().data)
    return [whole[start : start + _PIECE_BYTES] for start in range(0, len(whole), _PIECE_BYTES)]


def _require_private(folder: Path) -> None:
    """Its checksums find damage, not malice: anybody can compute them."""
    try:
        status = folder.stat()
    except OSError:
        return  # it is made, or the reason why not is told, when there is something to write
    if status.st_uid not in (os.geteuid(), 0) or status.st_mode & stat.S_IWOTH:
        raise CheckpointError(f"{folder}: weights cache: the folder must be yours or root's, and not open to everybody")


def _sync(folder: Path) -> None:
    """Makes a rename last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
