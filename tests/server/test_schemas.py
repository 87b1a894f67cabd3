"""What a request may look like: null is absent, types are not coerced, what is not built is refused by name."""

from __future__ import annotations

import json
from contextlib import suppress
from random import Random
from typing import Any

import pytest
from pydantic import BaseModel

from server import limits
from server.errors import ApiError, BadRequest, UnsupportedParameter
from server.json_body import ignored_header, parse_body
from server.schemas import chat, completion
from server.schemas.chat import ChatCompletionRequest
from server.schemas.completion import CompletionRequest
from server.schemas.sampling import SamplingFields

MESSAGES = [{"role": "user", "content": "x"}]


def parse_chat(**fields: Any) -> ChatCompletionRequest:
    body = json.dumps({"messages": MESSAGES, **fields}).encode()
    return parse_body(body, ChatCompletionRequest, chat.UNSUPPORTED)[0]


def parse_completion(**fields: Any) -> CompletionRequest:
    body = json.dumps({"prompt": "x", **fields}).encode()
    return parse_body(body, CompletionRequest, completion.UNSUPPORTED)[0]


@pytest.mark.parametrize("seed", range(20))
def test_brackets_in_texts_are_no_levels(seed: int) -> None:
    rng = Random(seed)

    def text() -> str:
        return "".join(rng.choices('\\"[]{}, a\n', k=rng.randrange(8)))

    value: Any = text()
    for _ in range(int(limits.MAX_JSON_DEPTH.maximum)):
        value = rng.choice([[value, text()], [text(), value], {text(): value}, {text(): text(), "v": value}])
    parse_chat(unknown=value, user=text())
    with pytest.raises(BadRequest, match="Each field of the body may have 100 nested levels"):
        parse_chat(unknown=[value], user=text())


def test_null_is_absent_for_every_field() -> None:
    for model, parse, required in (
        (ChatCompletionRequest, parse_chat, "messages"),
        (CompletionRequest, parse_completion, "prompt"),
    ):
        unsupported = chat.UNSUPPORTED if parse is parse_chat else completion.UNSUPPORTED
        nulls = dict.fromkeys((name for name in (*model.model_fields, *unsupported) if name != required), None)
        assert parse(**nulls) == parse()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "1"),
        ("temperature", True),
        ("temperature", []),
        ("max_tokens", "1"),
        ("max_tokens", True),
        ("max_tokens", 1.5),
        ("top_k", 1.0),
        ("seed", False),
        ("stream", 1),
        ("stream", "true"),
        ("ignore_eos", 0),
        ("stop", 1),
        ("stop", [1]),
        ("stop", [None]),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop_token_ids", "1"),
        ("stop_token_ids", [True]),
        ("stop_token_ids", [-1]),
        ("stream_options", True),
        ("stream_options", {"include_usage": 1}),
        ("model", 1),
        ("cache_salt", 1),
        ("messages", "x"),
        ("messages", []),
        ("messages", [[]]),
        ("messages", [{"content": "x"}]),
        ("messages", [{"role": "wizard", "content": "x"}]),
        ("messages", [{"role": "user"}]),
        ("messages", [{"role": "user", "content": None}]),
        ("messages", [{"role": "user", "content": 1}]),
        ("messages", [{"role": "user", "content": [{"type": "text"}]}]),
        ("messages", [{"role": "user", "content": [{"type": "text", "text": 1}]}]),
        ("messages", [{"role": "user", "content": ["x"]}]),
        ("messages", [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]),
        ("messages", [{"role": "assistant", "content": "x", "prefix": "yes"}]),
        ("n", 0),
        ("n", True),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"05": 1}),
        ("logit_bias", {"1": "1"}),
        ("logit_bias", [1]),
        ("bad_words", "x"),
        ("bad_words", [""]),
        ("allowed_token_ids", []),
        ("logprobs", 1),
        ("top_logprobs", True),
        ("tools", [{"type": "function"}]),
        ("tools", [{"type": "function", "function": {"name": "a b"}}]),
        ("tool_choice", "always"),
        ("tool_choice", {"type": "function"}),
        ("tool_choice", 1),
        ("chat_template_kwargs", {"messages": 1}),
        ("chat_template_kwargs", {"x": {}}),
        ("response_format", "json"),
        ("timeout", 0),
        ("request_id", "a b"),
        ("thinking", True),
    ],
)
def test_wrong_values_name_their_field(field: str, value: object) -> None:
    with pytest.raises(ApiError) as caught:
        parse_chat(**{field: value})
    assert caught.value.status == 400
    assert caught.value.param is not None
    assert caught.value.param.split("[")[0].split(".")[0] == field


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "video_url"])
def test_only_text_parts(kind: str) -> None:
    parts = [{"type": "text", "text": "x"}, {"type": kind, kind: {"url": "data:"}}]
    with pytest.raises(ApiError, match="text only") as caught:
        parse_chat(messages=[{"role": "user", "content": parts}])
    assert caught.value.param == "messages[0].content[1]"
    for message in ({"role": "user"}, {"role": "tool", "content": None}):
        with pytest.raises(ApiError) as caught:
            parse_chat(messages=[message])
        assert caught.value.param == "messages[0].content"


