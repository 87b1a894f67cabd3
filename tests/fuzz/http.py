"""Structured HTTP fuzzing of a real daemon: `python -m tests.fuzz.http [--minutes 60] [--seed N] [-- options]`.

Right requests of every endpoint are bent: values swapped for hostile ones, fields dropped, doubled and made up, bodies
cut, bytes flipped, heads and framing broken. Whatever comes must be answered, in time, below 500 or with the promised
503; the engine must not die, and in the end nothing may run, wait or hold a block.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.e2e.daemon import Daemon

CLIENTS = 8
ANSWER_SECONDS = 300.0
"""More than a starved machine needs: what takes longer hangs."""
MAX_ERROR_BYTES = 8192

_MESSAGES = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "What is the capital of Italy?"}]
_SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 5}}, "required": ["a"]}
_TOOL = {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": _SCHEMA}}
_SAMPLING = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "seed": 3, "stop": ["\n"], "n": 1}
_PENALTIES = {"presence_penalty": 0.1, "frequency_penalty": 0.1, "repetition_penalty": 1.1, "logit_bias": {"5": -3}}

BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        {"messages": _MESSAGES, "max_tokens": 8, **_SAMPLING, **_PENALTIES, "logprobs": True, "top_logprobs": 2},
        {"messages": _MESSAGES, "max_tokens": 8, "stream": True, "stream_options": {"include_usage": True}},
        {"messages": _MESSAGES, "max_tokens": 16, "tools": [_TOOL], "tool_choice": "auto", "user": "u", "metadata": {}},
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
            "max_completion_tokens": 16,
            "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": _SCHEMA}},
        },
        {"messages": _MESSAGES, "max_tokens": 8, "structured_outputs": {"regex": "[a-z]{1,8}"}, "timeout": 30},
    ],
    "/v1/completions": [
        {"prompt": "The sea", "max_tokens": 8, **_SAMPLING, "echo": True, "logprobs": 2},
        {"prompt": [[5, 6, 7], [8, 9]], "max_tokens": 4, "stream": True, "min_tokens": 1, "ignore_eos": True},
        {"prompt": ["one", "two"], "max_tokens": 4, "suffix": None, "prompt_logprobs": 1, "return_token_ids": True},
    ],
    "/v1/responses": [{"input": "Hello", "max_output_tokens": 16, "stream": True}, {"input": _MESSAGES, "tools": []}],
    "/v1/messages": [
        {"model": "latentd-builtin", "max_tokens": 8, "messages": _MESSAGES[1:], "system": "x", "stream": True},
    ],
    "/v1/messages/count_tokens": [{"model": "latentd-builtin", "messages": _MESSAGES[1:]}],
    "/v1/chat/completions/render": [{"messages": _MESSAGES}],
    "/tokenize": [{"prompt": "Hello", "add_special_tokens": True}, {"messages": _MESSAGES}],
    "/detokenize": [{"tokens": [5, 6, 7]}],
}
GETS = ["/health", "/ready", "/v1/models", "/metrics", "/openapi.json", "/server_info", "/load", "/docs", "/version"]
HOSTILE: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", " ", "\x00", "a" * 3000, "\ud800", "\u202e\u0000\U0001f600", "<｜begin▁of▁sentence｜>", "{{ 7 * 7 }}"),
    *([], {}, [[]], [None], [1, "a"], {"": None}, {"type": "text"}, {"$ref": "#"}, [2**40], [-1], ["x"] * 70),
    *(
        {"type": "object", "properties": {"x": {"$ref": "#"}}},
        "(a{1,500}){1,500}",
        "((a*)*)*b",
        "[",
        "auto",
        "json_object",
    ),
]
HEADERS = [
    "Content-Type: text/plain",
    "Authorization: Bearer x",
    "X-Request-Id: a b\tc",
    "X-Request-Id: " + "z" * 300,
    "Expect: 100-continue",
    "Accept: nothing",
    "Origin: http://evil",
    "Transfer-Encoding: chunked",
    "Content-Length: 5",
    "Content-Encoding: gzip",
    "X: " + "y" * 40_000,
    "Broken",
    "Cookie: \x01",
]


def paths_of(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Of all values inside, the whole one not among them; not further down than requests go."""
    if len(here) == 6:
        return []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, inner in items for path in ((*here, key), *paths_of(inner, (*here, key)))]


