"""Quick scores: how many answers the network would give token for token, without generating them.

Every token of the right answer must be the likeliest one after the tokens before it; that is so exactly where greedy
decoding gives the whole answer. Answers that a laxer match would take as right count as wrong here.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from model.config import DeepseekConfig
from tools.builtin_model import questions
from tools.builtin_model.documents import encode
from tools.builtin_model.layout import Weights
from tools.builtin_model.network import Network, attention_bias
from tools.builtin_model.windows import Mix

ROW_TOKENS = 16_000
"""Of a row's questions as many are asked as have so many tokens: all 40, but for the longest codes."""
WINDOW = 512
"""Questions are packed to about so many tokens; longer ones are alone."""

Asked = tuple[int, list[int], list[int]]
"""Row (or VALIDATION), tokens, and the places in them that are answers."""
VALIDATION = -1


class Scorer:
    """One of several processes that share the questions: `measure` gives sums, to be added over the processes."""

    def __init__(
        self, config: DeepseekConfig, tokenizer: Tokenizer, validation: Mix, rank: int, processes: int
    ) -> None:
        self.network = Network(config, torch.bfloat16)
        self.rows: list[str] = []
        asked: list[Asked] = []
        spent: dict[str, int] = {}
        for question in questions.load():
            if question.row not in spent:
                self.rows.append(question.row)
            token_ids, loss_weights = encode(question.document(), tokenizer)
            answer = [place for place, weight in enumerate(loss_weights) if weight]
            spent[question.row] = spent.get(question.row, 0) + len(token_ids)
            if spent[question.row] <= ROW_TOKENS:
                asked.append((self.rows.index(question.row), token_ids, answer))
        for start, stop in zip(validation.starts, validation.starts[1:], strict=False):
            aimed = validation.weights[start:stop].nonzero()[0]
            asked.append((VALIDATION, validation.tokens[start:stop].tolist(), aimed.tolist()))
        self.windows = _packed(asked[rank::processes])

    @torch.inference_mode()
    def measure(self, weights: Weights) -> Tensor:
        """[rows + 1, 2] float64: right and asked; last the sum of the validation targets' losses and their number."""
        sums = torch.zeros(len(self.rows) + 1, 2, dtype=torch.float64)
        for window in self.windows:
            token_ids = torch.tensor([[token for _, tokens, _ in window for token in tokens]])
            numbers = [number for number, (_, tokens, _) in enumerate(window) for _ in tokens]
            hidden, _ = self.network.hidden(weights, token_ids, attention_bias(torch.tensor([numbers]), torch.bfloat16))
            start = 0
            for row, tokens, aimed in window:
                before = torch.tensor(aimed) + (start - 1)
                logits = self.network.logits(weights, hidden[0, before]).float()
                targets = token_ids[0, before + 1]
                if row == VALIDATION:
                    loss = F.cross_entropy(logits, targets, reduction="sum").double()
                    sums[row] += torch.stack((loss, torch.tensor(float(len(aimed)), dtype=torch.float64)))
                else:
                    sums[row, 0] += bool((logits.argmax(-1) == targets).all())
                    sums[row, 1] += 1
                start += len(tokens)
        return sums

    def report(self, sums: Tensor) -> dict[str, Any]:
        """`sums` of all processes together -> the validation loss, and [right, asked] by row."""
        *rows, (loss, number) = sums.tolist()
        return {"validation": loss / number, "rows": dict(zip(self.rows, rows, strict=True))}


def _packed(asked: list[Asked]) -> list[list[Asked]]:
    windows: list[list[Asked]] = []
    room = 0
    for question in sorted(asked, key=lambda question: len(question[1])):
        size = len(question[1])
        if size > room:
            windows.append([])
            room = WINDOW
        windows[-1].append(question)
        room -= size
    return windows


def table(report: dict[str, Any]) -> str:
    rows = "  ".join(f"{name} {right:.0f}/{asked:.0f}" for name, (right, asked) in report["rows"].items())
    return f"validation loss {report['validation']:.3f}  {rows}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, help="folder that `data` wrote")
    parser.add_argument("--run", type=Path, required=True, help="folder that `train` wrote")


def run(arguments: argparse.Namespace) -> None:
    """Prints the scores of a run's averaged weights, in one process."""
    from tools.builtin_model.state import load_state, open_data

    opened = open_data(arguments.data)
    state = load_state(arguments.run)
    scorer = Scorer(opened.config, opened.tokenizer, opened.mixes["val"], 0, 1)
    report = scorer.report(scorer.measure(opened.layout.views(state.average)))
    for name, (right, asked) in report["rows"].items():
        print(f"{name:24} {right:3.0f} of {asked:3.0f}")
    print(f"validation loss {report['validation']:.4f} after {state.tokens:,} tokens")
