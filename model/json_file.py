"""JSON files of a checkpoint: read with bounds, and looked at through typed, ranged access. No torch here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

REQUIRED: Any = object()
"""Default of a field whose absence is an error."""
_MAX_JSON_BYTES = 16 << 20
"""The index of a 1T model is 8 MB; a config is a few KB."""


class CheckpointError(ValueError):
    """A checkpoint cannot be served; the message is one line naming the file and the field or tensor."""


class Fields:
    """Typed and ranged access to one JSON object; every refusal names the file and the field.

    A null counts as absent. A default of `REQUIRED` makes absence an error.
    """

    def __init__(self, file: Path, values: dict[str, Any], parent: str = "") -> None:
        self.file = file
        self.values = values
        self._parent = parent

    def fail(self, name: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: {self._parent}{name}: {problem}")

    def integer(self, name: str, low: int, high: int, default: Any = REQUIRED) -> Any:
        value = self._get(name, default)
        if value is default:
            return default
        if type(value) is not int:
            raise self.fail(name, f"must be an integer, not {shown(value)}")
        return self._in_range(name, value, low, high)

    def number(self, name: str, low: float, high: float, default: Any = REQUIRED) -> Any:
        value = self._get(name, default)
        if value is default:
            return default
        if type(value) not in (int, float):
            raise self.fail(name, f"must be a number, not {shown(value)}")
        return float(self._in_range(name, value, low, high))

    def flag(self, name: str, default: Any = REQUIRED) -> Any:
        value = self._get(name, default)
        if value is not default and type(value) is not bool:
            raise self.fail(name, f"must be true or false, not {shown(value)}")
        return value

    def text(self, name: str, default: Any = REQUIRED) -> Any:
        value = self._get(name, default)
        if value is not default and type(value) is not str:
            raise self.fail(name, f"must be a string, not {shown(value)}")
        return value

    def token_ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        value = self._get(name, None)
        ids = [] if value is None else value if type(value) is list else [value]
        for token_id in ids:
            if type(token_id) is not int:
                raise self.fail(name, f"must be token ids, not {shown(value)}")
            self._in_range(name, token_id, 0, vocab_size - 1)
        return tuple(ids)

    def first_of(self, *names: str) -> str:
        """The first of several spellings that is present, else the first."""
        return next((name for name in names if self.values.get(name) is not None), names[0])

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is not None:
            return value
        if default is REQUIRED:
            raise self.fail(name, "is missing" if name not in self.values else "must not be null")
        return default

    def _in_range(self, name: str, value: Any, low: float, high: float) -> Any:
        if not low <= value <= high:
            raise self.fail(name, f"must be between {low} and {high}, not {shown(value)}")
        return value


def read_json_object(file: Path) -> dict[str, Any]:
    """One JSON object from a file of a checkpoint; CheckpointError for anything else."""
    try:
        if file.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{file}: larger than {_MAX_JSON_BYTES >> 20} MiB, not a JSON file of a checkpoint")
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file") from None
    except UnicodeDecodeError:
        raise CheckpointError(f"{file}: not UTF-8 text") from None
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from None
    if text.startswith("version https://git-lfs"):
        raise CheckpointError(f"{file}: a Git-LFS pointer, not the file itself (run `git lfs pull`)")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: must be a JSON object")
    return value


def shown(value: object) -> str:
    """A value of the file for a one-line message, cut short."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
