"""From the bytes of a request to a validated model: strict JSON, named refusals, nothing echoed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TypeVar

import msgspec
from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from server import limits
from server.errors import BadRequest, UnsupportedMediaType, UnsupportedParameter, invalid_fields
from server.schemas.sampling import IGNORED

Model = TypeVar("Model", bound=BaseModel)

Neutral = Mapping[str, Sequence[object]]
"""Field that is known and not built -> the values beside null that ask for nothing."""

FREE_FORM = frozenset(
    {"tools", "functions", "response_format", "structured_outputs", "chat_template_kwargs", "metadata"}
)
"""Fields that may hold any JSON: as objects in memory it is a hundred times larger than as text."""
_MAX_NEUTRAL_BYTES = 64
"""No neutral value is longer; a longer one is not even decoded."""
_STRING = re.compile(rb'"[^"]*+"')
_NO_BRACKETS = bytes(set(range(256)) - set(b'[]{}"'))
_MAX_HEADER_NAMES = 32
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


async def read_body(request: Request, model: type[Model], unsupported: Neutral) -> tuple[Model, list[str]]:
    """The validated body, and the names of the fields that nothing here reads; null counts as absent.

    Raises BadRequest for anything that is not strict JSON of the model's shape (NaN and Infinity are not JSON),
    UnsupportedParameter for a field of `unsupported` with a value that is not neutral, UnsupportedMediaType. Under
    `--strict` (`app.state.strict`) a field that is not known at all is a BadRequest too.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise UnsupportedMediaType("The body must be JSON: send 'Content-Type: application/json'.")
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise UnsupportedMediaType("The body must not be compressed: send it without Content-Encoding.")
    body = await request.body()
    return parse_body(body, model, unsupported, strict=request.app.state.strict)


def parse_body(
    body: bytes, model: type[Model], unsupported: Neutral, *, strict: bool = False
) -> tuple[Model, list[str]]:
    """`read_body` without the transport."""
    try:
        if not body.isascii():
            body.decode()  # what stays undecoded below is not looked at otherwise
        # Only the top level: the values stay undecoded bytes, so this costs no memory. pydantic alone would accept NaN
        # in fields it ignores and does not say which fields those are.
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError:
        raise BadRequest("The body must be a JSON object.") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise BadRequest("The body is not valid JSON.") from None
    _check_size(body, fields)
    for name in unsupported.keys() & fields.keys():
        if not _is_neutral(fields[name], unsupported[name]):
            raise UnsupportedParameter(f"'{name}' is not supported by this server with this value.", param=name)
    try:
        parsed = model.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[:1]
        if first[0]["type"] == "json_invalid":
            raise BadRequest("The body is not valid JSON.") from None
        raise invalid_fields(first) from None
    unread = [
        name
        for name, value in fields.items()
        if name not in model.model_fields and name not in unsupported and not _is_neutral(value, ())
    ]
    if strict and (unknown := [name for name in unread if name not in IGNORED]):
        param = unknown[0] if _NAME.fullmatch(unknown[0]) else None
        raise BadRequest("This field is not known to the server.", param=param, code="unknown_parameter")
    return parsed, unread


def _check_size(body: bytes, fields: Mapping[str, msgspec.Raw]) -> None:
    """Whether valid JSON stays small enough as objects in memory. Raises BadRequest."""
    for name in FREE_FORM & fields.keys():
        if memoryview(fields[name]).nbytes > (most := limits.FREE_FORM_BYTES.maximum):
            raise BadRequest(f"'{name}' may have {most} bytes at most, as JSON.", param=name)
    deepest = limits.MAX_JSON_DEPTH.maximum
    if _openings(body) <= deepest:
        return  # neither deep nor many, whatever is text of them
    # Sixteen megabytes take a tenth of a second: no escapes, then no text, then no strings but those with brackets.
    bare = body.replace(rb"\\", b"").replace(rb"\"", b"").translate(None, _NO_BRACKETS).replace(b'""', b"")
    most = limits.JSON_OBJECTS.maximum
    # Between two of these strings stands a bracket.
    if bare.count(b'"') > 4 * most + 2 or _openings(bare := _STRING.sub(b"", bare)) > most:
        raise BadRequest(f"The body may have {most} objects and lists at most.")
    if max(accumulate(1 if bracket in b"[{" else -1 for bracket in bare)) > deepest + 1:
        raise BadRequest(f"Each field of the body may have {deepest} nested levels at most.")


def _openings(text: bytes) -> int:
    return text.count(b"{") + text.count(b"[")


def ignored_header(names: list[str]) -> dict[str, str]:
    """`X-Ignored-Fields` for the answer: at most 32 names, of characters that are safe in a header."""
    shown = [name if _NAME.fullmatch(name) else "?" for name in names[:_MAX_HEADER_NAMES]]
    if len(names) > _MAX_HEADER_NAMES:
        shown.append("...")
    return {"X-Ignored-Fields": ", ".join(shown)} if shown else {}


def _is_neutral(raw: msgspec.Raw, neutral: Sequence[object]) -> bool:
    text = bytes(raw)
    if len(text) > _MAX_NEUTRAL_BYTES:
        return False
    try:
        value = msgspec.json.decode(text)
    except msgspec.DecodeError:
        raise BadRequest("The body is not valid JSON.") from None
    # The types too: in Python, 0 == False and 1 == True.
    return value is None or any(value == each and type(value) is type(each) for each in neutral)
