"""What the built-in model can do, asked through the running server: every question of `questions.jsonl`, greedy.

The result is `model/builtin/eval.json`: by row how many whole replies were right, and the perplexity of the right
answers, each given its question, which says more finely whether two servers compute the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from tokenizers import Tokenizer
from tqdm import tqdm

from server.settings import BUILTIN_MODEL
from tools.builtin_model import questions
from tools.builtin_model.documents import encode
from tools.builtin_model.questions import Question

TARGETS = {
    "greetings": 100,
    "identity": 100,
    "capitals": 95,
    "capitals_lower": 85,
    "capitals_yes_no": 85,
    "opposites": 90,
    "days": 90,
    "colours": 90,
    "sums_one_digit": 95,
    "copy_6": 90,
    "name_1_turn": 95,
    "name_3_turns": 95,
    "key_value_5": 85,
    "key_value_12": 60,
    "code_128": 95,
    "code_512": 80,
    "code_1024": 50,
    "json": 80,
    "lists": 80,
    "tool_calls": 70,
}
"""Percent of a row's questions; the other rows are reported only."""
MAX_TOKENS = 200
READY_SECONDS = 120


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, default=BUILTIN_MODEL, help="checkpoint to serve; default: the built-in one"
    )
    parser.add_argument("--url", help="ask a server that is running already")
    parser.add_argument("--clients", type=int, default=8, help="questions asked at once")
    parser.add_argument("--row", action="append", help="only this row; several are allowed")
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--check", action="store_true", help="exit code 1 where a row misses its target")
    parser.add_argument("--wrong", action="store_true", help="show every wrong reply")
    parser.add_argument("serve", nargs="*", metavar="OPTION", help="behind --: options for `latentd serve`")


def run(arguments: argparse.Namespace) -> None:
    asked = [question for question in questions.load() if not arguments.row or question.row in arguments.row]
    tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
    with _server(arguments) as url, httpx.Client(base_url=url, timeout=600) as client:

        def answer(question: Question) -> tuple[str | None, float, int]:
            wrong = wrong_reply(client, question)
            return wrong, *_loss(client, question, tokenizer)

        with ThreadPoolExecutor(arguments.clients) as pool:
            answers = list(tqdm(pool.map(answer, asked), total=len(asked), desc="eval", disable=None))
    rows: dict[str, list[int]] = {}
    for question, (wrong, _, _) in zip(asked, answers, strict=True):
        right_and_asked = rows.setdefault(question.row, [0, 0])
        right_and_asked[0] += wrong is None
        right_and_asked[1] += 1
        if wrong is not None and arguments.wrong:
            print(f"{question.row}: {question.messages[-1]['content'][-200:]!r}\n  {wrong}")
    tokens = sum(count for _, _, count in answers)
    perplexity = math.exp(sum(loss for _, loss, _ in answers) / tokens)
    missed = _print(rows, perplexity, tokens)
    if arguments.json is not None:
        weights = (arguments.model / "model.safetensors").read_bytes()
        result = {
            "weights_sha256": hashlib.sha256(weights).hexdigest(),
            "rows": {row: {"right": right, "asked": count} for row, (right, count) in rows.items()},
            "answer_perplexity": round(perplexity, 5),
            "answer_tokens": tokens,
        }
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if arguments.check and missed:
        raise SystemExit(f"below their targets: {', '.join(missed)}")


def _print(rows: dict[str, list[int]], perplexity: float, tokens: int) -> list[str]:
    """The rows that miss their targets."""
    missed = []
    for row, (right, count) in rows.items():
        percent, target = 100 * right / count, TARGETS.get(row)
        if target is not None and percent < target:
            missed.append(row)
        wanted = "" if target is None else f"  target {target:3} %{'  MISSED' if percent < target else ''}"
        print(f"{row:24} {right:3} of {count:3}  {percent:5.1f} %{wanted}")
    print(f"perplexity of the right answers: {perplexity:.4f} ({tokens:,} tokens)")
    return missed


def wrong_reply(client: httpx.Client, question: Question) -> str | None:
    """The greedy reply where it is not the expected one."""
    body: dict[str, Any] = {"messages": question.messages, "temperature": 0, "max_tokens": MAX_TOKENS}
    if question.tools:
        body["tools"] = question.tools
    response = client.post("/v1/chat/completions", json=body)
    response.raise_for_status()
    message = response.json()["choices"][0]["message"]
    content: str = message.get("content") or ""
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    if question.tool_calls:
        expected = [(call.name, json.loads(call.arguments)) for call in question.tool_calls]
        right = [(call["name"], _arguments(call["arguments"])) for call in calls] == expected
    elif question.match == "contains":
        right = not calls and question.answer in content
    else:
        right = not calls and content == question.answer
    return None if right else f"{content!r} {calls or ''}, expected {question.answer!r} {question.tool_calls or ''}"


def _arguments(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _loss(client: httpx.Client, question: Question, tokenizer: Tokenizer) -> tuple[float, int]:
    """Sum of the negative log-probabilities of the right answer's tokens, and their number."""
    token_ids, weights = encode(question.document(), tokenizer)
    body = {"prompt": token_ids, "max_tokens": 0, "echo": True, "logprobs": 0, "temperature": 0}
    response = client.post("/v1/completions", json=body)
    response.raise_for_status()
    logprobs = response.json()["choices"][0]["logprobs"]["token_logprobs"]
    losses = [-logprob for logprob, weight in zip(logprobs, weights, strict=True) if weight]
    return sum(losses), len(losses)


@contextmanager
def _server(arguments: argparse.Namespace) -> Iterator[str]:
    """The address of a server of the model; one started here ends with it."""
    if arguments.url is not None:
        yield arguments.url
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [
        sys.executable,
        "-m",
        "server",
        "serve",
        str(arguments.model),
        "--port",
        str(port),
        "--log-level",
        "error",
        *arguments.serve,
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LATENTD_")}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        try:
            _wait_ready(url, process)
            yield url
        finally:
            process.terminate()


def _wait_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise SystemExit("the server did not become ready")
