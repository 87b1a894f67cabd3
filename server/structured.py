"""`response_format` and `structured_outputs`: the grammar that an answer must follow.

Everything that cannot be enforced is a 400; nothing is ever silently unconstrained. What stands here takes
microseconds; `server/grammar_check.py` then compiles the grammar.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from scheduler.messages import Grammar
from server.errors import BadRequest, UnsupportedParameter
from server.json_schema import check_regex, schema_text, within
from server.limits import CHOICES, GRAMMAR_BYTES, REPEATS
from server.schemas.sampling import SamplingFields

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
CONSTRAINTS = ("json", "json_object", "regex", "choice", "grammar")


def response_grammar(
    response_format: Mapping[str, Any] | None, structured_outputs: Mapping[str, Any] | None
) -> Grammar | None:
    """None where the answer is free. Raises BadRequest, whose `param` names the field."""
    by_format = None if response_format is None else _of_response_format(response_format)
    by_constraint = None if structured_outputs is None else _of_structured_outputs(structured_outputs)
    if by_format is not None and by_constraint is not None:
        param = "structured_outputs"
        raise BadRequest("'response_format' and 'structured_outputs' cannot both constrain the answer.", param=param)
    return by_format or by_constraint


def grammar_param(fields: SamplingFields) -> str:
    """The field that an error about the grammar as a whole names."""
    if fields.structured_outputs is not None:
        return "structured_outputs"
    if fields.response_format is not None and fields.response_format.get("type") != "text":
        return "response_format"
    return "tools"


def json_grammar(schema: object, param: str) -> Grammar:
    """The grammar of JSON texts that the schema allows."""
    return Grammar(kind="json_schema", text=schema_text(schema, param))


def _of_response_format(value: Mapping[str, Any]) -> Grammar | None:
    param = "response_format"
    match value.get("type"):
        case "text":
            _only(value, ("type",), param)
            return None
        case "json_object":
            _only(value, ("type", "schema"), param)
            schema = value.get("schema")
            return json_grammar(ANY_OBJECT if schema is None else schema, f"{param}.schema")
        case "json_schema":
            _only(value, ("type", "json_schema"), param)
            inner = value.get("json_schema")
            param = f"{param}.json_schema"
            if not isinstance(inner, Mapping):
                raise BadRequest(f"'{param}' must be an object with 'name' and 'schema'.", param=param)
            _only(inner, ("name", "description", "schema", "strict"), param)
            if inner.get("schema") is None:
                raise BadRequest(f"'{param}.schema' is missing.", param=f"{param}.schema")
            if not isinstance(inner.get("strict"), bool | None):
                raise BadRequest(f"'{param}.strict' must be true or false.", param=f"{param}.strict")
            return json_grammar(inner["schema"], f"{param}.schema")
        case str():
            raise UnsupportedParameter(
                "'response_format.type' must be 'text', 'json_object' or 'json_schema'.", param=f"{param}.type"
            )
    raise BadRequest("'response_format' needs a 'type'.", param=f"{param}.type")


def _of_structured_outputs(value: Mapping[str, Any]) -> Grammar | None:
    _only(value, CONSTRAINTS, "structured_outputs")
    given = [name for name in CONSTRAINTS if value.get(name) not in (None, False)]
    if len(given) != 1:
        raise BadRequest(
            f"'structured_outputs' needs exactly one of {', '.join(CONSTRAINTS)}.", param="structured_outputs"
        )
    [name] = given
    constraint, param = value[name], f"structured_outputs.{name}"
    match name:
        case "json":
            return json_grammar(_parsed(constraint, param) if isinstance(constraint, str) else constraint, param)
        case "json_object":
            if constraint is not True:
                raise BadRequest(f"'{param}' must be true or false.", param=param)
            return json_grammar(ANY_OBJECT, param)
        case "regex":
            check_regex(constraint, param)
            return Grammar(kind="regex", text=constraint)
        case "choice":
            return _choice(constraint, param)
    return _lark(constraint, param)


def _only(value: Mapping[str, Any], names: tuple[str, ...], param: str) -> None:
    for name in value:
        if name not in names and value[name] is not None:
            raise UnsupportedParameter(
                f"'{param}' has a field that is not supported; there are {', '.join(names)}.",
                param=f"{param}.{name[:64]}",
            )


def _parsed(text: str, param: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadRequest(f"'{param}' is a string that is not JSON.", param=param) from None


def _choice(choices: object, param: str) -> Grammar:
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c for c in choices):
        raise BadRequest(f"'{param}' must be a list of texts that are not empty.", param=param)
    within(CHOICES, len(choices), param)
    # JSON's way to write a string is Lark's, too.
    text = "start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
    return Grammar(kind="lark", text=_sized(text, param))


def _lark(grammar: object, param: str) -> Grammar:
    if not isinstance(grammar, str) or not grammar.strip():
        raise BadRequest(f"'{param}' must be a grammar in llguidance's Lark syntax.", param=param)
    _sized(grammar, param)
    if re.search(r"%(json|llguidance)\b", grammar):
        raise BadRequest(
            f"'{param}' cannot hold %json or %llguidance; 'structured_outputs.json' takes a schema.", param=param
        )
    counts = (
        int(count) for repeat in re.findall(r"\{([\d\s,]{1,64})\}", grammar) for count in re.findall(r"\d+", repeat)
    )
    if max(counts, default=0) > REPEATS.maximum:
        raise BadRequest(f"'{param}': a repeat is of at most {REPEATS.maximum:,}.", param=param)
    return Grammar(kind="lark", text=grammar)


def _sized(text: str, param: str) -> str:
    try:
        within(GRAMMAR_BYTES, len(text.encode()), param)
    except UnicodeEncodeError:
        raise BadRequest(f"'{param}' is not valid Unicode.", param=param) from None
    return text
