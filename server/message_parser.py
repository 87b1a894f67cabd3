"""The text of an answer, as it arrives, into thoughts, content and tool calls.

Text is held back only while it may be part of a mark or of a call's head. What turns out to be no call is content:
nothing is lost but the marks themselves and the line breaks around thoughts.
"""

from __future__ import annotations

import enum
import re
import uuid
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from server.events import ToolCallDelta
from server.tool_syntax import THINK_BEGIN, THINK_END, ToolSyntax

_LONGEST_HEAD = 512
"""Characters of a call before its arguments; white space could make it endless."""
_WRITTEN_NAME = re.compile(r"[\w.:-]*")
_JSON_OUTSIDE_STRINGS = frozenset("{}[]:,+-. \t\r\n")


@dataclass(frozen=True, slots=True)
class Piece:
    """One of the three is set."""

    content: str = ""
    reasoning: str = ""
    tool_call: ToolCallDelta | None = None


class _State(enum.Enum):
    START = enum.auto()
    """Nothing but white space so far: thoughts may begin."""
    REASONING = enum.auto()
    CONTENT = enum.auto()
    CALLS = enum.auto()
    """Inside the section of calls, between two of them."""
    ARGUMENTS = enum.auto()
    AFTER_ARGUMENTS = enum.auto()


class _Unfinished(Exception):  # noqa: N818  (not an error)
    """The text so far could still become what is looked for."""


def new_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


