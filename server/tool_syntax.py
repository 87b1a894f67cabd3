"""How a model writes tool calls and thoughts: one description, from which prompts, parser and grammar follow.

| syntax | a call |
| --- | --- |
| DeepSeek-V2.5, V3, R1 | `<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME`, the arguments fenced as ```` ```json ```` |
| DeepSeek-V3.1 | `<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{...}<｜tool▁call▁end｜>` |
| Kimi-K2 | `<|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>{...}<|tool_call_end|>` |
| JSON, for templates without tools | the answer is `{"name": "NAME", "arguments": {...}}`, one line a call |
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from scheduler.messages import Grammar
from server.errors import BadRequest
from server.json_schema import schema_text

ToolChoice = str | Mapping[str, Any]
"""`none`, `auto`, `required`, or `{"type": "function", "function": {"name": ...}}`."""
Tools = Sequence[Mapping[str, Any]]
"""As in OpenAI's requests: `{"type": "function", "function": {"name", "description", "parameters", "strict"}}`."""

THINK_BEGIN, THINK_END = "<think>", "</think>"
NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
"""OpenAI: a function without parameters takes none."""
_SECTION_BEGIN, _SECTION_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL_BEGIN, _CALL_END, _SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"


class AddedTokens(Protocol):
    """What is needed of `server.tokenizer.Tokenizer`."""

    added_tokens: tuple[str, ...]

    def token_id(self, text: str, /) -> int | None: ...


@dataclass(frozen=True, slots=True)
class ToolSyntax:
    """`begin` calls joined by `separator` `end`; a call is `before_name` NAME `after_name` JSON `after_arguments`.

    White space in these texts is what a model writes; a parser does not insist on it.
    """

    name: str
    """`deepseek-v3`, `deepseek-v3.1`, `kimi-k2` or `json`."""
    begin: str
    """Empty where calls are the whole answer, without a mark of their own."""
    end: str
    before_name: str
    after_name: str
    after_arguments: str
    separator: str
    numbered: bool = False
    """Each name is followed by `:` and the number of the call, and both are the call's id."""
    marks: Mapping[str, int] = field(default_factory=dict)
    """Ids of the tokens among these texts, and of the marks around thoughts where the model has them."""

    @property
    def thinks(self) -> bool:
        return THINK_END in self.marks

    def called(self, written: str) -> tuple[str, str | None] | None:
        """Function and call id of what stands between `before_name` and `after_name`; None if that is no name."""
        pattern = r"([a-zA-Z0-9_-]{1,64}):\d+" if self.numbered else r"([a-zA-Z0-9_-]{1,64})"
        match = re.fullmatch(pattern, written)
        if match is None:
            return None
        return match[1], self.before_name.rpartition(">")[2] + written if self.numbered else None


DEEPSEEK_V3 = ToolSyntax(
    name="deepseek-v3",
    begin=_SECTION_BEGIN,
    end=_SECTION_END,
    before_name=f"{_CALL_BEGIN}function{_SEP}",
    after_name="\n```json\n",
    after_arguments=f"\n```{_CALL_END}",
    separator="\n",
)
DEEPSEEK_V31 = replace(
    DEEPSEEK_V3,
    name="deepseek-v3.1",
    before_name=_CALL_BEGIN,
    after_name=_SEP,
    after_arguments=_CALL_END,
    separator="",
)
KIMI_K2 = ToolSyntax(
    name="kimi-k2",
    begin="<|tool_calls_section_begin|>",
    end="<|tool_calls_section_end|>",
    before_name="<|tool_call_begin|>functions.",
    after_name="<|tool_call_argument_begin|>",
    after_arguments="<|tool_call_end|>",
    separator="",
    numbered=True,
)
JSON_CALLS = ToolSyntax(
    name="json",
    begin="",
    end="",
    before_name='{"name": "',
    after_name='", "arguments": ',
    after_arguments="}",
    separator="\n",
)


def detect_syntax(tokenizer: AddedTokens, template_source: str | None) -> ToolSyntax:
    """By the tokens there are, then by what the template does with them.

    The first chat models of the family have the tokens but a template without tools or role tokens: they were not
    trained on them and get the JSON form.
    """
    source, tokens = template_source or "", set(tokenizer.added_tokens)
    syntax = JSON_CALLS
    if {KIMI_K2.begin, KIMI_K2.end} <= tokens:
        syntax = KIMI_K2
    elif {_SECTION_BEGIN, _SECTION_END, _CALL_BEGIN, _CALL_END, _SEP} <= tokens and "<｜User｜>" in source:
        syntax = DEEPSEEK_V31 if _SEP in source and "```json" not in source else DEEPSEEK_V3
    texts = (syntax.begin, syntax.end, syntax.before_name, syntax.after_name, syntax.after_arguments)
    used = {token for token in tokens if token.strip() and any(token in text for text in texts)}
    if syntax is JSON_CALLS:
        used = set()
    if {THINK_BEGIN, THINK_END} <= tokens:
        used |= {THINK_BEGIN, THINK_END}
    ids = {token: tokenizer.token_id(token) for token in sorted(used)}
    return replace(syntax, marks={token: token_id for token, token_id in ids.items() if token_id is not None})


