"""Grammars of running requests: which tokens may come next, by llguidance.

One `Grammars` per engine. The reader thread compiles (`add`, milliseconds, without the GIL); the main loop asks for a
mask before each sampled token and tells which token was drawn. What a matcher knows follows from the tokens it was told
alone, so neither batching nor a preemption can change it.

Time and memory are bounded twice: the front-end compiles every grammar first in a process it can kill
(`scheduler/grammar_worker.py`), and `parser_limits` bounds what one mask may cost here.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from scheduler.messages import Grammar

_DRAWING = re.compile(r"\d*\s*\||\^|<non-verbose")

_OPTIONS = '\n%llguidance {"no_forcing": true}'
"""Text that is the only possible one is not turned into tokens beforehand: that would take the names of control tokens
in it for the tokens. At the end, where it counts whatever a grammar says itself."""

MAX_COMPILED = 128
"""Grammars kept ready for the next request that has the same one."""
MAX_COMPILED_BYTES = 2 * 2**20
"""Of their texts; a compiled grammar takes about 100 times the memory of its text."""


class GrammarError(ValueError):
    """A grammar does not compile, or has grown beyond its bounds; the message is one line."""


def parser_limits() -> LLParserLimits:
    """What compiling (about 50,000 units of fuel a ms) and one mask (14,000 a ms) may cost; see llguidance's docs."""
    return LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_lexer_states=50_000,  # of 1-2 kB
        max_grammar_size=200_000,
        verbose_errors=False,
    )


def compile_grammar(tokenizer: LLTokenizer, grammar: Grammar) -> LLMatcher:
    """A matcher at the grammar's start. Raises GrammarError."""
    try:
        match grammar.kind:
            case "json_schema":
                text = f"start: %json {grammar.text}{_OPTIONS}"
            case "regex":
                text = LLMatcher.grammar_from_regex(grammar.text)
                text = json.loads(text)["grammars"][0]["lark_grammar"] + _OPTIONS
            case "lark":
                text = LLMatcher.grammar_from_lark(grammar.text + _OPTIONS)
            case kind:
                raise GrammarError(f"unknown kind of grammar {kind!r}")
    except ValueError as error:
        raise GrammarError(one_line(str(error))) from error
    matcher = LLMatcher(tokenizer, text, log_level=0, limits=parser_limits())
    _require_sound(matcher)
    return matcher


def one_line(message: str) -> str:
    """The first lines of llguidance's message, without its drawings of where in the text an error is."""
    lines = [line.strip() for line in message.splitlines()]
    return " ".join(line for line in lines if line and not _DRAWING.match(line))


class CheckpointGrammars:
    """`add` may be called by one thread while another calls the rest."""

    def __init__(self, tokenizer_path: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """`tokenizer_path`: the checkpoint's tokenizer.json, read with the first grammar."""
        self._tokenizer_path = tokenizer_path
        self._vocab_size = vocab_size
        self._mask_bytes = (vocab_size + 7) // 8
        self._eos_token_ids = list(eos_token_ids)
        self._tokenizer: LLTokenizer | None = None
        self._matchers: dict[str, tuple[Grammar, LLMatcher]] = {}
        self._compiled: OrderedDict[tuple[str, str], LLMatcher] = OrderedDict()
        """At their start, most recently used last."""
        self._lock = threading.Lock()
        """Of `_compiled`."""

    def __len__(self) -> int:
        """Requests with a grammar."""
        return len(self._matchers)

    def add(self, request_id: str, grammar: Grammar) -> None:
        """Make the request's output follow the grammar. Raises GrammarError, also for an id that has one already."""
        if request_id in self._matchers:
            raise GrammarError(f"request id {request_id!r} is in use")
        key = (grammar.kind, grammar.text)
        with self._lock:
            compiled = self._compiled.get(key)
        if compiled is None:
            compiled = compile_grammar(self._load_tokenizer(), grammar)
        self._keep(key, compiled)
        self._matchers[request_id] = (grammar, compiled.deep_copy())

    def bitmask(self, request_id: str) -> bytes:
        """Which tokens may come next: one bit a token id, little-endian, vocab_size of them.

        Raises GrammarError where that costs more than `parser_limits` allows.
        """
        _, matcher = self._matchers[request_id]
        mask = matcher.compute_bitmask()
        _require_sound(matcher)
        return mask[: self._mask_bytes]

    def accept(self, request_id: str, token_id: int) -> bool:
        """The request has drawn this token. True when the grammar has ended: nothing may follow.

        Raises GrammarError for a token that the mask did not allow.
        """
        _, matcher = self._matchers[request_id]
        if not matcher.consume_token(token_id):
            raise GrammarError(f"token {token_id} does not continue the grammar: {one_line(matcher.get_error())}")
        return matcher.is_stopped()

    def drop(self, request_id: str) -> None:
        """Forget the request, if it has a grammar at all."""
        self._matchers.pop(request_id, None)

    def _load_tokenizer(self) -> LLTokenizer:
        if self._tokenizer is None:
            try:
                self._tokenizer = LLTokenizer(
                    self._tokenizer_path.read_text(encoding="utf-8"),
                    n_vocab=self._vocab_size,
                    eos_token=self._eos_token_ids or None,
                )
            except (OSError, ValueError) as error:
                raise GrammarError(f"{self._tokenizer_path.name} cannot be used for grammars") from error
        return self._tokenizer

    def _keep(self, key: tuple[str, str], compiled: LLMatcher) -> None:
        with self._lock:
            self._compiled[key] = compiled
            self._compiled.move_to_end(key)
            while len(self._compiled) > 1 and (
                len(self._compiled) > MAX_COMPILED or sum(len(text) for _, text in self._compiled) > MAX_COMPILED_BYTES
            ):
                self._compiled.popitem(last=False)


def _require_sound(matcher: LLMatcher) -> None:
    if matcher.is_error():
        raise GrammarError(one_line(matcher.get_error()) or "the grammar is too complex")