class MessageParser:
    """The parts of one answer. However the text is cut into `push` calls, the parts are the same.

    `reasoning`: the prompt opened the model's thoughts, so the text begins inside them. `tools`: names of the functions
    offered; without them nothing is a call. Not to be used after `finish`.
    """

    def __init__(
        self,
        syntax: ToolSyntax | None,
        *,
        reasoning: bool = False,
        tools: Collection[str] = (),
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        self._syntax = syntax
        self._tools = frozenset(tools)
        self._new_id = new_id
        self._buffer = ""
        thinks = syntax is not None and syntax.thinks
        self._state = _State.CONTENT if not thinks else _State.REASONING if reasoning else _State.START
        self._fresh = self._state is _State.REASONING
        """Line breaks that come now belong to the format."""
        self._whole = True
        """Nothing but white space was content: where calls have no mark, they may still begin."""
        self._json = _JsonScanner()
        self.num_calls = 0

    @property
    def reasoning(self) -> bool:
        """Whether the text so far ends in the model's thoughts."""
        return self._state is _State.REASONING

    def push(self, text: str) -> list[Piece]:
        """Adds text; returns the pieces that are certain now."""
        self._buffer += text
        return self._pieces(final=False)

    def finish(self) -> list[Piece]:
        """Ends the text: returns what was held back."""
        return self._pieces(final=True)

    def _pieces(self, final: bool) -> list[Piece]:
        pieces: list[Piece] = []
        steps: dict[_State, Callable[[bool], Iterator[Piece]]] = {
            _State.START: self._start,
            _State.REASONING: self._thoughts,
            _State.CONTENT: self._content,
            _State.CALLS: self._calls,
            _State.ARGUMENTS: self._arguments,
            _State.AFTER_ARGUMENTS: self._after_arguments,
        }
        while self._buffer:
            before = self._state, len(self._buffer)
            pieces += steps[self._state](final)
            if before == (self._state, len(self._buffer)):
                break
        return pieces

    def _take(self, length: int) -> str:
        taken, self._buffer = self._buffer[:length], self._buffer[length:]
        return taken

    def _start(self, final: bool) -> Iterator[Piece]:
        text = self._buffer.lstrip()
        if text.startswith(THINK_BEGIN):
            self._buffer = text[len(THINK_BEGIN) :]
            self._state, self._fresh = _State.REASONING, True
        elif final or not THINK_BEGIN.startswith(text):
            self._state = _State.CONTENT
        yield from ()

    def _thoughts(self, final: bool) -> Iterator[Piece]:
        self._drop_line_breaks()
        end = self._buffer.find(THINK_END)
        if thoughts := self._take(end if end >= 0 else len(self._buffer) - (0 if final else self._held(THINK_END))):
            yield Piece(reasoning=thoughts)
        if end >= 0:
            self._take(len(THINK_END))
            self._state, self._fresh = _State.CONTENT, True

    def _drop_line_breaks(self) -> None:
        if self._fresh:
            self._buffer = self._buffer.lstrip("\n")
            self._fresh = not self._buffer

    def _content(self, final: bool) -> Iterator[Piece]:
        self._drop_line_breaks()
        syntax = self._syntax
        if syntax is None or not self._tools:
            yield from self._text(len(self._buffer))
            return
        if not syntax.begin:
            if self._whole:
                yield from self._call_or_text(syntax, 0, final)
            else:
                yield from self._text(len(self._buffer))
            return
        at = self._buffer.find(syntax.begin)
        if at < 0:
            at = len(self._buffer) - (0 if final else self._held(syntax.begin))
        yield from self._text(at)
        if self._buffer.startswith(syntax.begin):
            yield from self._call_or_text(syntax, len(syntax.begin), final)

    def _text(self, length: int) -> Iterator[Piece]:
        if text := self._take(length):
            self._whole = self._whole and text.isspace()
            yield Piece(content=text)

    def _held(self, mark: str) -> int:
        """Characters at the end of the buffer that begin the mark."""
        longest = min(len(mark) - 1, len(self._buffer))
        return next((n for n in range(longest, 0, -1) if self._buffer.endswith(mark[:n])), 0)

    def _call_or_text(self, syntax: ToolSyntax, begin: int, final: bool) -> Iterator[Piece]:
        """A call's head behind `begin` characters, or else those are content."""
        try:
            head = self._head(syntax, begin)
        except _Unfinished:
            if not final:
                return
            head = None
        if head is not None:
            yield self._open_call(*head)
            return
        self._whole = False
        self._state = _State.CONTENT
        yield from self._text(begin or len(self._buffer))

    def _open_call(self, name: str, call_id: str | None, end: int) -> Piece:
        self._take(end)
        self._json = _JsonScanner()
        self._state = _State.ARGUMENTS
        delta = ToolCallDelta(self.num_calls, call_id or self._new_id(), name)
        self.num_calls += 1
        return Piece(tool_call=delta)

    def _head(self, syntax: ToolSyntax, begin: int) -> tuple[str, str | None, int] | None:
        """Function, call id, and where the arguments begin; None where there is no call."""
        text = self._buffer
        try:
            at = _behind(syntax.before_name, text, begin)
            if at is None:
                return None
            at = _skip_space(text, at)
            written = _WRITTEN_NAME.match(text, at)
            assert written is not None
            if written.end() == len(text):
                raise _Unfinished
            at = _behind(syntax.after_name, text, written.end())
            called = syntax.called(written[0])
            if at is None or called is None or not (syntax.begin or called[0] in self._tools):
                return None
            at = _skip_space(text, at)
            return (*called, at) if text[at] == "{" and at <= _LONGEST_HEAD else None
        except _Unfinished:
            if len(text) > _LONGEST_HEAD:
                return None
            raise

    def _calls(self, final: bool) -> Iterator[Piece]:
        syntax = self._syntax
        assert syntax is not None
        self._buffer = self._buffer.lstrip()
        if not self._buffer:
            return
        if syntax.end and self._buffer.startswith(syntax.end):
            self._take(len(syntax.end))
            self._state, self._whole = _State.CONTENT, False
        elif syntax.end.startswith(self._buffer):
            if final:  # the answer was cut inside the mark
                self._buffer = ""
        else:
            yield from self._call_or_text(syntax, 0, final)

    def _arguments(self, final: bool) -> Iterator[Piece]:
        length, self._state = self._json.scan(self._buffer)
        if arguments := self._take(length):
            yield Piece(tool_call=ToolCallDelta(self.num_calls - 1, arguments=arguments))

    def _after_arguments(self, final: bool) -> Iterator[Piece]:
        assert self._syntax is not None
        try:
            end = _behind(self._syntax.after_arguments, self._buffer, 0)
        except _Unfinished:
            if final:  # the answer was cut inside the mark
                self._buffer = ""
            elif len(self._buffer) > _LONGEST_HEAD:
                self._state = _State.CALLS
            return
        self._take(end if end is not None and end <= _LONGEST_HEAD + 1 else 0)
        self._state = _State.CALLS
        yield from ()


class _JsonScanner:
    """Finds the end of one JSON object, or the first character that cannot be JSON. In strings, marks are text."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def scan(self, text: str) -> tuple[int, _State]:
        """How many characters belong to the object, and whether it goes on."""
        for at, char in enumerate(text):
            if self._in_string and char >= " ":
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._in_string = False
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return at + 1, _State.AFTER_ARGUMENTS
            elif char not in _JSON_OUTSIDE_STRINGS and not (char.isascii() and char.isalnum()):
                return at, _State.AFTER_ARGUMENTS
            else:
                self._in_string = False  # a line break in a string: broken JSON, which must not swallow the marks
        return len(text), _State.ARGUMENTS


def _behind(pattern: str, text: str, at: int) -> int | None:
    """Where `pattern` ends in the text from `at` on, white space in either ignored; None where it is not.

    Raises _Unfinished when the text ends first.
    """
    for char in pattern:
        if char.isspace():
            continue
        at = _skip_space(text, at)
        if text[at] != char:
            return None
        at += 1
    return at


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    if at == len(text):
        raise _Unfinished
    return at
