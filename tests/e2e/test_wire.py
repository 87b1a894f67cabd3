"""What other clients see: curl, a reader of event streams on a bare socket, and what gets into the logs."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.e2e.daemon import Daemon


def curl(*arguments: str) -> str:
    run = subprocess.run(["curl", "-sS", "--max-time", "60", *arguments], capture_output=True, text=True, check=True)
    return run.stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(daemon: Daemon) -> None:
    body = {"model": "builtin", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0}
    json_header = ("-H", "Content-Type: application/json")
    whole = json.loads(curl(f"{daemon.url}/v1/chat/completions", *json_header, "-d", json.dumps(body)))
    lines = curl("-N", f"{daemon.url}/v1/chat/completions", *json_header, "-d", json.dumps({**body, "stream": True}))
    events = [line.removeprefix("data: ") for line in lines.splitlines() if line]
    assert events[-1] == "[DONE]"
    text = "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in events[:-1])
    assert text == whole["choices"][0]["message"]["content"]
    refused = json.loads(curl(f"{daemon.url}/v1/chat/completions", "-d", "{}"))
    assert "Content-Type" in refused["error"]["message"]
    for path in ("/health", "/ready", "/livez", "/version", "/v1/models", "/v1/models/hub/builtin", "/openapi.json"):
        assert json.loads(curl("-f", daemon.url + path)), path
    assert "vllm:num_requests_running" in curl("-f", f"{daemon.url}/metrics")


def read_events(url: str, body: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
    """An `EventSource` in thirty lines: chunked transfer decoded, events cut at empty lines, comments dropped."""
    parts = urlsplit(url)
    data = json.dumps(body).encode()
    with socket.create_connection((parts.hostname, parts.port), timeout=60) as connection:
        connection.sendall(
            f"POST {parts.path} HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode()
            + data
        )
        with connection.makefile("rb") as reader:
            assert reader.readline() == b"HTTP/1.1 200 OK\r\n"
            headers = {}
            while (line := reader.readline().strip()) != b"":
                name, _, value = line.decode().partition(":")
                headers[name.lower()] = value.strip()
            assert headers["transfer-encoding"] == "chunked"
            text = b""
            while size := int(reader.readline(), 16):
                text += reader.read(size)
                assert reader.readline() == b"\r\n"
    assert b"\r" not in text
    events, fields = [], []
    for line in text.decode().split("\n"):
        if line.startswith("data: "):
            fields.append(line.removeprefix("data: "))
        elif line == "" and fields:
            events.append("\n".join(fields))
            fields = []
        else:
            assert line == "" or line.startswith(":")
    return headers, events


def test_event_stream_on_a_socket(daemon: Daemon) -> None:
    body = {"prompt": "The sea", "max_tokens": 12, "stream": True, "stream_options": {"include_usage": True}}
    headers, events = read_events(f"{daemon.url}/v1/completions", {**body, "ignore_eos": True})
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert headers["x-accel-buffering"] == "no"
    assert headers["cache-control"] == "no-store"
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert chunks[-1]["usage"]["completion_tokens"] == 12
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_chunked_request_body(daemon: Daemon) -> None:
    def parts() -> Any:
        yield b'{"prompt": "x", '
        yield b'"max_tokens": 1}'

    headers = {"Content-Type": "application/json"}
    assert httpx.post(f"{daemon.url}/v1/completions", content=parts(), headers=headers, timeout=60).status_code == 200


def test_too_large_a_body(daemon: Daemon) -> None:
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{daemon.url}/v1/completions", content=b" " * (16 * 2**20 + 1), headers=headers, timeout=60)
    assert answer.status_code == 413
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_logs_hold_nothing_of_a_request(daemon: Daemon) -> None:
    canary = "canary-93b1"
    url = f"{daemon.url}/v1/chat/completions"
    messages = [{"role": "user", "content": canary, "name": canary}]
    good = {"messages": messages, "max_tokens": 2, "stop": canary, "user": canary, "metadata": {canary: canary}}
    with httpx.Client(timeout=60, headers={"Authorization": f"Bearer {canary}"}) as client:
        assert client.post(url, json=good).status_code == 200
        assert "[DONE]" in client.post(url, json={**good, "stream": True}).text
        tools = [{"type": "function", "function": {"name": canary, "description": canary}}]
        assert client.post(url, json={**good, "tools": tools}).status_code == 200
        for bad in (
            {**good, "temperature": canary},
            {**good, "tools": [{"type": "function", "function": {"name": f"{canary} with spaces"}}]},
            {**good, "model": canary},
            {"messages": canary},
            {**good, "messages": [{"role": canary, "content": canary}]},
            {**good, "messages": [{"role": "user", "content": canary * 100_000}]},
        ):
            assert client.post(url, json=bad).status_code in (400, 404)
        assert client.post(url, content=canary.encode()).status_code == 415
        assert client.get(f"{daemon.url}/{canary}", params={canary: canary}).status_code == 404
    assert "POST /v1/chat/completions 200 " in daemon.logs
    assert canary not in daemon.logs
    assert "Traceback" not in daemon.logs
