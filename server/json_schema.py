"""JSON schemas of requests: what can be enforced passes, everything else is a 400 that names the keyword.

The keywords' meanings are those of draft 2020-12 (`definitions` counts as `$defs`). llguidance enforces them; it also
ignores keywords it does not know, which is why this list stands here: no keyword may be silently without effect.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

from server.errors import BadRequest
from server.limits import ENUM_VALUES, REGEX_BYTES, REPEATS, SCHEMA_BYTES, SCHEMA_DEPTH, SCHEMA_PROPERTIES, Limit
from server.regex import inside_json, nested_repeats

TYPES = frozenset({"null", "boolean", "integer", "number", "string", "array", "object"})
FORMATS = frozenset({"date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid"})
ANNOTATIONS = frozenset(
    {
        "$comment",
        "$schema",
        "default",
        "deprecated",
        "description",
        "discriminator",
        "example",
        "examples",
        "readOnly",
        "title",
        "writeOnly",
    }
)
"""Without effect on what is valid; `x-...` likewise (`discriminator` only says which branch of a oneOf to look at)."""
SUBSCHEMA = ("items", "additionalProperties")
SUBSCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
SUBSCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions")
COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
KEYWORDS = frozenset(
    {*SUBSCHEMA, *SUBSCHEMA_LISTS, *SUBSCHEMA_MAPS, *COUNTS, *NUMBERS}
    | {"type", "enum", "const", "required", "pattern", "format", "$ref", "$id"}
)

GUIDANCE: dict[str, Any] = {
    # Between tokens of JSON one space, or a new line with its indentation: an endless run of white space matches
    # nothing, and what a model that pretty-prints would write still does.
    "whitespace_pattern": r" |\n {0,20}",
    # One spelling a character. With \u a key could be written twice: once as text and once as its escape.
    "json_allowed_escapes": '"\\bfnrt',
}
"""llguidance's options, sent inside the schema."""

_CONTROL_CHARACTER = re.compile(r"(?<!\\)(?:\\\\)*\\u00[01]|\x7f")
"""In a JSON text. Without \\u there is no way to write one, and llguidance would leave it out of a `const`."""
MAX_LENGTHS = {"hostname": 253, "email": 254}
"""Of formats, by RFC 1123 and RFC 5321."""
_CLOCK = ":[0-5][0-9]:[0-5][0-9]"
_YEAR = "(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_CALENDAR = (
    f"^(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP_YEAR}-02-29)"
)
FORMAT_PATTERNS = {"time": (_CLOCK,), "date": (_CALENDAR,), "date-time": (_CALENDAR, _CLOCK)}
"""What llguidance's formats do not say: RFC 3339 has second 60 only where a leap second was, February its days, and
readers know no year 0."""
MAX_PATTERNS = 4
"""Patterns that one string must match at once: their automata multiply."""


def schema_text(schema: object, param: str) -> str:
    """The schema as llguidance takes it, checked. Raises BadRequest with `param`."""
    return json.dumps({**_checked(schema, param), "x-guidance": GUIDANCE}, ensure_ascii=False)


def _checked(schema: object, param: str) -> dict[str, Any]:
    """A copy in which llguidance enforces every keyword as the standard says."""
    if not isinstance(schema, Mapping):
        raise BadRequest(f"'{param}' must be a JSON schema: an object.", param=param)
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        size = len(text.encode())
    except (ValueError, RecursionError):
        raise BadRequest(f"'{param}' is not valid JSON.", param=param) from None
    within(SCHEMA_BYTES, size, param)
    if _CONTROL_CHARACTER.search(text):
        raise BadRequest(f"'{param}' holds a control character other than \\b, \\f, \\n, \\r, \\t.", param=param)
    copy: dict[str, Any] = json.loads(text)
    _Check(param).run(copy)
    return copy


def within(limit: Limit, value: float, param: str, where: str = "") -> None:
    if value > limit.maximum:
        raise BadRequest(f"'{param}'{where}: at most {limit.maximum:,} {limit.unit} are allowed.", param=param)


def check_regex(regex: object, param: str, where: str = "") -> None:
    """A pattern's size and its bounded repeats, before anything compiles it."""
    if not isinstance(regex, str):
        raise BadRequest(f"'{param}'{where}: a regular expression must be a string.", param=param)
    try:
        within(REGEX_BYTES, len(regex.encode()), param, where)
    except UnicodeEncodeError:
        raise BadRequest(f"'{param}'{where}: the regular expression is not valid Unicode.", param=param) from None
    if (repeats := nested_repeats(regex)) > REPEATS.maximum:
        what = f"repeats up to {repeats:,} times" if repeats < 10**9 else "repeats too often"
        raise BadRequest(
            f"'{param}'{where}: the regular expression {what}; at most {REPEATS.maximum:,} are allowed, nested "
            "repeats multiplied.",
            param=param,
        )


