"""A load driver over `/v1/completions`: it streams, to time every token, and is light, as it shares the cores."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
from tokenizers import Tokenizer

from benchmarks.peers.scenarios import Scenario

HOST = "127.0.0.1"
TIMEOUT_SECONDS = 900.0
MODEL_NAME = "m"
"""What every server is told to call its model."""


class Run(msgspec.Struct, frozen=True):
    """One burst of a scenario. Times are seconds, medians over its requests where nothing else is said."""

    seconds: float
    output_tokens: int
    short: int
    """Requests that ended before they had their tokens."""
    output_tok_s: float
    """Of all clients, prompts included in the time."""
    ttft_s: float
    itl_p50_s: float
    itl_p99_s: float
    tpot_s: float
    """From the first to the last text, by tokens less one."""


@dataclass(frozen=True)
class Answer:
    sent: float
    stamps: list[float]
    tokens: int


class Prompts:
    """Texts of an exact number of tokens, made of words that are one token each."""

    def __init__(self, checkpoint: Path, seed: int) -> None:
        self._tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
        self._special = len(self._tokenizer.encode("").ids)
        self._rng = random.Random(seed)
        words = [f" {piece[1:]}" for piece in sorted(self._tokenizer.get_vocab()) if piece[:1] in ("Ġ", "▁")]
        words = [word for word in words if word[1:].isascii() and word[1:].isalpha()]
        encoded = self._tokenizer.encode_batch(words, add_special_tokens=False)
        self._words = [word for word, encoding in zip(words, encoded, strict=True) if len(encoding.ids) == 1]

    def draw(self, tokens: int) -> str:
        while True:
            text = "".join(self._rng.choices(self._words, k=tokens - self._special))
            if len(self._tokenizer.encode(text).ids) == tokens:
                return text


def measure(port: int, scenario: Scenario, prompts: Prompts, plain: bool) -> Run:
    """Sends the scenario once. Raises OSError, EOFError or ValueError where the server refuses or breaks off."""
    bodies = [_body(prompts.draw(scenario.prompt), scenario.output, plain) for _ in range(scenario.clients)]

    async def burst() -> tuple[list[Answer], float]:
        started = time.perf_counter()
        async with asyncio.timeout(TIMEOUT_SECONDS):
            answers = await asyncio.gather(*(_complete(port, body) for body in bodies))
        return answers, time.perf_counter() - started

    answers, seconds = asyncio.run(burst())
    gaps = sorted(b - a for answer in answers for a, b in zip(answer.stamps, answer.stamps[1:], strict=False))
    tokens = sum(answer.tokens for answer in answers)
    return Run(
        seconds=seconds,
        output_tokens=tokens,
        short=sum(answer.tokens < scenario.output for answer in answers),
        output_tok_s=tokens / seconds,
        ttft_s=statistics.median(answer.stamps[0] - answer.sent for answer in answers),
        itl_p50_s=gaps[len(gaps) // 2] if gaps else 0.0,
        itl_p99_s=gaps[len(gaps) * 99 // 100] if gaps else 0.0,
        tpot_s=statistics.median((a.stamps[-1] - a.stamps[0]) / max(a.tokens - 1, 1) for a in answers),
    )


def _body(prompt: str, output: int, plain: bool) -> bytes:
    body = {"prompt": prompt, "max_tokens": output, "temperature": 0, "stream": True}
    if not plain:
        body |= {"model": MODEL_NAME, "ignore_eos": True, "stream_options": {"include_usage": True}}
    return json.dumps(body).encode()


async def _complete(port: int, body: bytes) -> Answer:
    sent = time.perf_counter()
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}:{port}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        status = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in status.split(b"\r\n", 1)[0]:
            raise ValueError(f"the server refused: {(status + await reader.read(1000)).decode(errors='replace')}")
        return await _read_events(reader, sent)
    finally:
        writer.close()


async def _read_events(reader: asyncio.StreamReader, sent: float) -> Answer:
    """The events of a chunked body. An empty text counts as well: a token whose character is not whole yet."""
    stamps: list[float] = []
    tokens = None
    rest = b""
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        rest += (await reader.readexactly(size + 2))[:-2]
        now = time.perf_counter()
        *lines, rest = rest.split(b"\n")
        for line in lines:
            data = line[5:].strip()
            if not line.startswith(b"data:") or data == b"[DONE]":
                continue
            event = msgspec.json.decode(data)
            if "error" in event:
                raise ValueError(f"the stream ended with an error: {data.decode(errors='replace')[:1000]}")
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
            if any(choice.get("text") or not choice.get("finish_reason") for choice in event["choices"]):
                stamps.append(now)
    if not stamps:
        raise ValueError("the stream ended without a token")
    return Answer(sent, stamps, len(stamps) if tokens is None else tokens)
