"""Chat messages to prompt text by the checkpoint's own template, in a sandbox, so that no message can forge
control tokens.

A text such as `<｜Assistant｜>` is a control token only where the template wrote it. Before rendering, each place in a
message where such a text begins gets a marker character in front; in the rendered prompt a control-token text behind a
marker is therefore somebody's text. The prompt is then cut into segments: those with a forgery are tokenized without
control tokens, all others as transformers would do. A prompt without forgeries is one segment. As tokenizers
themselves cut a text at control tokens first, the ids around a forgery are those of the same text, whole.
"""

from __future__ import annotations

import datetime
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox

from server.tokenizer import Segment, Tokenizer
from server.tool_prompt import as_text, native_template, results_in_order
from server.tool_syntax import ToolSyntax, detect_syntax

Message = Mapping[str, Any]

ROLES = ("system", "user", "assistant", "tool")
_OUTPUT_FACTOR = 4
_OUTPUT_CONSTANT = 1 << 16
_MARKERS = tuple(map(chr, range(0xFDD0, 0xFDF0)))
"""Unicode noncharacters: never part of a text's meaning, hence of a template."""


class TemplateError(ValueError):
    """The messages, or the template, cannot be rendered; the text is meant for the client."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """`text` is what the template rendered; `segments` is the same text, cut for `Tokenizer.encode_segments`."""

    text: str
    segments: tuple[Segment, ...]


class ChatTemplate:
    """One compiled template. Rendering is pure: the same messages give the same prompt (but for `strftime_now`).

    `source`: Jinja text as in `tokenizer_config.json`. `control_tokens`: the texts that the tokenizer turns into
    one token each. `syntax`: how the model writes tool calls; with it, conversations with tools are rendered by
    `server/tool_prompt.py` unless the template knows `tools` itself. Raises `TemplateError` when the source does not
    compile.
    """

    def __init__(
        self,
        source: str,
        *,
        bos_token: str | None,
        eos_token: str | None,
        control_tokens: Sequence[str],
        syntax: ToolSyntax | None = None,
    ) -> None:
        self.syntax = syntax
        self._tokens = {"bos_token": bos_token or "", "eos_token": eos_token or ""}
        self._control = _ControlTokens(control_tokens)
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        environment.filters["tojson"] = _tojson
        try:
            self._template = environment.from_string(source)
            self._knows_tools = "tools" in jinja2.meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"chat template, line {error.lineno}: {error.message}") from error
        self._drops_tool_messages = self._probe_tool_messages()
        self.strip_leading_space = self._probe_leading_space()
        """The generation prompt ends in plain text ("Assistant:"), so the model's answer begins with a space
        that belongs to the format: a chat answer should drop that one space."""
        self._with_tools = self._for_tools(source, bos_token, eos_token, control_tokens)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """Renders OpenAI-style messages: role, content (string, text parts or null), tool_calls, tool_call_id, name.

        `variables` are the request's own template arguments. BOS is whatever the template writes: encode the
        segments without adding it. Raises `TemplateError`.
        """
        if not messages:
            raise TemplateError("messages must not be empty")
        plain = [_normalise(message, f"messages[{index}]") for index, message in enumerate(messages)]
        if tools or any(message["role"] == "tool" or "tool_calls" in message for message in plain):
            plain = [dict(message) for message in results_in_order(plain)]
            if self._with_tools is not None:
                return self._with_tools.render(
                    plain, add_generation_prompt=add_generation_prompt, tools=tools, variables=variables
                )
            if self.syntax is not None and not self._knows_tools:
                plain, tools = as_text(plain, tools), None
        if self._drops_tool_messages and any(message["role"] == "tool" for message in plain):
            raise TemplateError("the chat template of this model has no place for messages with role 'tool'")
        context = {
            **(variables or {}),
            "messages": plain,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        strings = list(_strings(context))
        limit = _OUTPUT_FACTOR * sum(map(len, strings)) + _OUTPUT_CONSTANT
        if not any(map(self._control.may_begin_in, strings)):
            text = self._render(context, limit)
            return Prompt(text, (Segment(text, trusted=True),))
        marker = next((char for char in _MARKERS if not any(char in text for text in strings)), None)
        if marker is None:
            raise TemplateError("messages contain control-token texts together with every Unicode noncharacter")
        marked = self._render(_map_strings(context, lambda text: self._control.mark(text, marker)), limit)
        return Prompt(marked.replace(marker, ""), tuple(self._control.segments(marked, marker)))

    def _for_tools(
        self, source: str, bos_token: str | None, eos_token: str | None, control_tokens: Sequence[str]
    ) -> ChatTemplate | None:
        """The template for conversations with tools, where another one is needed and known."""
        if self.syntax is None or self._knows_tools:
            return None
        try:
            prompt = self.render([{"role": "user", "content": "x"}]).text
        except TemplateError:
            return None
        opening = prompt.rpartition("<｜Assistant｜>")[2] if "<｜Assistant｜>" in prompt else ""
        native = native_template(self.syntax, opening, drop_thoughts="</think>" in source)
        if native is None:
            return None
        return ChatTemplate(native, bos_token=bos_token, eos_token=eos_token, control_tokens=control_tokens)

    def _render(self, context: Mapping[str, Any], limit: int) -> str:
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate({**context, **self._tokens}):
                pieces.append(piece)
                size += len(piece)
                if size > limit:
                    raise TemplateError(f"the rendered prompt is longer than {limit} characters")
        except TemplateError:
            raise
        except Exception as error:  # a template is a program: it can fail in any way
            raise TemplateError(f"the chat template cannot render these messages: {str(error)[:200]}") from error
        return "".join(pieces)

    def _probe_leading_space(self) -> bool:
        messages = [{"role": "user", "content": "x"}]
        try:
            return self.render(messages).text.endswith(":") and not self.render(
                messages, add_generation_prompt=False
            ).text.endswith(":")
        except TemplateError:
            return False

    def _probe_tool_messages(self) -> bool:
        """Templates that do not know the role leave such messages out without a word."""
        call = {"id": "call_0", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        messages = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "latentd-probe", "tool_call_id": "call_0"},
        ]
        context = {"messages": messages, "tools": None, "add_generation_prompt": True}
        try:
            return "latentd-probe" not in self._render(context, _OUTPUT_CONSTANT)
        except TemplateError:
            return False


def load_chat_template(tokenizer: Tokenizer) -> ChatTemplate | None:
    """The checkpoint's template, compiled; None for base models, which have none. Raises `TemplateError`."""
    if tokenizer.chat_template is None:
        return None
    return ChatTemplate(
        tokenizer.chat_template,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        control_tokens=tokenizer.added_tokens,
        syntax=detect_syntax(tokenizer, tokenizer.chat_template),
    )


