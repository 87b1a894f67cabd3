"""Half an hour of mixed traffic on a real daemon whose engine is killed again and again:
`python -m tests.soak [--minutes 30] [-- options of latentd serve]`.

Clients ask, stream, leave in the middle and send nonsense. What must hold: every answer is the one its question got
the first time, only requests that an engine's death touched fail, nonsense gets its 4xx, and afterwards no block and no
file descriptor is left over and the memory is what it was. Four deaths in ten minutes would end the daemon: a kill
comes every three minutes and a half.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.daemon import Daemon
from tests.soak.traffic import Question, questions, refusals

CLIENTS = 10
KILL_SECONDS = 210.0
RECOVERY_SECONDS = 60.0
MEMORY_GROWTH = 1.05


class Soak:
    """The clients, and what they have seen."""

    def __init__(self, daemon: Daemon, seed: int, seconds: float) -> None:
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        """What must not have happened."""
        self.recoveries: list[float] = []
        self.front_end_mib: list[float] = []
        """When idle, after each engine's life."""
        self.engine_mib: list[float] = []
        """Of each engine before its death."""
        self.descriptors: list[int] = []
        """Of the front-end, when idle."""
        self._daemon = daemon
        self._rng = random.Random(seed)
        self._questions = questions(seed)
        self._refusals = refusals()
        self._first: dict[str, Any] = {}
        self._end = time.monotonic() + seconds
        self._downs: list[tuple[float, float]] = []
        """From when to when requests may fail."""
        self._calm = asyncio.Event()
        self._calm.set()
        self._open = 0

    async def run(self) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with (
            httpx.AsyncClient(base_url=self._daemon.url, timeout=300, limits=limits) as client,
            asyncio.TaskGroup() as group,
        ):
            group.create_task(self._kill_again_and_again())
            for _ in range(CLIENTS):
                group.create_task(self._ask_again_and_again(client))
        await self._look(None)

    async def _ask_again_and_again(self, client: httpx.AsyncClient) -> None:
        while time.monotonic() < self._end:
            await self._calm.wait()
            self._open += 1
            began = time.monotonic()
            kind = self._rng.choices(("whole", "stream", "leave", "nonsense"), (4, 4, 2, 1))[0]
            try:
                match kind:
                    case "whole":
                        await self._whole(client, self._rng.choice(self._questions))
                    case "stream":
                        await self._stream(client, self._rng.choice(self._questions))
                    case "leave":
                        await self._leave(client, self._rng.choice(self._questions))
                    case "nonsense":
                        await self._nonsense(client)
                self.counts[kind] += 1
            except (AssertionError, ValueError, LookupError, httpx.HTTPError) as error:
                if self._disturbed(began) and not isinstance(error, WrongAnswerError):
                    self.counts["lost to a death"] += 1
                    await asyncio.sleep(1)
                else:
                    self.faults.append(f"{kind}: {type(error).__name__}: {error}"[:600])
            finally:
                self._open -= 1

    def _disturbed(self, began: float) -> bool:
        return any(began < up and time.monotonic() >= down for down, up in self._downs)

    async def _whole(self, client: httpx.AsyncClient, question: Question) -> None:
        response = await client.post(question.path, json=question.body)
        if self._is_refusal(response):
            return
        assert response.status_code == 200, (response.status_code, response.text)
        answer = response.json()
        question.check(answer)
        self._compare(question, text_of(answer))

    async def _stream(self, client: httpx.AsyncClient, question: Question) -> None:
        pieces: dict[int, str] = {}
        async with client.stream("POST", question.path, json={**question.body, "stream": True}) as response:
            if response.status_code != 200:
                await response.aread()
                if self._is_refusal(response):
                    return
                raise ValueError((response.status_code, response.text))
            ended = False
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    ended |= take(pieces, line.removeprefix("data: "))
        if not ended:
            raise ValueError(f"{question.path}: the stream stopped without an end")
        self._compare(question, [pieces[index] for index in sorted(pieces)])

    def _is_refusal(self, response: httpx.Response) -> bool:
        """The promised one for want of room; on a busy machine grammars may queue for too long."""
        refused = response.status_code == 503 and "retry-after" in response.headers
        refused = refused and response.json()["error"].get("code") == "server_overloaded"
        self.counts["refused for want of room"] += refused
        return refused

    def _compare(self, question: Question, texts: list[str]) -> None:
        if (first := self._first.setdefault(question.key, texts)) != texts:
            raise WrongAnswerError(f"{question.key[:300]}: {texts!r}, and earlier {first!r}")

    async def _leave(self, client: httpx.AsyncClient, question: Question) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._rng.uniform(0.0, 1.0)):
                body = {**question.body, "stream": self._rng.random() < 0.5}
                await client.post(question.path, json=body)

    async def _nonsense(self, client: httpx.AsyncClient) -> None:
        refusal = self._rng.choice(self._refusals)
        headers = {"Content-Type": refusal.content_type}
        response = await client.post(refusal.path, content=refusal.content, headers=headers)
        if response.status_code == 503:
            raise ValueError(response.text)
        if response.status_code != refusal.status:
            raise WrongAnswerError(f"{refusal}: {response.status_code} {response.text[:200]}"[:500])
        assert len(response.content) < 8192

    async def _kill_again_and_again(self) -> None:
        while (left := self._end - time.monotonic()) > 0:
            await asyncio.sleep(min(KILL_SECONDS, left))
            if left > KILL_SECONDS:
                await self._look(self._daemon.engine_pid)
                await self._kill()

    async def _look(self, engine: int | None) -> None:
        """Lets the traffic come to rest, then counts what is left over."""
        self._calm.clear()
        while self._open:
            await asyncio.sleep(0.05)
        try:
            await asyncio.to_thread(self._daemon.wait_idle, 10.0)
        except AssertionError as error:
            self.faults.append(f"left over when idle: {error}")
        await asyncio.sleep(1)
        front_end = self._daemon.process.pid
        self.front_end_mib.append(resident_mib(front_end))
        self.descriptors.append(len(list(Path(f"/proc/{front_end}/fd").iterdir())))
        self.engine_mib.append(resident_mib(engine or self._daemon.engine_pid))
        self._calm.set()

    async def _kill(self) -> None:
        await asyncio.sleep(5)  # under traffic again
        killed = time.monotonic()
        self._downs.append((killed, float("inf")))
        engine = self._daemon.engine_pid
        os.kill(engine, signal.SIGKILL)
        try:
            async with asyncio.timeout(RECOVERY_SECONDS):
                while Path(f"/proc/{engine}").exists():  # until then `/ready` speaks of this one
                    await asyncio.sleep(0.01)
                await asyncio.to_thread(self._daemon.wait_ready_again, RECOVERY_SECONDS)
        except (AssertionError, TimeoutError):
            self.faults.append(f"not ready {RECOVERY_SECONDS:.0f} s after an engine's death")
        ready = time.monotonic()
        self._downs[-1] = (killed, ready + 0.5)
        self.recoveries.append(ready - killed)

    def report(self) -> list[str]:
        """Prints the figures; returns what is wrong."""
        faults = list(self.faults)
        print(f"requests: {dict(self.counts)}; {len(self._first)} questions with an answer to compare with")
        print(f"deaths: {len(self.recoveries)}, ready again after {[round(each, 1) for each in self.recoveries]} s")
        for name, figures in (("front-end", self.front_end_mib), ("engine", self.engine_mib)):
            print(f"{name}, MiB when idle: {[round(each) for each in figures]}")
            settled = figures[1:] if name == "front-end" else figures  # its caches fill during the first life
            if settled and max(settled) > MEMORY_GROWTH * settled[0]:
                faults.append(f"the {name}'s memory grew from {settled[0]:.0f} to {max(settled):.0f} MiB")
        print(f"file descriptors of the front-end: {self.descriptors}")
        if len(set(self.descriptors)) > 1:
            faults.append(f"file descriptors: {self.descriptors}")
        return faults