def test_content_forms() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}, {"type": "refusal", "refusal": "c"}]
    parse_chat(messages=[{"role": "user", "content": parts}, {"role": "assistant", "content": None}])
    parse_chat(messages=[{"role": "assistant", "content": "x", "tool_calls": [], "function_call": None}])


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("x", ["x"]),
        (["x"], ["x"]),
        (["x", "y"], ["x", "y"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2]], [[1, 2]]),
        ([[1], [2]], [[1], [2]]),
    ],
)
def test_prompt_forms(prompt: object, expected: list[object]) -> None:
    assert parse_completion(prompt=prompt).prompts == expected


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        [],
        [""],
        [[]],
        [[1], []],
        ["x", 1],
        [1, "x"],
        [[1], "x"],
        [1.0],
        [True],
        [None],
        [-1],
        [[["x"]]],
        {},
        1,
        True,
    ],
)
def test_bad_prompts(prompt: object) -> None:
    with pytest.raises(ApiError) as caught:
        parse_completion(prompt=prompt)
    assert (caught.value.status, str(caught.value.param)[:6]) == (400, "prompt")


def test_missing_prompt() -> None:
    with pytest.raises(ApiError) as caught:
        parse_body(b"{}", CompletionRequest, completion.UNSUPPORTED)
    assert caught.value.param == "prompt"


ASKING = {
    "echo": True,
    "guided_json": {},
    "prompt_logprobs": 0,
    "modalities": ["text", "audio"],
    "chat_template": "{{ messages }}",
    "truncate_prompt_tokens": 1,
    "functions": [{}],
    "audio": {},
    "use_beam_search": True,
}


@pytest.mark.parametrize("name", ASKING)
def test_what_would_change_the_answer_is_refused_by_name(name: str) -> None:
    parse = parse_chat if name in chat.UNSUPPORTED else parse_completion
    with pytest.raises(UnsupportedParameter) as caught:
        parse(**{name: ASKING[name]})
    assert caught.value.param == name


def test_neutral_values_pass() -> None:
    for parse, unsupported in ((parse_chat, chat.UNSUPPORTED), (parse_completion, completion.UNSUPPORTED)):
        for name, values in unsupported.items():
            for value in values:
                parse(**{name: value})
    parse_chat(response_format={"type": "text"}, tools=[], tool_choice="none", n=1, logprobs=False)


def test_neutral_is_compared_with_its_type() -> None:
    for value in (0, 0.0, "", []):
        with pytest.raises(UnsupportedParameter):
            parse_chat(use_beam_search=value)


@pytest.mark.parametrize("name", ["prompt_logprobs", "foo", "prompt"])
@pytest.mark.parametrize("value", [rb'"+\xfb?"', rb'"\ud800"', rb'"\x"', b"-", b"1e", b"[1,]", b"NaN", b"{1: 2}"])
def test_what_is_not_json_is_refused_wherever_it_stands(name: str, value: bytes) -> None:
    value = value.replace(rb"\xfb", b"\xfb")
    with pytest.raises(ApiError) as caught:
        parse_body(b'{"prompt": "x", "%s": %s}' % (name.encode(), value), CompletionRequest, completion.UNSUPPORTED)
    assert caught.value.status == 400


@pytest.mark.parametrize("name", ["prompt_logprobs", "foo"])
@pytest.mark.parametrize("value", [b"1e999", b"9" * 60])
def test_numbers_out_of_range_are_values_as_others(name: str, value: bytes) -> None:
    with suppress(ApiError):
        parse_body(b'{"prompt": "x", "%s": %s}' % (name.encode(), value), CompletionRequest, completion.UNSUPPORTED)


def test_unread_fields_are_reported() -> None:
    body = b'{"prompt": "x", "user": "me", "foo": 1, "n": 1, "top_p": null, "store": null, "bar": null}'
    _, ignored = parse_body(body, CompletionRequest, completion.UNSUPPORTED)
    assert ignored == ["user", "foo"]


def test_strict_refuses_what_is_not_known() -> None:
    def parse(name: str) -> None:
        body = json.dumps({"prompt": "x", name: 1}).encode()
        parse_body(body, CompletionRequest, completion.UNSUPPORTED, strict=True)

    parse("user")
    parse_body(b'{"prompt": "x", "foo": null}', CompletionRequest, completion.UNSUPPORTED, strict=True)
    for name, param in (("foo", "foo"), ("a\nb", None)):
        with pytest.raises(ApiError) as caught:
            parse(name)
        assert (caught.value.status, caught.value.param) == (400, param)


def test_ignored_header_is_safe_and_bounded() -> None:
    assert ignored_header([]) == {}
    assert ignored_header(["user", "a\r\nb: c", "é", "x" * 65]) == {"X-Ignored-Fields": "user, ?, ?, ?"}
    assert len(ignored_header(["y" * 64] * 1000)["X-Ignored-Fields"]) < 2500


def test_completion_tokens_win() -> None:
    assert parse_chat(max_tokens=1, max_completion_tokens=2).token_limit == 2
    assert parse_chat(max_tokens=1).token_limit == 1
    assert parse_chat().token_limit is None


def test_no_field_is_both_read_and_refused() -> None:
    models: list[tuple[type[BaseModel], dict[str, tuple[object, ...]]]] = [
        (ChatCompletionRequest, chat.UNSUPPORTED),
        (CompletionRequest, completion.UNSUPPORTED),
    ]
    for model, unsupported in models:
        assert not model.model_fields.keys() & unsupported.keys()


def test_stops() -> None:
    def stops(**fields: Any) -> list[str]:
        parsed: SamplingFields = parse_chat(**fields)
        return parsed.stops

    assert stops() == []
    assert stops(stop="a") == ["a"]
    assert stops(stop=["a", "b"]) == ["a", "b"]
