"""lm-eval's `local-completions` against LATENTD_URL: every log-likelihood must be that of the plain reference.

Run in an environment that has lm-eval and, by path, everything of ours (`make test-lm-eval`).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager

from model.config import load_config
from model.reference import reference_logits
from server.settings import BUILTIN_MODEL, BUILTIN_MODEL_NAME
from tests.checkpoints import read_tensors

TOLERANCE = 1e-3
ITEMS = [
    {"query": "The sea is", "choices": [" blue", " deep and cold", " a number"], "gold": 0},
    {"query": "def add(a, b):\n    return", "choices": [" a + b", " a - b", " None"], "gold": 0},
    {"query": "Zürich liegt in der", "choices": [" Schweiz", " Nähe von Tōkyō 東京", " See"], "gold": 0},
    {"query": "Water boils at " * 30, "choices": ["100 degrees", "zero degrees"], "gold": 0},
    {"query": "Once upon a time, in a land far away,", "choices": [" there lived a king.", " 🙂🙂"], "gold": 0},
]


class Recorded(LocalCompletionsAPI):
    """Remembers which ids were scored and what came back."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.scored: list[tuple[list[int], list[int], tuple[float, bool]]] = []

    def _loglikelihood_tokens(self, requests: Any, **more: Any) -> Any:
        answers = super()._loglikelihood_tokens(requests, **more)
        self.scored += [(context, rest, answer) for (_, context, rest), answer in zip(requests, answers, strict=True)]
        return answers


def run(url: str, folder: Path, **options: Any) -> int:
    """Evaluates once and returns how many scores were compared."""
    data = folder / "items.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in ITEMS), encoding="utf-8")
    task = {
        "task": "local_scores",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "local_scores.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    model = Recorded(
        base_url=f"{url}/v1/completions",
        model=BUILTIN_MODEL_NAME,
        num_concurrent=2,
        max_retries=1,
        batch_size=3,
        **options,
    )
    result = simple_evaluate(
        model, tasks=["local_scores"], task_manager=TaskManager(include_path=str(folder), include_defaults=False)
    )
    assert result["results"]["local_scores"]["sample_len"] == len(ITEMS)
    config, weights = load_config(BUILTIN_MODEL), read_tensors(BUILTIN_MODEL)
    weights = {name: tensor.float() for name, tensor in weights.items()}
    for context, rest, (score, is_greedy) in model.scored:
        logits = reference_logits(config, weights, [*context, *rest]).float()[len(context) - 1 : -1]
        scores = logits.log_softmax(-1)
        expected = scores[range(len(rest)), rest].sum().item()
        assert abs(score - expected) <= TOLERANCE, (score, expected)
        assert is_greedy == (logits.argmax(-1).tolist() == rest)
    return len(model.scored)


def main() -> int:
    torch.set_num_threads(1)
    url = os.environ["LATENTD_URL"]
    with tempfile.TemporaryDirectory() as folder:
        local = run(url, Path(folder), tokenizer=str(BUILTIN_MODEL), tokenizer_backend="huggingface")
        remote = run(url, Path(folder), tokenizer_backend="remote")
    assert local == remote == sum(len(item["choices"]) for item in ITEMS)
    print(f"{local} log-likelihoods within {TOLERANCE} of the reference, with a local and with a remote tokenizer")
    return 0


if __name__ == "__main__":
    sys.exit(main())
