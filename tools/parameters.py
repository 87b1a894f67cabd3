"""Every parameter that OpenAI and the servers beside us know for the completion endpoints, and what becomes of it."""

from __future__ import annotations

from collections.abc import Mapping

from server.schemas import chat, completion
from server.schemas.sampling import IGNORED

_SAMPLING = (
    "model max_tokens temperature top_p top_k min_p frequency_penalty presence_penalty repetition_penalty logit_bias "
    "seed stop stop_token_ids ignore_eos min_tokens include_stop_str_in_output skip_special_tokens "
    "spaces_between_special_tokens bad_words allowed_token_ids n best_of use_beam_search length_penalty logprobs "
    "prompt_logprobs return_token_ids return_tokens_as_token_ids stream stream_options response_format "
    "structured_outputs guided_json guided_regex guided_choice guided_grammar regex ebnf grammar json_schema echo "
    "add_special_tokens truncate_prompt_tokens priority request_id cache_salt user timeout logits_processors "
    "lora_request"
)
CHAT = (
    "messages max_completion_tokens top_logprobs tools tool_choice parallel_tool_calls functions function_call "
    "reasoning_effort thinking chat_template chat_template_kwargs add_generation_prompt continue_final_message "
    f"documents {_SAMPLING} metadata store service_tier safety_identifier prompt_cache_key prompt_cache_options "
    "prompt_cache_retention verbosity moderation prediction modalities audio web_search_options"
).split()
COMPLETIONS = f"prompt suffix {_SAMPLING}".split()


def status(name: str, fields: Mapping[str, object], refused: Mapping[str, object]) -> str:
    """What the endpoint with these fields does. Raises KeyError for a name it has never heard of."""
    if name in fields:
        return "honoured"
    if name in refused:
        return "refused"
    if name in IGNORED:
        return "ignored"
    raise KeyError(name)


def rows() -> list[tuple[str, str, str]]:
    """Name, status for chat, status for completions."""
    in_chat = {name: status(name, chat.ChatCompletionRequest.model_fields, chat.UNSUPPORTED) for name in CHAT}
    in_completions = {
        name: status(name, completion.CompletionRequest.model_fields, completion.UNSUPPORTED) for name in COMPLETIONS
    }
    names = dict.fromkeys([*CHAT, *COMPLETIONS])
    return [(f"`{name}`", in_chat.get(name, "-"), in_completions.get(name, "-")) for name in names]
