"""The prompts of `/v1/completions` as token ids: texts, ids, and holes to be filled in."""

from __future__ import annotations

from array import array

from server.errors import BadRequest
from server.generation import refuse_long_text
from server.sampling import check_token_ids, prompt_too_long
from server.schemas.completion import CompletionRequest
from server.tokenizer import EncodeError, Segment, Tokenizer, TooManyTokensError

FIM_TOKENS = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")
"""DeepSeek's: begin, prefix, hole, suffix, end; the answer is what belongs into the hole (DeepSeek-Coder,
arXiv 2401.14196, 3.1.2)."""


def check_prompts(body: CompletionRequest, tokenizer: Tokenizer) -> None:
    """Raises BadRequest for what is wrong whatever the engine says."""
    for number, prompt in enumerate(body.prompts):
        if not isinstance(prompt, str):
            is_only = isinstance(body.prompt[0], int)
            check_token_ids(prompt, tokenizer.vocab_size, "prompt" if is_only else f"prompt[{number}]")
    if not body.suffix:
        return
    if not set(FIM_TOKENS) <= set(tokenizer.added_tokens):
        raise BadRequest("This model has no tokens for a suffix: it cannot fill in.", param="suffix")
    if body.echo:
        raise BadRequest("'echo' is not possible together with 'suffix'.", param="echo")
    if not all(isinstance(prompt, str) for prompt in body.prompts):
        raise BadRequest("With 'suffix' the prompt must be a text.", param="suffix")


async def encode_prompt(
    prompt: str | list[int], body: CompletionRequest, tokenizer: Tokenizer, window: int
) -> array[int]:
    """Raises BadRequest."""
    if not isinstance(prompt, str):
        return array("I", prompt)
    suffix = body.suffix or ""
    refuse_long_text(prompt + suffix, tokenizer, window, "prompt")
    add_bos = body.add_special_tokens is not False
    try:
        if not suffix:
            return await tokenizer.encode(prompt, add_special_tokens=add_bos, most=window)
        begin, hole, end = (Segment(text, trusted=True) for text in FIM_TOKENS)
        ids = await tokenizer.encode_segments(
            # Source code may well contain these very texts.
            [begin, Segment(prompt, trusted=False), hole, Segment(suffix, trusted=False), end],
            window,
        )
    except EncodeError as error:
        raise BadRequest(f"Invalid value for 'prompt': {error}.", param="prompt") from None
    except TooManyTokensError as error:
        raise prompt_too_long(window, f"more than {error.count}", "prompt") from None
    if add_bos and tokenizer.add_bos_token and tokenizer.bos_token_id is not None:
        ids.insert(0, tokenizer.bos_token_id)
    return ids