class _Check:
    """One walk over a schema."""

    def __init__(self, param: str) -> None:
        self._param = param
        self._properties = 0
        self._enum_values = 0

    def run(self, schema: dict[str, Any]) -> None:
        # A stack of our own: the schema's depth is not yet known.
        pending: list[tuple[object, str, int]] = [(schema, "", 0)]
        schemas: list[tuple[dict[str, Any], str]] = []
        while pending:
            value, path, depth = pending.pop()
            within(SCHEMA_DEPTH, depth, self._param)
            if isinstance(value, bool):
                continue
            if not isinstance(value, dict):
                self._refuse(path, "must be a schema")
                continue
            self._keywords(value, path)
            schemas.append((value, path))
            pending.extend(
                (subschema, f"{path}/{name}", depth + 1) for name, subschema in self._subschemas(value, path)
            )
        for schema, path in schemas:
            self._amend(schema, path)

    def _amend(self, schema: dict[str, Any], path: str) -> None:
        """Say what llguidance would not enforce by itself."""
        try:
            if "pattern" in schema:
                schema["pattern"] = inside_json(schema["pattern"])
            if "patternProperties" in schema:
                schema["patternProperties"] = {
                    inside_json(key): value for key, value in schema["patternProperties"].items()
                }
        except ValueError as error:
            self._refuse(path, f"has a regular expression that cannot be enforced: it {error}")
        if (longest := MAX_LENGTHS.get(schema.get("format", ""))) is not None:
            schema["maxLength"] = min(longest, schema.get("maxLength", longest))
        if (patterns := FORMAT_PATTERNS.get(schema.get("format", ""))) is not None:
            schema["allOf"] = [*schema.get("allOf", ()), *({"pattern": pattern} for pattern in patterns)]

    def _refuse(self, path: str, problem: str) -> None:
        raise BadRequest(f"'{self._param}': the schema at '#{path[:200]}' {problem}.", param=self._param)

    def _require(self, condition: bool, path: str, problem: str) -> None:
        if not condition:
            self._refuse(path, problem)

    def _subschemas(self, schema: Mapping[str, Any], path: str) -> list[tuple[str, object]]:
        found: list[tuple[str, object]] = [(name, schema[name]) for name in SUBSCHEMA if name in schema]
        for name in SUBSCHEMA_LISTS:
            if name in schema:
                value = schema[name]
                self._require(isinstance(value, list) and bool(value), path, f"needs a list of schemas as '{name}'")
                found += [(f"{name}/{index}", item) for index, item in enumerate(value)]
        for name in SUBSCHEMA_MAPS:
            if name in schema:
                self._require(isinstance(schema[name], Mapping), path, f"needs an object as '{name}'")
                found += [(f"{name}/{key[:64]}", item) for key, item in schema[name].items()]
        return found

    def _keywords(self, schema: Mapping[str, Any], path: str) -> None:
        for name, value in schema.items():
            if name in ANNOTATIONS or (name.startswith("x-") and name != "x-guidance"):
                continue
            self._require(name in KEYWORDS, path, f"has the keyword '{name[:64]}', which is not supported")
            if name in COUNTS:
                self._require(_is_integer(value) and value >= 0, path, f"needs a non-negative integer as '{name}'")
                within(REPEATS, value, self._param, f" '{name}' at '#{path[:200]}'")
            elif name in NUMBERS:
                self._require(_is_number(value), path, f"needs a number as '{name}'")
            elif (rule := _RULES.get(name)) is not None:
                self._require(rule[0](value), path, rule[1])
        if "multipleOf" in schema:
            self._multiple_of(schema["multipleOf"], path)
        if "pattern" in schema:
            check_regex(schema["pattern"], self._param, f" 'pattern' at '#{path[:200]}'")
        if isinstance(schema.get("patternProperties"), Mapping):
            for regex in schema["patternProperties"]:
                check_regex(regex, self._param, f" 'patternProperties' at '#{path[:200]}'")
        branches = schema.get("allOf")
        if isinstance(branches, list):
            patterns = sum("pattern" in branch for branch in (schema, *branches) if isinstance(branch, Mapping))
            self._require(patterns <= MAX_PATTERNS, path, f"combines more than {MAX_PATTERNS} patterns with 'allOf'")
        self._require(path == "" or "$id" not in schema, path, "has an '$id'; only the whole schema may")
        self._properties += sum(
            len(schema[name]) for name in SUBSCHEMA_MAPS[:2] if isinstance(schema.get(name), Mapping)
        )
        within(SCHEMA_PROPERTIES, self._properties, self._param)
        self._enum_values += len(schema.get("enum", ()))
        within(ENUM_VALUES, self._enum_values, self._param)
        # Further properties may have equal names, of which a reader keeps one.
        required = len(set(schema.get("required", ())))
        self._require(
            schema.get("minProperties", 0) <= required + 1,
            path,
            "has a 'minProperties' of more than one above the number of required properties, which is not supported",
        )

    def _multiple_of(self, value: int | float, path: str) -> None:
        self._require(value > 0, path, "needs a positive 'multipleOf'")
        # The automaton that counts remainders has as many states as the number without its decimal point says.
        digits = Decimal(str(value)).as_tuple()
        exponent = int(digits.exponent)
        unscaled = int("".join(map(str, digits.digits))) * 10 ** max(exponent, 0) if exponent < 300 else 10**300
        self._require(unscaled <= REPEATS.maximum and exponent >= -12, path, "has a 'multipleOf' of too many digits")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_type(value: object) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(item, str) and item in TYPES for item in value)
    return isinstance(value, str) and value in TYPES


def _is_strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


_RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "type": (_is_type, f"has an unknown 'type'; there are {', '.join(sorted(TYPES))}"),
    "enum": (lambda value: isinstance(value, list) and bool(value), "needs a list of values as 'enum'"),
    "required": (_is_strings, "needs a list of names as 'required'"),
    "format": (
        lambda value: isinstance(value, str) and value in FORMATS,
        f"has a 'format' that is not supported; these are: {', '.join(sorted(FORMATS))}",
    ),
    "$ref": (
        lambda value: isinstance(value, str) and (value == "#" or value.startswith("#/")),
        "has a '$ref' that does not begin with '#/': only references into the same schema are followed",
    ),
    "$id": (lambda value: isinstance(value, str), "needs a string as '$id'"),
}
