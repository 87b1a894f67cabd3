from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from model.config import DeepseekConfig, load_config
from model.pool_size import ConfigError, PoolSize, size_pool
from tests.checkpoints import make_checkpoint

GIB = 1 << 30


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DeepseekConfig:
    path: Path = tmp_path_factory.mktemp("checkpoint")
    return load_config(make_checkpoint(path, "v2", max_position_embeddings=4096))


def size(config: DeepseekConfig, blocks_free: float, **options: Any) -> PoolSize:
    """`blocks_free`: how many blocks the free memory would hold."""
    token = config.cache_bytes_per_token(2)
    free = int(blocks_free * token * 64)
    return size_pool(config, free_bytes=free, bytes_per_token=token, **{"max_num_seqs": 4} | options)


def test_with_memory_to_spare_every_row_can_be_full(config: DeepseekConfig) -> None:
    assert size(config, 1e6) == PoolSize(num_blocks=4 * 64, max_model_len=4096)
    assert size(config, 1e6, max_model_len=100) == PoolSize(num_blocks=4 * 2, max_model_len=100)


def test_by_default_a_share_of_the_free_memory_is_taken(config: DeepseekConfig) -> None:
    assert size(config, 500) == PoolSize(num_blocks=200, max_model_len=4096)


def test_a_machine_that_does_nothing_else_can_give_more(config: DeepseekConfig) -> None:
    assert size(config, 200, share=0.9) == PoolSize(num_blocks=180, max_model_len=4096)


def test_one_full_request_may_take_more_than_the_share(config: DeepseekConfig) -> None:
    assert size(config, 100) == PoolSize(num_blocks=64, max_model_len=4096)


def test_a_length_nobody_asked_for_is_cut_to_what_fits(config: DeepseekConfig) -> None:
    assert size(config, 50) == PoolSize(num_blocks=45, max_model_len=45 * 64)
    assert size(config, 1e6, num_blocks=3) == PoolSize(num_blocks=3, max_model_len=192)


def test_blocks_win_over_bytes_which_win_over_the_default(config: DeepseekConfig) -> None:
    block_bytes = config.cache_bytes_per_token(2) * 64
    assert size(config, 1e6, kv_cache_memory=block_bytes * 70 + 5).num_blocks == 70
    assert size(config, 1e6, kv_cache_memory=block_bytes * 70, num_blocks=80).num_blocks == 80


@pytest.mark.parametrize(
    ("blocks_free", "options", "words"),
    [
        (1e6, {"max_model_len": 4097}, "max_model_len 4097 .*max_position_embeddings, 4096"),
        (1e6, {"max_model_len": 1}, "max_model_len 1 leaves no room"),
        (1e6, {"max_model_len": 4096, "num_blocks": 63}, "max_model_len 4096 needs 64 blocks .*num_blocks 63 gives 63"),
        (60, {"max_model_len": 4096}, "max_model_len 4096 needs 64 blocks .*free memory.* gives 54"),
        (100, {"num_blocks": 91}, "num_blocks 91 needs .* at most 90 blocks fit"),
        (100, {"kv_cache_memory": 1 << 40}, "kv_cache_memory 1024.00 GiB needs .* at most 90 blocks fit"),
        (100, {"kv_cache_memory": 100}, "kv_cache_memory 0.00 GiB holds no block of 64 tokens"),
        (0.5, {}, "the free memory, 0.00 GiB, holds no block"),
    ],
)
def test_what_cannot_be_met_is_refused_in_one_line(
    config: DeepseekConfig, blocks_free: float, options: dict[str, int], words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        size(config, blocks_free, **options)
    assert "\n" not in str(caught.value)
