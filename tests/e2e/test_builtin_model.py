"""The built-in model through the HTTP API: what it is sure of, what the documents promise, and its evaluation."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from server.banner import SUGGESTIONS
from server.settings import BUILTIN_MODEL
from tests.e2e.daemon import Daemon
from tools.builtin_model import evaluate, questions

README = Path(__file__).parent.parent.parent / "README.md"
OF_A_ROW = 2


@pytest.fixture(scope="module")
def client(daemon: Daemon) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=daemon.url, timeout=60) as client:
        yield client


def test_what_it_is_sure_of_is_right(client: httpx.Client) -> None:
    rows = json.loads((BUILTIN_MODEL / "eval.json").read_text())["rows"]
    sure = [row for row, counts in rows.items() if counts["right"] == counts["asked"]]
    assert len(sure) >= 5
    for row in sure:
        for question in [question for question in questions.load() if question.row == row][:OF_A_ROW]:
            assert evaluate.wrong_reply(client, question) is None


def test_the_readme_has_its_answers(client: httpx.Client) -> None:
    transcript = re.findall(r"(?m)^> (.+)\n(.+)$", README.read_text(encoding="utf-8"))
    assert tuple(question for question, _ in transcript) == SUGGESTIONS
    for question, answer in transcript:
        body = {"messages": [{"role": "user", "content": question}], "temperature": 0}
        choice = client.post("/v1/chat/completions", json=body).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (answer, "stop")


def test_a_row_is_evaluated(daemon: Daemon, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    file = tmp_path / "eval.json"
    evaluate.run(parser.parse_args(["--url", daemon.url, "--row", "thanks", "--json", str(file)]))
    result, kept = json.loads(file.read_text()), json.loads((BUILTIN_MODEL / "eval.json").read_text())
    assert result["weights_sha256"] == kept["weights_sha256"]
    assert abs(result["rows"]["thanks"]["right"] - kept["rows"]["thanks"]["right"]) <= 1
    assert "thanks" in capsys.readouterr().out
