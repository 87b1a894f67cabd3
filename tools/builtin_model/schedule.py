"""What is trained when: the phases of a run and their rates, as functions of the tokens done."""

from __future__ import annotations

from dataclasses import dataclass

from tools.builtin_model.optimiser import Rates

BATCH_TOKENS = 4096
SHORT_TOKENS = 4_000_000
RECALL_START = 0.75
LONGEST_START = 0.92
"""Of all tokens; the last quarter has the long windows."""
DECAY_START = 0.7
FINAL_RATE = 0.02
WARM_UP_STEPS = 20


@dataclass(frozen=True)
class Phase:
    name: str
    window: int
    """Tokens"""
    shares: dict[str, float]
    """Of the tokens, by mix. Copying is lost again where it has too small a share."""
    rates: Rates


SHORT = Phase("short", 256, {"short": 0.7, "copy": 0.3}, Rates(0.010, 2e-3))
LONG = Phase("long", 512, {"long": 0.75, "copy": 0.25}, Rates(0.005, 2e-3))
RECALL = Phase("recall", 1024, {"long": 0.4, "recall": 0.4, "copy": 0.2}, Rates(0.005, 2e-3))
LONGEST = Phase("longest", 2048, RECALL.shares, RECALL.rates)


@dataclass(frozen=True)
class Schedule:
    tokens: int
    """Of the whole run"""
    from_checkpoint: bool = False
    """Whether the weights are trained already: then there is no phase of short windows."""

    def phase(self, done: int) -> Phase:
        if done < min(SHORT_TOKENS, 0.4 * self.tokens) and not self.from_checkpoint:
            return SHORT
        if done < RECALL_START * self.tokens:
            return LONG
        return RECALL if done < LONGEST_START * self.tokens else LONGEST

    def rates(self, done: int, steps: int) -> Rates:
        """After `done` tokens and `steps` steps of this process: constant, then linear to 2 % at the last token."""
        left = (self.tokens - done) / ((1 - DECAY_START) * self.tokens)
        factor = min(1.0, max(left, FINAL_RATE)) * min(1.0, (steps + 1) / WARM_UP_STEPS)
        rates = self.phase(done).rates
        return Rates(rates.matrices * factor, rates.others * factor)
