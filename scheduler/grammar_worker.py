"""The process that tries a grammar before the engine sees it: `python -m scheduler.grammar_worker TOKENIZER_JSON`.

On stdin come frames, a 4-byte little-endian length and a msgpack `Grammar`; for each, stdout gets a frame with a
msgpack string: empty where the grammar is good, else what is wrong with it in one line. Every grammar is compiled in
a child of its own with `CPU_SECONDS` and `MEMORY_BYTES`, so a bomb takes nothing else along. End of file ends it.

It needs little memory: instead of the model's vocabulary it has one token a byte and the control tokens, which grammars
can name. What a grammar costs to compile is the same to within the walk over the vocabulary.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import sys
from pathlib import Path
from typing import BinaryIO, NoReturn

import msgspec
from llguidance import LLTokenizer, TokenizerWrapper

from scheduler.grammar import GrammarError, compile_grammar
from scheduler.messages import Grammar

CPU_SECONDS = 0.1
"""A useful grammar within the front-end's limits takes milliseconds (500 optional enums, the slowest known: 25); the
costly ones take seconds to hours. Ten of those at once must all be answered within 2 seconds, on two shared cores."""
MEMORY_BYTES = 2**30
TOO_COMPLEX = "the grammar is too complex: compiling it takes more time or memory than is allowed"
BYTES = 256


class _ByteVocabulary:
    """What `TokenizerWrapper` needs: token i is byte i, but for the control tokens, which stand at their own ids."""

    def __init__(self, control_tokens: dict[int, str]) -> None:
        # Bytes whose id a control token has are found behind everything else.
        vocab_size = max([BYTES - 1, *control_tokens]) + 1
        self.tokens = [bytes([i]) if i < BYTES else b"" for i in range(vocab_size)]
        for token_id, text in control_tokens.items():
            self.tokens[token_id] = text.encode()
        self.tokens += [bytes([token_id]) for token_id in control_tokens if token_id < BYTES]
        self.eos_token_id = len(self.tokens)
        self.tokens.append(b"<end>")
        self.bos_token_id = None
        self.special_token_ids = [*control_tokens, self.eos_token_id]

    def __call__(self, text: bytes | str) -> list[int]:
        data = text.encode() if isinstance(text, str) else text
        return [self.tokens.index(bytes([byte])) for byte in data]


def byte_tokenizer(tokenizer_path: Path) -> LLTokenizer:
    added = json.loads(tokenizer_path.read_bytes()).get("added_tokens", [])
    return LLTokenizer(TokenizerWrapper(_ByteVocabulary({token["id"]: token["content"] for token in added})))


def verdict(tokenizer: LLTokenizer, grammar: Grammar) -> str:
    """Empty where the grammar compiles and has a first token."""
    try:
        matcher = compile_grammar(tokenizer, grammar)
        mask = matcher.compute_bitmask()
    except GrammarError as error:
        return str(error) or TOO_COMPLEX
    if matcher.is_error() or not any(mask):
        return "nothing can match the grammar, or it is too complex"
    return ""


def try_grammar(tokenizer: LLTokenizer, grammar: Grammar) -> str:
    """`verdict`, found in a child that is killed when it takes too much."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        _be_the_child(write_end, tokenizer, grammar)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    return answer.decode() if os.waitstatus_to_exitcode(status) == 0 else TOO_COMPLEX


def _be_the_child(write_end: int, tokenizer: LLTokenizer, grammar: Grammar) -> NoReturn:
    exit_code = 1
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # its signal ends the child, whatever it is doing
        os.write(write_end, verdict(tokenizer, grammar)[:2048].encode())  # less than a pipe holds
        exit_code = 0
    finally:
        os._exit(exit_code)


def serve(requests: BinaryIO, answers: BinaryIO, tokenizer: LLTokenizer) -> None:
    while len(head := requests.read(4)) == 4:
        [size] = struct.unpack("<I", head)
        answer = msgspec.msgpack.encode(
            try_grammar(tokenizer, msgspec.msgpack.decode(requests.read(size), type=Grammar))
        )
        answers.write(struct.pack("<I", len(answer)) + answer)
        answers.flush()


def main() -> None:
    # As with the engine: the front-end decides when we end, by closing our stdin.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    serve(sys.stdin.buffer, sys.stdout.buffer, byte_tokenizer(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
