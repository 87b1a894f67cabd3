"""Drafts by prompt lookup: what followed the newest few tokens the last time they occurred in prompt or output.

It costs no second model, and where a text repeats its prompt (edits, quotations, structured data) most guesses are
right. A draft costs about as much as a third of a step, whatever becomes of it, so that one is made only where it will
probably be accepted; how probable that is follows from how many tokens agree, and from what became of the request's
drafts so far. There is no clock in it: the same tokens give the same drafts.
"""

from __future__ import annotations

from array import array

MAX_DRAFTS = 8
MIN_MATCH, MAX_MATCH = 2, 8
"""Fewest tokens that must agree, and most that are compared."""
INDEXED_MATCHES = (4, 3, 2)
"""Of so many tokens the last place of each is known; longest first."""
COST = 0.3
"""Of a draft, in steps of one token: on a CPU, where it brings experts of its own, 0.25 to 0.4."""
MEMORY = 16
"""How many observations an estimate looks back on."""
INDEXED_A_STEP = 512
"""Tokens of a long prompt that are indexed at once, in 0.4 ms; the others wait for the next steps."""


class NgramDrafter:
    """The drafts of one request. `tokens`, prompt and output, is read again each time and may only grow."""

    def __init__(self, tokens: array[int]) -> None:
        self._tokens = tokens
        self._indexed = MIN_MATCH
        """Matches that end before this place are in the table."""
        self._table = _table_for(len(tokens))
        """Hash of a match -> place behind its last occurrence; 0 for none, and the later where two collide."""
        self._accepted = [n / (n + 1) for n in range(MAX_MATCH + 1)]
        """By the number of tokens that agree, how probable it is that the next one does, too."""
        self._match = 0
        """Tokens that agreed when drafts were made last."""

    def index(self) -> None:
        """Go on with the index, at most by INDEXED_A_STEP tokens."""
        tokens = self._tokens
        if len(tokens) * len(INDEXED_MATCHES) > len(self._table):
            self._table = _table_for(len(tokens))
            self._indexed = MIN_MATCH
        table, mask = self._table, len(self._table) - 1
        # The match at the very end is what is looked for, and nothing follows it yet.
        stop = min(len(tokens), self._indexed + INDEXED_A_STEP)
        for place in range(self._indexed, stop):
            c, d = tokens[place - 2], tokens[place - 1]
            table[hash((c, d)) & mask] = place
            if place > 3:
                a, b = tokens[place - 4], tokens[place - 3]
                table[hash((a, b, c, d)) & mask] = place
                table[hash((b, c, d)) & mask] = place
        self._indexed = max(self._indexed, stop)

    def propose(self) -> list[int]:
        """What probably follows, at most MAX_DRAFTS tokens; nothing where that is too uncertain."""
        self.index()
        self._match, place = self._find()
        if not place:
            return []
        estimate = self._accepted[self._match]
        count, probability = 0, estimate
        while probability >= COST and count < MAX_DRAFTS:
            count += 1
            probability *= estimate
        if not count:  # but not for ever
            self._accepted[self._match] += (self._match / (self._match + 1) - estimate) / (4 * MEMORY)
        period = len(self._tokens) - place  # what goes on beyond the end repeats itself
        return [self._tokens[place + i % period] for i in range(count)]

    def observe(self, num_drafts: int, num_accepted: int) -> None:
        """What became of the last proposal, or of the beginning of it that was computed."""
        estimate = self._accepted[self._match]
        for _ in range(num_accepted):
            estimate += (1 - estimate) / MEMORY
        if num_accepted < num_drafts:
            estimate -= estimate / MEMORY
        self._accepted[self._match] = estimate

    def _find(self) -> tuple[int, int]:
        """How many of the newest tokens occurred before, and the place behind them there; (0, 0) if they did not."""
        tokens, table = self._tokens, self._table
        end = len(tokens)
        for count in INDEXED_MATCHES:
            newest = tokens[-count:]
            place = table[hash(tuple(newest)) & (len(table) - 1)]
            if place and tokens[place - count : place] == newest:
                while count < min(MAX_MATCH, place) and tokens[place - count - 1] == tokens[end - count - 1]:
                    count += 1
                return count, place
        return 0, 0


def _table_for(num_tokens: int) -> array[int]:
    """All 0, with more places than so many tokens have matches: one to two times as many."""
    size = 1 << max(10, (len(INDEXED_MATCHES) * num_tokens).bit_length())
    return array("i", bytes(4 * size))