class _ControlTokens:
    """Finds control-token texts; of several that begin at one place the longest, as tokenizers do."""

    def __init__(self, tokens: Sequence[str]) -> None:
        # Some tokenizers list runs of spaces as added tokens: those are text.
        texts = {token for token in tokens if token.strip()}
        self._pattern = re.compile(_one_of(texts) or "(?!)")
        self._beginnings = {text[:length] for text in texts for length in range(1, len(text))}
        self._longest = max(map(len, texts), default=0)

    def may_begin_in(self, text: str) -> bool:
        return self._pattern.search(text) is not None or bool(self._unfinished(text))

    def mark(self, text: str, marker: str) -> str:
        """`marker` before every place where a control token begins, or would with what may follow the text."""
        places: list[int] = []
        position = 0
        while match := self._pattern.search(text, position):
            places.append(match.start())
            position = match.start() + 1
        places += self._unfinished(text)
        edges = [0, *sorted(set(places)), len(text)]
        return marker.join(text[start:end] for start, end in itertools.pairwise(edges))

    def _unfinished(self, text: str) -> list[int]:
        """Where the end of the text is the beginning of a control token, which a neighbour could complete."""
        end = len(text.rstrip())
        return [at for at in range(max(0, end - self._longest + 1), end) if text[at:end] in self._beginnings]

    def segments(self, marked: str, marker: str) -> Iterator[Segment]:
        """Cuts at the unmarked control tokens; only the pieces that have a marker become untrusted."""
        trusted_from = cursor = 0
        for start, end in itertools.chain(self._unmarked(marked, marker), [(len(marked), len(marked))]):
            if marker in (piece := marked[cursor:start]):
                if trusted_from < cursor:
                    yield Segment(marked[trusted_from:cursor], trusted=True)
                yield Segment(piece.replace(marker, ""), trusted=False)
                trusted_from = start
            cursor = end
        if trusted_from < len(marked):
            yield Segment(marked[trusted_from:], trusted=True)

    def _unmarked(self, marked: str, marker: str) -> Iterator[tuple[int, int]]:
        position = 0
        while match := self._pattern.search(marked, position):
            if marked.startswith(marker, max(0, match.start() - 1)):
                position = match.start() + 1
            else:
                yield match.span()
                position = match.end()