class WrongAnswerError(AssertionError):
    """No death explains it."""


def text_of(answer: dict[str, Any]) -> list[str]:
    """What each choice of a whole answer says, calls included."""
    if "output" in answer:  # /v1/responses
        return ["".join(part["text"] for item in answer["output"] for part in item.get("content", []))]
    if "content" in answer:  # /v1/messages
        return ["".join(block["text"] for block in answer["content"])]
    texts = []
    for choice in answer["choices"]:
        message = choice.get("message")
        if message is None:
            texts.append(choice["text"])
        else:
            calls = "".join(call["function"]["arguments"] for call in message.get("tool_calls") or [])
            texts.append((message["content"] or "") + calls)
    return texts


def take(pieces: dict[int, str], data: str) -> bool:
    """Adds an event's text to its choice; True at the event that ends a stream well. ValueError: it says an error."""
    if data == "[DONE]":
        return True
    event = json.loads(data)
    kind = event.get("type", "")
    if "error" in event or kind in ("error", "response.failed"):
        raise ValueError(f"error event: {data}")
    if kind == "response.output_text.delta":
        pieces[0] = pieces.get(0, "") + event["delta"]
    elif kind == "content_block_delta":
        pieces[0] = pieces.get(0, "") + event["delta"].get("text", "")
    for choice in event.get("choices", []):
        delta = choice.get("delta", {})
        calls = "".join(call["function"].get("arguments") or "" for call in delta.get("tool_calls") or [])
        text = choice.get("text") or delta.get("content") or ""
        pieces[choice["index"]] = pieces.get(choice["index"], "") + text + calls
    return kind in ("response.completed", "response.incomplete", "message_stop")


def resident_mib(pid: int) -> float:
    [line] = [each for each in Path(f"/proc/{pid}/status").read_text().splitlines() if each.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("serve", nargs="*", metavar="OPTION", help="behind --: options for `latentd serve`")
    arguments = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        daemon = Daemon(Path(folder), *arguments.serve)
        try:
            soak = Soak(daemon, arguments.seed, 60 * arguments.minutes)
            asyncio.run(soak.run())
            faults = soak.report()
            if (code := daemon.stop()) != 0:
                faults.append(f"exit code {code}")
            if "Traceback" in daemon.logs:
                faults.append("a traceback in the log")
        finally:
            daemon.process.kill()
    for fault, times in Counter(faults).most_common(20):
        print(f"FAULT x{times}: {fault}")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
