"""From a conversation to the events of its answer: what chat completions, responses and messages have in common."""

from __future__ import annotations

import uuid
from array import array
from collections.abc import AsyncGenerator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

from scheduler.messages import Grammar
from server.chat_template import ChatTemplate, Prompt, TemplateError
from server.errors import BadRequest
from server.events import ChoiceEvent
from server.generation import Generator, Job, refuse_long_text
from server.message_parser import MessageParser
from server.message_split import MessageSplitter
from server.record import RequestRecord
from server.sampling import prompt_too_long
from server.schemas.chat import ChatCompletionRequest, ChatMessage
from server.structured import response_grammar
from server.time_limit import run_within
from server.tokenizer import EncodeError, Segment, TooManyTokensError
from server.tool_prompt import template_variables
from server.tool_syntax import THINK_BEGIN, THINK_END, Tools, check_tools, tool_grammar

RENDER_SECONDS = 2.0
RENDER_THREADS = 2
_END_OF_CONTENT = "\U0001fffe"
"""A noncharacter: marks where the last message's text ends in the rendered prompt."""


class ChatService:
    """Renders, checks and generates. `template` is None for base models, which have none."""

    def __init__(self, generator: Generator, template: ChatTemplate | None) -> None:
        self._generator = generator
        self._template = template
        self._executor = ThreadPoolExecutor(RENDER_THREADS, thread_name_prefix="render")

    async def events(
        self, body: ChatCompletionRequest, record: RequestRecord, answer_id: str | None = None
    ) -> AsyncGenerator[ChoiceEvent, None]:
        """The events of all choices. Raises ApiError before the first event for anything that can be refused."""
        job, splitter = self._job(body, answer_id)
        async with aclosing(self._generator.generate(job, record)) as events:
            async for event in events:
                yield splitter.split(event)

    async def render(self, body: ChatCompletionRequest) -> Prompt:
        """The prompt of the conversation. Raises BadRequest."""
        template = self._require_template()
        try:
            # A template is a program of whoever made the checkpoint, and long conversations keep it busy.
            return await run_within(RENDER_SECONDS, self._executor, lambda: self._render(template, body))
        except TimeoutError:
            raise BadRequest(
                f"The chat template takes more than {RENDER_SECONDS:.0f} seconds for these messages.", param="messages"
            ) from None

    def _require_template(self) -> ChatTemplate:
        if self._template is None:
            raise BadRequest("This model has no chat template; use /v1/completions.", code="no_chat_template")
        return self._template

    @staticmethod
    def _render(template: ChatTemplate, body: ChatCompletionRequest) -> Prompt:
        messages = [plain_message(message) for message in body.messages]
        is_continued = continues_last_message(body)
        if is_continued:
            content = messages[-1]["content"]
            messages[-1]["content"] = (content if isinstance(content, str) else _joined(content)) + _END_OF_CONTENT
        try:
            prompt = template.render(
                messages,
                add_generation_prompt=not is_continued and body.add_generation_prompt is not False,
                tools=_tools(body) or None,
                variables=_variables(body),
            )
        except TemplateError as error:
            raise BadRequest(str(error), param="messages") from None
        return _cut(prompt) if is_continued else prompt

    async def encode(self, body: ChatCompletionRequest, window: int) -> array[int]:
        """Token ids of the prompt. Raises BadRequest."""
        return await self.encode_prompt(await self.render(body), body, window)

    async def encode_prompt(self, prompt: Prompt, body: ChatCompletionRequest, window: int) -> array[int]:
        """Token ids of what `render` gave. Raises BadRequest."""
        tokenizer = self._generator.tokenizer
        refuse_long_text(prompt.text, tokenizer, window, "messages")
        try:
            ids = await tokenizer.encode_segments(prompt.segments, window)
        except EncodeError as error:
            raise BadRequest(f"Invalid value for 'messages': {error}.", param="messages") from None
        except TooManyTokensError as error:
            raise prompt_too_long(window, f"more than {error.count}", "messages") from None
        if (
            body.add_special_tokens
            and tokenizer.bos_token_id is not None
            and ids[:1] != array("I", [tokenizer.bos_token_id])
        ):
            ids.insert(0, tokenizer.bos_token_id)
        return ids

    def _job(self, body: ChatCompletionRequest, answer_id: str | None) -> tuple[Job, MessageSplitter]:
        if body.top_logprobs is not None and not body.logprobs:
            raise BadRequest("'top_logprobs' is only allowed when 'logprobs' is true.", param="top_logprobs")
        template = self._require_template()
        syntax = template.syntax
        assert syntax is not None
        tools = _tools(body)
        names = [tool["function"]["name"] for tool in tools]
        thinking = False  # until the prompt is rendered

        async def encode(window: int) -> array[int]:
            nonlocal thinking
            prompt = await self.render(body)
            thinking = syntax.thinks and prompt.text.rstrip().endswith(THINK_BEGIN)
            return await self.encode_prompt(prompt, body, window)

        def grammar() -> Grammar | None:
            return tool_grammar(
                syntax,
                tools,
                _tool_choice(body),
                body.parallel_tool_calls is not False,
                answer=response_grammar(body.response_format, body.structured_outputs),
                thinking=thinking,
            )

        splitter = MessageSplitter(
            lambda: MessageParser(syntax, reasoning=thinking, tools=names), syntax.marks.get(THINK_END)
        )
        is_new_turn = body.add_generation_prompt is not False and not continues_last_message(body)
        job = Job(
            request_id=answer_id or f"chatcmpl-{uuid.uuid4().hex}",
            fields=body,
            prompts=[encode],
            param="messages",
            strip_leading_space=template.strip_leading_space and is_new_turn,
            logprobs=body.num_logprobs,
            grammar=grammar,
            shown=tuple(syntax.marks.values()) if tools else _think_marks(syntax.marks),
        )
        return job, splitter


