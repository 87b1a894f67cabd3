"""Packed weights on disk: read back bit for bit, never when anything is wrong with them, and never in the way."""

from __future__ import annotations

import fcntl
import logging
import os
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from model.checkpoint import open_checkpoint
from model.config import CheckpointError, load_config
from model.deepseek import DeepseekForCausalLM
from model.ops.cpu.library import Library, library
from model.ops.cpu.ops import CpuOps
from model.runner import load_runner
from model.weights import CheckpointWeights
from model.weights_cache import Kept, WeightsCache
from tests.checkpoints import make_checkpoint
from tests.model.harness import Driver, random_tokens

KERNELS = library()
pytestmark = pytest.mark.skipif(KERNELS is None, reason="the kernels are not built")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", "v2-yarn", dtype=torch.bfloat16, v_head_dim=32)


@pytest.fixture(autouse=True)
def _logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def cache_of(model: Path, folder: Path, packing: str = "a") -> WeightsCache:
    return WeightsCache(folder, open_checkpoint(model, load_config(model)), packing, 2)


def pack(model: Path, kept: Kept | None = None) -> Kept:
    """What is packed, beside what was kept."""
    assert KERNELS is not None
    config = load_config(model)
    with CheckpointWeights(open_checkpoint(model, config), torch.bfloat16, torch.device("cpu"), False, kept) as weights:
        DeepseekForCausalLM(config, CpuOps(KERNELS, 1), weights)
    return weights.made


def assert_equal(found: Kept | None, expected: Kept) -> None:
    assert found is not None
    assert found.keys() == expected.keys()
    for name, weights in expected.items():
        for one, other in zip(found[name], weights, strict=True):
            assert one[1:] == other[1:], name
            assert torch.equal(one[0], other[0]), name


def test_what_was_packed_is_read_back_and_not_packed_again(model: Path, tmp_path: Path) -> None:
    cache = cache_of(model, tmp_path / "kept" / "here")
    assert cache.read() is None
    made = pack(model)
    assert len(made) == 3 * 4 + 1 + 2 * 2 + 1
    cache.write(made)
    kept = cache_of(model, tmp_path / "kept" / "here").read()
    assert_equal(kept, made)
    assert pack(model, kept) == {}
    assert [file.name for file in cache.file.parent.iterdir()] == [cache.file.name]


def test_a_second_start_reads_the_file_and_answers_the_same(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def answer() -> torch.Tensor:
        options = {"dtype": "bfloat16", "num_threads": 1, "num_blocks": 8, "progress": False}
        runner = load_runner(model, **options, weights_cache=tmp_path / "kept")
        return Driver(runner.model).run(random_tokens(20, 256), 20)

    first = answer()
    assert "written" in caplog.text
    monkeypatch.setattr(Library, "pack", lambda *args: pytest.fail("packed again"))
    assert torch.equal(answer(), first)


def test_torch_keeps_nothing_and_says_so(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_runner(model, dtype="float32", num_threads=1, num_blocks=8, weights_cache=tmp_path / "kept", progress=False)
    assert "nothing is kept" in caplog.text
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("where", ["header", "description", "first", "middle", "last"])
def test_one_wrong_bit_is_found_and_the_file_made_anew(
    where: str, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = cache_of(model, tmp_path)
    made = pack(model)
    cache.write(made)
    data = bytearray(cache.file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    places = {"header": 3, "description": data.index(b'",0,0,') + 4, "first": start, "last": len(data) - 1}
    data[places.get(where, (start + len(data)) // 2)] ^= 1
    cache.file.write_bytes(data)
    caplog.clear()
    assert cache.read() is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(cache.file) in caplog.text
    cache.write(made)
    assert_equal(cache.read(), made)


@pytest.mark.parametrize("size", [0, 5, 2000, -1])
def test_a_torn_file_is_found(size: int, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = cache_of(model, tmp_path)
    cache.write(pack(model))
    os.truncate(cache.file, size if size >= 0 else cache.file.stat().st_size + size)
    assert cache.read() is None
    assert "damaged, packing again" in caplog.text


def test_another_model_another_edit_or_another_build_has_another_file(model: Path, tmp_path: Path) -> None:
    files = {cache_of(model, tmp_path).file, cache_of(model, tmp_path, "b").file}
    make_checkpoint(model, "v2-yarn", dtype=torch.bfloat16, v_head_dim=32, seed=1)
    files.add(cache_of(model, tmp_path).file)
    os.utime(model / "model.safetensors", (1, 1))
    files.add(cache_of(model, tmp_path).file)
    assert len(files) == 4


def test_a_file_under_another_models_name_is_not_taken(model: Path, tmp_path: Path) -> None:
    mine, other = cache_of(model, tmp_path), cache_of(model, tmp_path, "b")
    mine.write(pack(model))
    mine.file.rename(other.file)
    assert other.read() is None


def test_builds_of_the_kernels_are_told_apart(tmp_path: Path) -> None:
    assert KERNELS is not None
    assert CpuOps(KERNELS, 1).packing == CpuOps(KERNELS, 2).packing
    assert KERNELS.digest in CpuOps(KERNELS, 1).packing


def test_a_disk_without_room_costs_a_warning(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No file may become larger than the limit, which the system answers as it does a full disk."""
    cache, made = cache_of(model, tmp_path / "kept"), pack(model)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        cache.write(made)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "nothing is kept" in caplog.text
    assert not list((tmp_path / "kept").iterdir())


def test_a_folder_that_cannot_be_made_costs_a_warning(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    cache = cache_of(model, tmp_path / "file" / "kept")
    assert cache.read() is None
    cache.write(pack(model))
    assert "nothing is kept" in caplog.text


def test_one_of_two_starts_writes(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = cache_of(model, tmp_path)
    made = pack(model)
    with cache.file.with_suffix(".tmp").open("wb") as other:
        other.write(b"half a fi")
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        cache.write(made)
        assert "another start is writing" in caplog.text
        assert cache.file.with_suffix(".tmp").read_bytes() == b"half a fi"
        assert not cache.file.exists()
    cache.write(made)  # the other has died: its remains are written over
    assert_equal(cache.read(), made)
    assert not cache.file.with_suffix(".tmp").exists()


def test_many_starts_at_once(model: Path, tmp_path: Path) -> None:
    made = pack(model)

    def start(_: Any) -> None:
        cache = cache_of(model, tmp_path)
        kept = cache.read()
        if kept is None:
            cache.write(made)
        else:
            assert_equal(kept, made)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(start, range(40)))
    assert_equal(cache_of(model, tmp_path).read(), made)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_a_folder_that_everybody_may_write_to_is_refused_and_a_new_one_is_private(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(CheckpointError, match=r"cache: the folder must be yours"):
        cache_of(model, folder)
    folder.chmod(0o775)  # as Kubernetes' fsGroup and many users' umask make them
    cache_of(model, folder)
    cache_of(model, tmp_path / "new" / "cache").write(pack(model))
    assert (tmp_path / "new" / "cache").stat().st_mode & 0o777 == 0o700
