"""What is asked of every server, which figure of it counts, and how far ahead of the best peer latentd has to be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias


@dataclass(frozen=True)
class Scenario:
    clients: int
    """So many requests are sent at once, one by each client."""
    prompt: int
    """Tokens, drawn anew for every request, so that no prefix cache helps."""
    output: int
    """Tokens, greedy; the end of the text is ignored."""
    runs: int = 3


SCENARIOS = {
    "c1": Scenario(1, 128, 128),
    "c4": Scenario(4, 128, 128),
    "c8": Scenario(8, 128, 128),
    "c16": Scenario(16, 128, 128),
    "c4p1k": Scenario(4, 1024, 64),
    "p2k": Scenario(1, 2048, 32),
    "p8k": Scenario(1, 8192, 16, runs=1),
    "t1": Scenario(1, 64, 64, runs=5),
    "t16": Scenario(16, 64, 64, runs=5),
    "t64": Scenario(64, 64, 64, runs=5),
}

Figure: TypeAlias = Literal["output_tok_s", "ttft_s", "tpot_s"]


@dataclass(frozen=True)
class Column:
    title: str
    scenario: str
    figure: Figure
    targets: dict[str, float]
    """Precision to the least ratio to the best peer: of tokens a second, or of the peer's time to ours."""


COLUMNS = (
    Column("c=1", "c1", "output_tok_s", {"bf16": 1.4, "8-bit": 1.6, "4-bit": 1.5}),
    Column("c=1, decode alone", "c1", "tpot_s", {"8-bit": 1.2, "4-bit": 1.5}),
    Column("c=4", "c4", "output_tok_s", {"bf16": 1.6, "8-bit": 2.5, "4-bit": 2.5}),
    Column("c=8", "c8", "output_tok_s", {"bf16": 1.7, "8-bit": 3.0, "4-bit": 3.0}),
    Column("c=16", "c16", "output_tok_s", {"bf16": 1.8, "8-bit": 3.0, "4-bit": 3.0}),
    Column("c=4, 1K prompts", "c4p1k", "output_tok_s", {"bf16": 1.7, "8-bit": 4.0, "4-bit": 4.0}),
    Column("2K prompt, first token", "p2k", "ttft_s", {"bf16": 1.7, "8-bit": 6.0, "4-bit": 5.0}),
    Column("8K prompt, first token", "p8k", "ttft_s", {"bf16": 1.8}),
    Column("decode at 8K context", "p8k", "tpot_s", {"bf16": 3.5}),
    Column("tiny, c=1", "t1", "output_tok_s", {"bf16": 1.0}),
    Column("tiny, c=16", "t16", "output_tok_s", {"bf16": 2.0}),
    Column("tiny, c=64", "t64", "output_tok_s", {"bf16": 2.0}),
)
