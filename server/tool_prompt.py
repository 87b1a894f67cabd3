"""Tools, calls and results in prompts, where the checkpoint's own template has no or a broken place for them.

DeepSeek's published templates know no `tools`, and those of V3 and R1 lose marks in all but the first round of calls.
So conversations with tools are rendered by the templates below: without tools they give the same text as the
published ones. A model without any tool syntax gets tools, calls and results as text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from server.tool_syntax import JSON_CALLS, ToolSyntax

Messages = Sequence[Mapping[str, Any]]

_SYSTEM = """\
{{- bos_token -}}
{%- set system = messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join('\\n\\n') -%}
{%- set turns = messages | rejectattr('role', 'equalto', 'system') | list -%}
"""
# The tools' text of DeepSeek-V2.5's model card; V3 and R1 were trained on the same.
_V3 = (
    _SYSTEM
    + """\
{%- if tools -%}
{{- (system or 'You are a helpful Assistant.') + '\\n\\n## Tools\\n\\n### Function\\n\\n' -}}
{{- 'You have the following functions available:\\n' -}}
{%- for tool in tools -%}
{{- '\\n- `' + tool['function']['name'] + '`:\\n```json\\n' + tool['function'] | tojson(indent=4) + '\\n```' -}}
{%- endfor -%}
{%- else -%}
{{- system -}}
{%- endif -%}
{%- for message in turns -%}
{%- set after_results = loop.previtem is defined and loop.previtem['role'] == 'tool' -%}
{%- if message['role'] == 'user' -%}
{{- '<｜User｜>' + message['content'] -}}
{%- elif message['role'] == 'assistant' -%}
{{- '' if after_results else '<｜Assistant｜>' -}}
{{- (message['content'] or '').split('</think>')[-1] if drop_thoughts else message['content'] or '' -}}
{%- if message['tool_calls'] -%}
{{- '<｜tool▁calls▁begin｜>' -}}
{%- for call in message['tool_calls'] -%}
{{- '' if loop.first else '\\n' -}}
{{- '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + call['function']['name'] + '\\n```json\\n' -}}
{{- call['function']['arguments'] + '\\n```<｜tool▁call▁end｜>' -}}
{%- endfor -%}
{{- '<｜tool▁calls▁end｜>' -}}
{%- endif -%}
{{- eos_token -}}
{%- elif message['role'] == 'tool' -%}
{{- '\\n' if after_results else '<｜tool▁outputs▁begin｜>' -}}
{{- '<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>' -}}
{{- '<｜tool▁outputs▁end｜>' if loop.nextitem is not defined or loop.nextitem['role'] != 'tool' else '' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and (not turns or turns[-1]['role'] != 'tool') -%}
{{- '<｜Assistant｜>' + opening -}}
{%- endif -%}
"""
)
# The tools' text of DeepSeek-V3.1's model card.
_V31 = (
    _SYSTEM
    + """\
{{- system -}}
{%- if tools -%}
{{- ('\\n\\n' if system else '') + '## Tools\\nYou have access to the following tools:\\n' -}}
{%- for tool in tools -%}
{{- '\\n### ' + tool['function']['name'] + '\\nDescription: ' + (tool['function']['description'] or '') -}}
{{- '\\n\\nParameters: ' + (tool['function']['parameters'] or {}) | tojson + '\\n' -}}
{%- endfor -%}
{{- '\\nIMPORTANT: ALWAYS adhere to this exact format for tool use:\\n' -}}
{{- '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>tool_call_name<｜tool▁sep｜>tool_call_arguments<｜tool▁call▁end｜>' -}}
{{- '{additional_tool_calls}<｜tool▁calls▁end｜>\\n\\nWhere:\\n' -}}
{{- '- `tool_call_name` must be an exact match to one of the available tools\\n' -}}
{{- '- `tool_call_arguments` must be valid JSON that strictly follows the tool\\'s Parameters Schema\\n' -}}
{{- '- For multiple tool calls, chain them directly without separators or spaces' -}}
{%- endif -%}
{%- for message in turns -%}
{%- if message['role'] == 'user' -%}
{{- '<｜User｜>' + message['content'] -}}
{%- elif message['role'] == 'assistant' -%}
{%- if loop.previtem is defined and loop.previtem['role'] == 'user' -%}
{{- '<｜Assistant｜>' + ('<think>' if message['prefix'] and thinking else '</think>') -}}
{%- endif -%}
{{- (message['content'] or '').split('</think>', 1)[-1] -}}
{%- if message['tool_calls'] -%}
{{- '<｜tool▁calls▁begin｜>' -}}
{%- for call in message['tool_calls'] -%}
{{- '<｜tool▁call▁begin｜>' + call['function']['name'] + '<｜tool▁sep｜>' -}}
{{- call['function']['arguments'] + '<｜tool▁call▁end｜>' -}}
{%- endfor -%}
{{- '<｜tool▁calls▁end｜>' -}}
{%- endif -%}
{{- eos_token -}}
{%- elif message['role'] == 'tool' -%}
{{- '<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and turns and turns[-1]['role'] == 'user' -%}
{{- '<｜Assistant｜>' + ('<think>' if thinking else '</think>') -}}
{%- endif -%}
"""
)

_AS_TEXT = """\
# Tools

You can call functions. Each line is one of them, with the JSON schema of its arguments:

{tools}

To call one, answer with nothing but a JSON object, and to call several, with one such object a line:

{{"name": "the function's name", "arguments": {{...}}}}"""


def native_template(syntax: ToolSyntax, opening: str, drop_thoughts: bool) -> str | None:
    """Jinja source for conversations with tools, or None where the syntax is not DeepSeek's.

    `opening`: what the published template writes behind the assistant's mark to begin an answer, e.g. R1's `<think>`.
    `drop_thoughts`: earlier answers are rendered without what stands before `</think>`.
    """
    match syntax.name:
        case "deepseek-v3":
            settings = f"{{%- set opening = {json.dumps(opening, ensure_ascii=False)} -%}}\n"
            return f"{settings}{{%- set drop_thoughts = {str(drop_thoughts).lower()} -%}}\n{_V3}"
        case "deepseek-v3.1":
            return _V31
    return None


def results_in_order(messages: Messages) -> list[Mapping[str, Any]]:
    """The results of one round in the order of its calls, by id: templates that write no ids rely on it."""
    ordered: list[Mapping[str, Any]] = []
    order: dict[object, int] = {}
    results: list[Mapping[str, Any]] = []
    for message in [*messages, None]:
        if message is not None and message["role"] == "tool":
            results.append(message)
            continue
        if all(result.get("tool_call_id") in order for result in results):
            results.sort(key=lambda result: order[result.get("tool_call_id")])
        ordered += results
        results = []
        if message is not None:
            ordered.append(message)
            order = {call.get("id"): index for index, call in enumerate(message.get("tool_calls") or ())}
    return ordered


def as_text(messages: Messages, tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Tools in the system message, calls in the assistant's content, results as the user's messages."""
    plain: list[dict[str, Any]] = []
    names: dict[object, str] = {}
    for message in messages:
        match message["role"]:
            case "tool":
                name = names.get(message.get("tool_call_id"), "the function")
                result = f"Result of {name}:\n{message['content']}"
                if plain and plain[-1].pop("results", False):
                    plain[-1] |= {"content": f"{plain[-1]['content']}\n\n{result}", "results": True}
                else:
                    plain.append({"role": "user", "content": result, "results": True})
            case "assistant" if calls := message.get("tool_calls"):
                names |= {call.get("id"): call["function"]["name"] for call in calls}
                lines = [message["content"]] if message.get("content") else []
                lines += [
                    f"{JSON_CALLS.before_name}{call['function']['name']}{JSON_CALLS.after_name}"
                    f"{call['function']['arguments']}{JSON_CALLS.after_arguments}"
                    for call in calls
                ]
                plain.append({"role": "assistant", "content": "\n".join(lines)})
            case _:
                plain.append(dict(message))
    for message in plain:
        message.pop("results", None)
    if tools:
        listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        text = _AS_TEXT.format(tools=listed)
        if plain and plain[0]["role"] == "system":
            plain[0]["content"] = f"{plain[0]['content']}\n\n{text}"
        else:
            plain.insert(0, {"role": "system", "content": text})
    return plain


def template_variables(
    reasoning_effort: str | None, thinking: str | None, kwargs: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The request's switches as template variables: `thinking` is DeepSeek's name, `enable_thinking` that of others.

    `thinking`: the `type` of DeepSeek's field, `enabled` or `disabled`. The template's own variables win.
    """
    variables: dict[str, Any] = {}
    if reasoning_effort is not None and reasoning_effort != "none":
        variables["reasoning_effort"] = reasoning_effort
    if reasoning_effort is not None or thinking in ("enabled", "disabled"):
        on = thinking == "enabled" if thinking in ("enabled", "disabled") else reasoning_effort != "none"
        variables |= {"thinking": on, "enable_thinking": on}
    kwargs = dict(kwargs or {})
    switch = kwargs.get("enable_thinking", kwargs.get("thinking"))
    if isinstance(switch, bool):
        variables |= {"thinking": switch, "enable_thinking": switch}
    return variables | kwargs
