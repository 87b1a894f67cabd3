"""The project's own suite of JSON schemas: `tests/schemas/*.jsonl`, one `{"name", "schema"}` a line."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

FOLDER = Path(__file__).parent / "schemas"


@cache
def suite() -> dict[str, Any]:
    """Schemas by name."""
    lines = [json.loads(line) for path in sorted(FOLDER.glob("*.jsonl")) for line in path.read_text().splitlines()]
    schemas = {line["name"]: line["schema"] for line in lines}
    assert len(schemas) == len(lines), "names are unique"
    return schemas


def validate(schema: Any, text: str) -> None:
    """Raises where `text` is not JSON, or not what the schema allows, formats included."""
    checker = Draft202012Validator.FORMAT_CHECKER
    # Without their packages jsonschema would pass every text.
    assert {"date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid"} <= set(
        checker.checkers
    )
    Draft202012Validator(schema, format_checker=checker).validate(json.loads(text))