def deep(levels: int, rng: random.Random) -> Any:
    value: Any = None
    for _ in range(levels):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def bent(body: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """A copy with one to four changes."""
    body = copy.deepcopy(body)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        paths = paths_of(body)
        if not paths:
            break
        *way, last = rng.choice(paths)
        place: Any = body
        for key in way:
            place = place[key]
        match rng.randrange(7):
            case 0:
                del place[last]
            case 1 | 2 | 3:
                place[last] = copy.deepcopy(rng.choice(HOSTILE))
            case 4:
                other: Any = body
                for key in rng.choice(paths):
                    other = other[key] if not isinstance(other, dict) or key in other else None
                    if not isinstance(other, (dict, list)):
                        break
                place[last] = copy.deepcopy(other)
            case 5:
                place[last] = deep(rng.choice((5, 50, 150, 600)), rng)
            case 6 if isinstance(place, dict):
                place[
                    rng.choice(("best_of", "functions", "audio", "made_up", "chat_template", "cache_salt", "priority"))
                ] = copy.deepcopy(rng.choice(HOSTILE))
            case 6:
                place.extend(copy.deepcopy(place) * rng.choice((1, 10)))
    return body


def request(rng: random.Random) -> bytes:
    """The bytes of one request."""
    if rng.random() < 0.06:
        path, method, data = rng.choice(GETS), rng.choice(("GET", "GET", "HEAD", "OPTIONS", "DELETE", "PATCH")), b""
    else:
        path, method = rng.choice(list(BODIES)), "POST"
        data = json.dumps(bent(rng.choice(BODIES[path]), rng)).encode()
    changed = bytearray(data)
    kind = rng.random()
    if data and kind < 0.05:
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    elif data and kind < 0.1:
        del changed[rng.randrange(len(changed)) :]
    elif data and kind < 0.12:
        at = rng.randrange(len(changed))
        changed[at:at] = rng.randbytes(rng.randrange(1, 20))
    if rng.random() < 0.03:
        path = rng.choice(
            ("//v1/models", "/v1/../metrics", "/%2e%2e/", "/v1/chat/completions?x=%00", "*", "/\x7f", "/" + "a" * 9000)
        )
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"]
    if rng.random() < 0.06:
        lines.append(rng.choice(HEADERS))
    lines.append("Connection: close")
    if rng.random() < 0.1:
        lines.append("Transfer-Encoding: chunked")
        sent = b"".join(
            b"%x\r\n%s\r\n" % (len(part), part) for part in (bytes(changed[:7]), bytes(changed[7:])) if part
        )
        changed = bytearray(sent + b"0\r\n\r\n")
    else:
        lines.append(f"Content-Length: {len(changed)}")
    head = bytearray("\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n")
    if rng.random() < 0.02:  # but not in what has the connection closed: its end is the answer's
        head[rng.randrange(head.index(b"Connection:"))] = rng.randrange(256)
    return bytes(head + changed)


class Fuzz:
    def __init__(self, daemon: Daemon, seed: int, seconds: float) -> None:
        self.statuses: Counter[str] = Counter()
        self.faults: list[str] = []
        self.slowest = 0.0
        self._port = int(daemon.url.rsplit(":", 1)[1])
        self._seed = seed
        self._end = time.monotonic() + seconds
        self._numbers = iter(range(1 << 60))

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(self._client())

    async def _client(self) -> None:
        while time.monotonic() < self._end:
            number = next(self._numbers)
            sent = request(random.Random(f"{self._seed} {number}"))
            began = time.monotonic()
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    answer = await self._send(sent, leave=number % 50 == 0)
            except TimeoutError:
                self._fault(number, sent, b"no answer in time")
                continue
            self.slowest = max(self.slowest, time.monotonic() - began)
            status = answer[9:12].decode("latin-1")
            self.statuses[status or "closed"] += 1
            if status.startswith("5") and status != "503":
                self._fault(number, sent, answer)
            body = answer.partition(b"\r\n\r\n")[2]
            if status.startswith("4") and (len(body) > MAX_ERROR_BYTES or b"Traceback" in body):
                self._fault(number, sent, answer)

    def _fault(self, number: int, sent: bytes, answer: bytes) -> None:
        self.faults.append(f"request {number}: {sent[:1500]!r} -> {answer[:500]!r}")

    async def _send(self, sent: bytes, leave: bool) -> bytes:
        """The whole answer; empty where the connection was closed without one, as broken framing deserves."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            writer.write(sent)
            return b"" if leave else await reader.read()
        except OSError:
            return b""
        finally:
            writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("serve", nargs="*", metavar="OPTION", help="behind --: options for `latentd serve`")
    arguments = parser.parse_args()
    sys.setrecursionlimit(20_000)  # for what `deep` makes
    with tempfile.TemporaryDirectory() as folder:
        daemon = Daemon(Path(folder), "--max-model-len", "512", *arguments.serve)
        engine = daemon.engine_pid
        try:
            fuzz = Fuzz(daemon, arguments.seed, 60 * arguments.minutes)
            asyncio.run(fuzz.run())
            faults = []  # what is wrong in the end comes first
            if daemon.engine_pid != engine:
                faults.append("the engine died")
            try:
                daemon.wait_idle(30)
            except AssertionError as error:
                faults.append(f"left over: {error}")
            if (code := daemon.stop()) != 0:
                faults.append(f"exit code {code}")
            if (place := daemon.logs.find("Traceback")) >= 0:
                faults.append(daemon.logs[place - 300 : place + 3000])
        finally:
            daemon.process.kill()
    faults += fuzz.faults
    print(f"{fuzz.statuses.total()} requests: {dict(fuzz.statuses)}; the slowest took {fuzz.slowest:.1f} s")
    for fault in faults[:20]:
        print(f"FAULT: {fault}")
    print(f"{len(faults)} faults")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
