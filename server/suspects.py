"""Prompts that were being computed when engines died: what kills one engine after the other must not come again."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

REFUSED_SECONDS = 600.0
_DEATHS = 2
"""One may be a coincidence: everything that ran beside the culprit is suspected with it."""


class Suspects:
    """Remembers digests of prompts, for ten minutes after the last death each was part of."""

    def __init__(self) -> None:
        self._deaths: dict[bytes, int] = {}
        self._seen: dict[bytes, float] = {}

    def accuse(self, prompts: Iterable[bytes], now: float) -> None:
        """An engine died while it computed `prompts`; `now` in monotonic seconds."""
        for digest in {_digest(prompt) for prompt in prompts}:
            self._deaths[digest] = self._deaths.get(digest, 0) + 1
            self._seen[digest] = now

    def convict(self, prompt: bytes, now: float) -> bool:
        """Whether a prompt is to be refused."""
        for digest in [digest for digest, seen in self._seen.items() if seen <= now - REFUSED_SECONDS]:
            del self._deaths[digest], self._seen[digest]
        return bool(self._deaths) and self._deaths.get(_digest(prompt), 0) >= _DEATHS


def _digest(prompt: bytes) -> bytes:
    return blake2b(prompt, digest_size=16).digest()
