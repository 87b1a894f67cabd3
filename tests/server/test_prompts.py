"""Answers that continue the last message, and prompts with a hole."""

from __future__ import annotations

from typing import Any

import pytest

from server.prompts import FIM_TOKENS
from tests.server.harness import (
    CHAT,
    answers,
    ids_of,
    run,
    silent,
    tokenizer,
)


def prompt_of(**data: Any) -> list[int]:
    answer, engine = run(answers("ok"), CHAT, **data)
    assert answer.status == 200, answer.body
    return engine.prompt()


@pytest.mark.parametrize(
    "content", ["Once upon", "ends with a space ", "  ", "a<｜User｜>b", [{"type": "text", "text": "x"}]]
)
def test_the_answer_continues_the_last_message(content: Any) -> None:
    user = {"role": "user", "content": "Tell"}
    text = content if isinstance(content, str) else "x"
    begun = prompt_of(messages=[user])
    by_flag = prompt_of(messages=[user, {"role": "assistant", "content": content}], continue_final_message=True)
    by_prefix = prompt_of(messages=[user, {"role": "assistant", "content": content, "prefix": True}])
    assert by_flag == by_prefix
    assert by_flag[: len(begun)] == begun
    assert b"".join(map(tokenizer().token_bytes, by_flag[len(begun) :])).decode() == text
    if "<" not in text:
        assert by_flag[len(begun) :] == ids_of(text)


@pytest.mark.parametrize(
    ("data", "param"),
    [
        ({"continue_final_message": True}, "continue_final_message"),
        ({"messages": [{"role": "user", "content": "x", "prefix": True}]}, "messages[0].prefix"),
        (
            {"messages": [{"role": "assistant", "content": "x", "prefix": True}, {"role": "user", "content": "x"}]},
            "messages[0].prefix",
        ),
    ],
)
def test_only_the_last_message_of_the_assistant_is_continued(data: dict[str, Any], param: str) -> None:
    answer, _ = run(silent, CHAT, **data)
    assert (answer.status, answer.error["param"]) == (400, param)


def test_contradictions_about_the_last_message() -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "prefix": True}]
    for data, param in (
        ({"add_generation_prompt": True}, "add_generation_prompt"),
        ({"continue_final_message": False}, "continue_final_message"),
    ):
        answer, _ = run(silent, CHAT, messages=messages, **data)
        assert (answer.status, answer.error["param"]) == (400, param)
    assert prompt_of(add_generation_prompt=False) == prompt_of()[: len(prompt_of(add_generation_prompt=False))]


def test_suffix() -> None:
    _, engine = run(answers("ok"), prompt="def f(", suffix="): <｜fim▁hole｜>")
    begin, hole, end = (ids_of(token)[0] for token in FIM_TOKENS)
    ids = engine.prompt()
    assert ids[:2] == [tokenizer().bos_token_id, begin]
    middle = ids.index(hole)
    assert ids[2:middle] == ids_of("def f(")
    assert ids[-1] == end
    assert hole not in ids[middle + 1 :]
    assert run(answers("ok"), suffix="")[1].prompt() == run(answers("ok"))[1].prompt()
    for data, param in (({"echo": True}, "echo"), ({"prompt": [5]}, "suffix")):
        answer, _ = run(silent, suffix="x", **data)
        assert (answer.status, answer.error["param"]) == (400, param)


def test_suffix_without_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer(), "added_tokens", ())
    answer, _ = run(silent, suffix="x")
    assert (answer.status, answer.error["param"]) == (400, "suffix")
