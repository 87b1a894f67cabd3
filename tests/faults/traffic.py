"""Clients of a daemon under fire: many streams at once, and how each ended."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

LONG: dict[str, Any] = {"prompt": "The sea", "max_tokens": 4000, "ignore_eos": True, "temperature": 1.0}
SHORT: dict[str, Any] = {"prompt": "The sea", "max_tokens": 8, "ignore_eos": True, "temperature": 0}


@dataclass
class Stream:
    """What a client saw of one streamed answer."""

    status: int = 0
    text: str = ""
    errors: list[dict[str, Any]] = field(default_factory=list)
    """Error events, or the body of an answer with an error status."""
    done: int = 0
    """How many `[DONE]` there were."""
    ended_at: float = 0.0


def client_of(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(base_url=url, timeout=60, limits=limits)


async def read_stream(client: httpx.AsyncClient, body: dict[str, Any], seen: Stream | None = None) -> Stream:
    """POST to /v1/completions and read to the end, whatever comes; `seen` can be watched meanwhile."""
    seen = seen or Stream()
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        seen.status = response.status_code
        if response.status_code != 200:
            seen.errors.append(json.loads(await response.aread())["error"])
        else:
            async for line in response.aiter_lines():
                data = line.removeprefix("data: ")
                if data == "[DONE]":
                    seen.done += 1
                elif data != line:
                    event = json.loads(data)
                    if "error" in event:
                        seen.errors.append(event["error"])
                    else:
                        seen.text += event["choices"][0]["text"]
    seen.ended_at = time.monotonic()
    return seen


async def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)