def _one_of(texts: Iterable[str]) -> str:
    """A pattern for the longest of the texts, common beginnings shared: the family has 800 that begin with "<｜"."""
    patterns: list[str] = []
    for _, group in itertools.groupby(sorted(texts), key=lambda text: text[0]):
        alike = list(group)
        shared = os.path.commonprefix(alike)  # noqa: RUF071 (characters are meant, not path components)
        rests = [text[len(shared) :] for text in alike]
        longer = _one_of(rest for rest in rests if rest)
        optional = "?" if "" in rests else ""
        patterns.append(re.escape(shared) + (f"(?:{longer}){optional}" if longer else ""))
    return "|".join(patterns)


def _normalise(message: Message, where: str) -> dict[str, Any]:
    """One message as templates expect it: absent rather than null, and content as a string.

    Content stays null only beside tool calls: templates of the family ask for that.
    """
    plain = {key: value for key, value in message.items() if value is not None}
    role = plain.get("role")
    if role == "developer":
        role = "system"
    if role not in ROLES:
        raise TemplateError(f"{where}.role must be one of {', '.join(ROLES)} or developer")
    if calls := plain.pop("tool_calls", None):
        plain["tool_calls"] = _normalise_calls(calls, f"{where}.tool_calls")
    content = plain.get("content")
    if content is None and not (role == "assistant" and calls):
        raise TemplateError(f"{where}.content must be a string or a list of text parts")
    return {**plain, "role": role, "content": _content_text(content, f"{where}.content")}


def _content_text(content: object, where: str) -> str | None:
    match content:
        case None | str():
            return content
        case list() | tuple():
            return "\n".join(_part_text(part, f"{where}[{index}]") for index, part in enumerate(content))
        case _:
            raise TemplateError(f"{where} must be a string or a list of text parts")


def _part_text(part: object, where: str) -> str:
    match part:
        case {"type": "text" | "input_text", "text": str(text)} | {"type": "refusal", "refusal": str(text)}:
            return text
        case {"type": str(kind)} if kind not in ("text", "input_text", "refusal"):
            raise TemplateError(f"{where}: parts of type {kind[:64]!r} are not supported, only text")
        case _:
            raise TemplateError(f"{where} must be an object with type 'text' and a string text")


def _normalise_calls(calls: object, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list | tuple):
        raise TemplateError(f"{where} must be a list")
    return [_normalise_call(call, f"{where}[{index}]") for index, call in enumerate(calls)]


def _normalise_call(call: object, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise TemplateError(f"{where} must be an object with function.name")
    arguments = function.get("arguments") or "{}"
    if not isinstance(arguments, str):  # templates of the family join it as text
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {**call, "type": "function", "function": {**function, "arguments": arguments}}


def _strings(value: object) -> Iterator[str]:
    """Every string in a JSON-like value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_strings(key, change): _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(item, change) for item in value]
    return value


def _raise_exception(message: object) -> NoReturn:
    raise TemplateError(str(message)[:1000])


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As in transformers: plain JSON, without Jinja's own escaping for HTML."""
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    # A marker must survive as a character to be found again.
    return re.sub(r"\\u(fd[de][0-9a-f])", lambda match: chr(int(match[1], 16)), text) if ensure_ascii else text
