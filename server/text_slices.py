"""Long texts in slices whose tokens, joined, are those of the whole text.

A tokenizer takes a hundred bytes of memory for each byte of its text, so a long text must come in slices; and between
two slices it may be another request's turn. Tokens never reach over the pieces that the pre-tokenizer makes,
so a text may be cut between two of them, if the pieces behind the cut are the same when it is where a text begins.
That is so where letters, digits, spaces and signs change: the patterns in use look one character ahead at most.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import tokenizers

from server import limits

SLICE = 65_536
"""Characters after which the next place for a cut is looked for."""
WINDOW = 2048
"""Characters before and behind such a place that the pre-tokenizer sees, so that where they begin does not matter."""
_KINDS = {"Split", "Digits", "ByteLevel"}


class UnbrokenTextError(ValueError):
    """A text has no place for a cut over more characters than anything written has."""


class TextSlicer:
    """`added`: the texts that are one token each wherever they stand. No cut falls into one of them."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, added: Sequence[str]) -> None:
        self._added = [text for text in added if text.strip()]
        self._longest = max(map(len, self._added), default=0)
        self._pre_tokenizer = tokenizer.pre_tokenizer if _can_be_cut(tokenizer) else None

    def slices(self, text: str) -> Iterator[str]:
        """Raises UnbrokenTextError. A tokenizer that does not cut texts into pieces by patterns gets them whole."""
        start = 0
        if self._pre_tokenizer is not None:
            while len(text) - start > SLICE:
                cut = self._cut_behind(text, start + SLICE)
                if cut is None:
                    break
                yield text[start:cut]
                start = cut
        yield text[start:]

    def _cut_behind(self, text: str, position: int) -> int | None:
        """The first place for a cut at `position` or behind it; None where the rest is short."""
        unbroken = limits.UNBROKEN_TEXT.maximum
        for begin in range(position, len(text), WINDOW):
            cut = self._first_cut(text, begin, min(begin + WINDOW, len(text) - WINDOW))
            if cut is not None:
                return cut
            if begin - position > unbroken:
                raise UnbrokenTextError(f"it has more than {unbroken} characters without a break")
        return None

    def _first_cut(self, text: str, begin: int, end: int) -> int | None:
        kinds = [_kind(char) for char in text[begin - 1 : end]]
        # What a run of spaces is cut into depends on what is behind it.
        changes = [
            at
            for at in range(begin, end)
            if kinds[at - begin] != kinds[at - begin + 1]
            and not text[at : at + 2].isspace()
            and not text[at - 2 : at].isspace()
        ]
        if not changes:
            return None
        assert self._pre_tokenizer is not None
        low = max(0, begin - WINDOW)
        pieces = self._pre_tokenizer.pre_tokenize_str(text[low : end + WINDOW])
        edges = {low + start for _, (start, _) in pieces}
        return next((at for at in changes if at in edges and self._is_clear(text, at)), None)

    def _is_clear(self, text: str, at: int) -> bool:
        near = text[max(0, at - self._longest + 1) : at + self._longest - 1]
        return not any(added in near for added in self._added)


def _kind(char: str) -> int:
    return 0 if char.isspace() else 1 if char.isalpha() else 2 if char.isnumeric() else 3


def _can_be_cut(tokenizer: tokenizers.Tokenizer) -> bool:
    """Its pieces follow from patterns, and nothing is done to the beginning of a text."""
    if tokenizer.pre_tokenizer is None:
        return False
    if tokenizer.normalizer is not None and list(_states(tokenizer.normalizer, "normalizers")):
        return False
    states = list(_states(tokenizer.pre_tokenizer, "pretokenizers"))
    return {state["type"] for state in states} <= _KINDS and not any(state.get("add_prefix_space") for state in states)


def _states(component: Any, parts: str) -> Iterator[dict[str, Any]]:
    """The settings of a component that may be a sequence of others."""
    pending = [json.loads(component.__getstate__())]
    while pending:
        state = pending.pop()
        if state["type"] == "Sequence":
            pending += state[parts]
        else:
            yield state
