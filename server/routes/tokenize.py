"""POST /tokenize, /detokenize and /v1/chat/completions/render, GET /tokenizer_info: the text half without the model."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server import limits
from server.admission import AdmissionGate
from server.chat import ChatService
from server.errors import BadRequest
from server.generation import Generator
from server.json_body import ignored_header, read_body
from server.openapi import body_docs, docs
from server.routes.answer import json_response, record_of
from server.sampling import check_token_ids
from server.schemas.chat import UNSUPPORTED, ChatCompletionRequest, ChatMessage
from server.schemas.tokenize import (
    UNSUPPORTED_TOKENIZE,
    DetokenizeRequest,
    DetokenizeResponse,
    RenderResponse,
    TokenizeRequest,
    TokenizeResponse,
    TokenizerInfo,
)
from server.served import ServedModel
from server.tokenizer import EncodeError

_ANY_LENGTH = int(limits.MAX_BODY_BYTES.maximum)
"""No text has more tokens than bytes: prompts beyond the model's window are counted too."""


def tokenize_router(generator: Generator, gate: AdmissionGate, chat: ChatService, served: ServedModel) -> APIRouter:
    router = APIRouter()
    tokenizer = generator.tokenizer

    # A place at the door: the tokenizer's threads are the same that open answers wait for.

    async def tokenize(request: Request) -> Response:
        body, ignored = await read_body(request, TokenizeRequest, UNSUPPORTED_TOKENIZE)
        served.resolve(body.model)
        window = generator.require_ready().max_model_len
        with gate.reserve(key=record_of(request).key_digest):
            if body.messages is not None:
                ids = await chat.encode(_chat_request(body, body.messages), _ANY_LENGTH)
            else:
                try:
                    ids = await tokenizer.encode(
                        body.prompt or "", add_special_tokens=body.add_special_tokens is not False
                    )
                except EncodeError as error:
                    raise BadRequest(f"{error}.", param="prompt") from None
            strings = await asyncio.to_thread(tokenizer.token_strings, ids) if body.return_token_strs else None
        answer = TokenizeResponse(count=len(ids), max_model_len=window, tokens=ids.tolist(), token_strs=strings)
        return json_response(answer, headers=ignored_header(ignored))

    async def detokenize(request: Request) -> Response:
        body, ignored = await read_body(request, DetokenizeRequest, {})
        served.resolve(body.model)
        tokens = body.tokens
        check_token_ids(tokens, tokenizer.vocab_size, "tokens")
        if body.skip_special_tokens:
            tokens = [token_id for token_id in tokens if not tokenizer.is_special(token_id)]
        text = b"".join(map(tokenizer.token_bytes, tokens)).decode(errors="replace")
        return json_response(DetokenizeResponse(prompt=text, text=text), headers=ignored_header(ignored))

    for prefix in ("", "/v1"):
        in_schema = prefix == ""
        router.add_api_route(
            f"{prefix}/tokenize",
            tokenize,
            methods=["POST"],
            include_in_schema=in_schema,
            summary="The tokens of a text or of messages",
            **body_docs(TokenizeRequest, TokenizeResponse),
        )
        router.add_api_route(
            f"{prefix}/detokenize",
            detokenize,
            methods=["POST"],
            include_in_schema=in_schema,
            summary="The text of tokens",
            **body_docs(DetokenizeRequest, DetokenizeResponse),
        )

    @router.get("/tokenizer_info", summary="Special tokens and chat template", **docs(TokenizerInfo, 401, 503))
    async def tokenizer_info() -> Response:
        info = TokenizerInfo(
            tokenizer_class="PreTrainedTokenizerFast",
            vocab_size=tokenizer.vocab_size,
            model_max_length=generator.require_ready().max_model_len,
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
            pad_token=tokenizer.eos_token,
            add_bos_token=tokenizer.add_bos_token,
            chat_template=tokenizer.chat_template,
        )
        return json_response(info)

    @router.post(
        "/v1/chat/completions/render",
        summary="The prompt of a conversation, without an answer",
        **body_docs(ChatCompletionRequest, RenderResponse),
    )
    async def render_chat(request: Request) -> Response:
        body, ignored = await read_body(request, ChatCompletionRequest, UNSUPPORTED)
        model = served.resolve(body.model)
        window = generator.require_ready().max_model_len
        with gate.reserve(key=record_of(request).key_digest):
            prompt = await chat.render(body)
            ids = await chat.encode_prompt(prompt, body, _ANY_LENGTH)
        answer = RenderResponse(
            model=model, prompt=prompt.text, count=len(ids), max_model_len=window, tokens=ids.tolist()
        )
        return json_response(answer, headers=ignored_header(ignored))

    return router


def _chat_request(body: TokenizeRequest, messages: list[ChatMessage]) -> ChatCompletionRequest:
    """The chat request with this prompt; its parts have been validated."""
    return ChatCompletionRequest.model_construct(
        messages=messages,
        tools=body.tools,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        chat_template_kwargs=body.chat_template_kwargs,
        add_special_tokens=body.add_special_tokens,
    )
