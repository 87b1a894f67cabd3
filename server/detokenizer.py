"""From token ids to text while they arrive: whole characters only, and nothing of a stop string leaks out.

The text is that of the tokens' bytes, joined and decoded as UTF-8 with U+FFFD for what is not: however the ids are
grouped into `push` calls, all returned pieces together are the same text.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Iterable, Sequence
from typing import Protocol

_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class TokenBytes(Protocol):
    """What is needed of `server.tokenizer.Tokenizer`."""

    def token_bytes(self, token_id: int, /) -> bytes: ...
    def is_special(self, token_id: int, /) -> bool: ...


class Detokenizer:
    """The text of one answer. Not to be used after `finish`.

    A stop string matches on text, across tokens. The match that ends first wins; of those that end at the same
    character, the longest. Text is held back only while it is the beginning of a stop string.
    `shown`: special tokens that are text all the same, as marks that somebody looks for.
    """

    def __init__(
        self,
        tokenizer: TokenBytes,
        *,
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
        include_stop: bool = False,
        shown: Collection[int] = (),
        min_tokens: int = 0,
    ) -> None:
        """Text of the first `min_tokens` tokens is no part of a stop string."""
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._include_stop = include_stop
        self._shown = frozenset(shown)
        self._min_tokens = min_tokens
        self._utf8 = _utf8_decoder("replace")
        self._stops = _StopAutomaton(stop) if stop else None
        self._state = 0
        self._held = ""
        """The longest end of the text that begins a stop string."""
        self.stopped: str | None = None
        """The stop string that matched; everything pushed after it is dropped."""
        self.num_tokens = 0
        """Tokens the text was made of, up to and including the one that completed the stop string."""

    def push(self, token_ids: Iterable[int]) -> str:
        """Adds tokens; returns the text that is certain now."""
        if self._stops is None:
            ids = list(token_ids)
            self.num_tokens += len(ids)
            return self._utf8.decode(b"".join(map(self._bytes, ids)))
        text = ""
        for token_id in token_ids:
            if self.stopped is not None:
                break
            self.num_tokens += 1
            new = self._utf8.decode(self._bytes(token_id))
            text += new if self.num_tokens < self._min_tokens else self._scan(new)
        return text

    def finish(self) -> str:
        """Ends the text: returns what was held back, with U+FFFD for an incomplete character."""
        text = self._scan(self._utf8.decode(b"", final=True))
        text, self._held = text + self._held, ""
        return text

    def _bytes(self, token_id: int) -> bytes:
        if self._skip_special_tokens and token_id not in self._shown and self._tokenizer.is_special(token_id):
            return b""
        return self._tokenizer.token_bytes(token_id)

    def _scan(self, new: str) -> str:
        if self._stops is None:
            return new
        if self.stopped is not None:
            return ""
        text = self._held + new
        for end, char in enumerate(new, start=len(self._held) + 1):
            self._state = self._stops.step(self._state, char)
            if (stop := self._stops.match[self._state]) is not None:
                self.stopped = stop
                self._held = ""
                return text[: end if self._include_stop else end - len(stop)]
        safe = len(text) - self._stops.depth[self._state]
        self._held = text[safe:]
        return text[:safe]


class _StopAutomaton:
    """Aho-Corasick: one state is one beginning of a stop string, the longest that the text so far ends with.

    Its depth is thus exactly what has to be held back, and a text of n characters costs O(n) steps however many
    stop strings there are.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._fallback = [0]
        self.depth = [0]
        """Characters of the beginning that a state stands for."""
        self.match: list[str | None] = [None]
        """The longest stop string that ends in a state."""
        for stop in stops:
            if not stop:
                raise ValueError("a stop string must not be empty")
            state = 0
            for char in stop:
                if char not in self._next[state]:
                    self._next[state][char] = len(self._next)
                    self._next.append({})
                    self._fallback.append(0)
                    self.depth.append(self.depth[state] + 1)
                    self.match.append(None)
                state = self._next[state][char]
            self.match[state] = stop
        # Breadth first, so that the fallback of a state, which is shorter, is known before its own.
        queue = list(self._next[0].values())
        for state in queue:
            for char, target in self._next[state].items():
                self._fallback[target] = self.step(self._fallback[state], char)
                if self.match[target] is None:
                    self.match[target] = self.match[self._fallback[target]]
                queue.append(target)

    def step(self, state: int, char: str) -> int:
        while char not in self._next[state]:
            if state == 0:
                return 0
            state = self._fallback[state]
        return self._next[state][char]