def check_tools(tools: Tools, tool_choice: ToolChoice | None) -> None:
    """What the types of a request cannot say. Raises BadRequest with `param`."""
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) < len(names):
        raise BadRequest("The functions in 'tools' must have different names.", param="tools")
    if tool_choice in (None, "none", "auto"):
        return
    if not tools:
        raise BadRequest("'tool_choice' needs 'tools'.", param="tool_choice")
    if isinstance(tool_choice, Mapping) and tool_choice["function"]["name"] not in names:
        raise BadRequest("'tool_choice' names a function that is not in 'tools'.", param="tool_choice")


def tool_grammar(
    syntax: ToolSyntax,
    tools: Tools,
    tool_choice: ToolChoice | None,
    parallel_tool_calls: bool = True,
    *,
    answer: Grammar | None = None,
    thinking: bool = False,
) -> Grammar | None:
    """The grammar of a whole message in llguidance's Lark, or None where nothing is asked of it.

    `required` and a named function: calls and nothing else, with arguments of their schemas. `auto`: any text (or
    what `answer` allows), then perhaps calls, when a function is strict, there is an `answer`, or only one call is
    allowed; the JSON form is then either text or calls. `thinking`: the output begins inside the model's thoughts,
    which are free. Raises BadRequest for a strict function's schema that cannot be enforced, and for an `answer` that
    cannot be combined.
    """
    tool_choice = "auto" if tool_choice is None else tool_choice
    if tool_choice == "none":
        tools = ()
    forced = bool(tools) and tool_choice != "auto"
    strict = any(tool["function"].get("strict") for tool in tools)
    lazy = bool(tools) and (strict or not parallel_tool_calls)
    if not (forced or lazy or (answer is not None and (tools or thinking))):
        return answer
    rules: dict[str, str] = {}
    if tools:
        rules |= _call_rules(syntax, tools, tool_choice, parallel_tool_calls)
    if forced:
        body = "calls"
    elif answer is not None:
        rules |= _answer_rules(answer)
        body = "(answer | calls)" if tools else "answer"
    elif not syntax.begin:
        rules["TEXT"] = r"/ ?[^{\s](?s:.*)/"
        body = "(TEXT | calls)"
    else:
        rules["TEXT"] = r"/(?s:.*)/"
        body = "TEXT calls?"
    if thinking:
        rules["THOUGHTS"] = r"/(?s:.*)/"
        rules["GAP"] = r"/\n{0,2}/"
        body = f"THOUGHTS <[{syntax.marks[THINK_END]}]> " + (body if body == "TEXT calls?" else f"GAP {body}")
    return Grammar(kind="lark", text="".join(f"{name}: {rule}\n" for name, rule in ({"start": body} | rules).items()))


def _call_rules(
    syntax: ToolSyntax, tools: Tools, tool_choice: ToolChoice, parallel_tool_calls: bool
) -> Iterator[tuple[str, str]]:
    chosen = tool_choice["function"]["name"] if isinstance(tool_choice, Mapping) else None
    numbers = [index for index, tool in enumerate(tools) if chosen in (None, tool["function"]["name"])]
    more = f"({_lark(syntax, syntax.separator)} call)*".replace("( ", "(") if parallel_tool_calls else ""
    yield "calls", " ".join(filter(None, (_lark(syntax, syntax.begin), "call", more, _lark(syntax, syntax.end))))
    yield "call", " | ".join(f"call_{index}" for index in numbers)
    for index in numbers:
        function = tools[index]["function"]
        before = _lark(syntax, syntax.before_name + function["name"])
        number = r'":" /[0-9]{1,3}/' if syntax.numbered else ""
        after = _lark(syntax, syntax.after_name)
        yield f"call_{index}", f"{before} {number} {after} arguments_{index} {_lark(syntax, syntax.after_arguments)}"
        yield f"arguments_{index}", f"%json {_parameters(function, f'tools[{index}].function.parameters')}"


def _parameters(function: Mapping[str, Any], param: str) -> str:
    """The schema of the arguments as JSON text. One that cannot be enforced binds only strict functions."""
    schema = function.get("parameters")
    if not schema:
        return schema_text(NO_PARAMETERS, param)
    if schema.get("type", "object") != "object":
        raise BadRequest(f"'{param}' must be the schema of an object.", param=param)
    try:
        return schema_text({"type": "object", **schema}, param)
    except BadRequest:
        if function.get("strict"):
            raise
        return schema_text({"type": "object"}, param)


def _answer_rules(answer: Grammar) -> dict[str, str]:
    match answer.kind:
        case "json_schema":
            return {"answer": f"%json {answer.text}"}
        case "regex":
            return {"answer": f"/{_slashes(answer.text)}/"}
    # A whole grammar has rules of its own, whose names may be ours.
    raise BadRequest("A grammar cannot be combined with tools or thinking.", param="structured_outputs")


def _slashes(regex: str) -> str:
    """A regex as Lark quotes it: between slashes, so those inside get a backslash."""
    return re.sub(r"(\\.)|/", lambda match: match[1] or r"\/", regex, flags=re.DOTALL).replace("\n", r"\n")


def _lark(syntax: ToolSyntax, text: str) -> str:
    """`text` as a sequence of Lark items: marks by token id, the rest as literals."""
    if not text:
        return ""
    marks = [mark for mark in syntax.marks if mark in text]
    pieces = re.split("(" + "|".join(map(re.escape, marks)) + ")", text) if marks else [text]
    return " ".join(
        f"<[{syntax.marks[piece]}]>" if piece in syntax.marks else json.dumps(piece, ensure_ascii=False)
        for piece in pieces
        if piece
    )
