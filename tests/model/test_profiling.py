"""The steps by which a GPU's pool is sized, and its decoding steps prepared; here a CPU runs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from model.batch import ForwardBatch
from model.checkpoint import open_checkpoint
from model.config import load_config
from model.latent_cache import LatentCache
from model.ops.eager.ops import EagerOps
from model.runner import ModelRunner, _memory_beside_steps, load_runner
from tests.checkpoints import make_checkpoint

Steps = list[tuple[int, list[tuple[int, int]]]]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    """Of every step the blocks of its pool, and start and length of each row."""
    steps: Steps = []
    execute = ModelRunner.execute

    def watched(self: ModelRunner, batch: ForwardBatch) -> Any:
        steps.append((self.num_blocks, [(row.start, row.num_tokens) for row in batch.rows]))
        return execute(self, batch)

    monkeypatch.setattr(ModelRunner, "execute", watched)
    return steps


def load(path: Path) -> ModelRunner:
    return load_runner(path, max_num_seqs=6, num_threads=1, num_blocks=8, progress=False)


def test_the_largest_steps_need_no_pool(tmp_path: Path, steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_checkpoint(tmp_path, "v2-yarn")
    model = load(path).model
    steps.clear()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (7000 + len(steps), 9000))
    checkpoint = open_checkpoint(path, load_config(path))
    config = model.config
    cache = LatentCache(1, config.num_hidden_layers, config.latent_dim, torch.float32)
    assert _memory_beside_steps(model, checkpoint, cache, 900, 6, 100) == 7002, "asked before both steps have run"
    assert steps == [(1, [(799, 100)]), (1, [(1, 1)] * 6)]
    steps.clear()
    assert _memory_beside_steps(model, checkpoint, cache, 90, 6, 100) == 7002
    assert steps[0] == (1, [(0, 89)])


def test_decoding_steps_are_prepared_from_the_largest_on(
    tmp_path: Path, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EagerOps, "decode_sizes", (1, 2, 4, 8, 16))
    runner = load(make_checkpoint(tmp_path, "v2"))
    assert [len(rows) for _, rows in steps] == [6, 4, 2, 1, 1, 1]
    assert all(row is None for row in runner._rows._params)