def _tools(body: ChatCompletionRequest) -> Tools:
    """What is offered to the model. Raises BadRequest."""
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    check_tools(tools, _tool_choice(body))
    return [] if body.tool_choice == "none" else tools


def _tool_choice(body: ChatCompletionRequest) -> str | dict[str, Any] | None:
    choice = body.tool_choice
    return choice if choice is None or isinstance(choice, str) else choice.model_dump()


def _think_marks(marks: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(marks[text] for text in (THINK_BEGIN, THINK_END) if text in marks)


def plain_message(message: ChatMessage) -> dict[str, Any]:
    """A message for the template. An assistant's null is an empty text, unless it calls tools.

    `function_call` and the role `function` had no ids: there is one call, and its name names it.
    """
    plain = message.model_dump(exclude={"prefix", "function_call"}, exclude_none=True)
    if message.role == "function":
        plain |= {"role": "tool", "tool_call_id": message.name}
    if (called := message.function_call) is not None:
        plain["tool_calls"] = [{"id": called.name, "type": "function", "function": called.model_dump()}]
    if not plain.get("tool_calls"):
        plain.pop("tool_calls", None)
        plain.setdefault("content", "")
    return plain


def continues_last_message(body: ChatCompletionRequest) -> bool:
    """Whether the answer goes on with the last message. Raises BadRequest for contradictions."""
    *earlier, last = body.messages
    for index, message in enumerate(earlier):
        if message.prefix:
            raise BadRequest("Only the last message can be a prefix.", param=f"messages[{index}].prefix")
    where = f"messages[{len(earlier)}]"
    if last.prefix and last.role != "assistant":
        raise BadRequest("Only a message of the assistant can be a prefix.", param=f"{where}.prefix")
    if last.prefix and body.continue_final_message is False:
        raise BadRequest("'prefix' and 'continue_final_message' contradict each other.", param="continue_final_message")
    is_continued = bool(last.prefix or body.continue_final_message)
    if is_continued and last.role != "assistant":
        raise BadRequest("Only a message of the assistant can be continued.", param="continue_final_message")
    if is_continued and (last.tool_calls or last.function_call):
        calls = "tool_calls" if last.tool_calls else "function_call"
        raise BadRequest("A message that calls tools cannot be continued.", param=f"{where}.{calls}")
    if is_continued and body.add_generation_prompt:
        raise BadRequest(
            "'add_generation_prompt' begins a new message, so the last one cannot be continued.",
            param="add_generation_prompt",
        )
    return is_continued


def _variables(body: ChatCompletionRequest) -> dict[str, Any]:
    thinking = None if body.thinking is None else body.thinking.type
    return template_variables(body.reasoning_effort, thinking, body.chat_template_kwargs)


def _joined(parts: list[Mapping[str, str]]) -> str:
    return "\n".join(part.get("text", part.get("refusal", "")) for part in parts)


def _cut(prompt: Prompt) -> Prompt:
    """The prompt up to the end of the last message's text, so without what the template writes behind it."""
    segments: list[Segment] = []
    for segment in prompt.segments:
        text, mark, _ = segment.text.partition(_END_OF_CONTENT)
        if text:
            segments.append(Segment(text, segment.trusted))
        if mark:
            return Prompt("".join(each.text for each in segments), tuple(segments))
    raise BadRequest("The chat template of this model leaves the last message out.", param="continue_final_message")
