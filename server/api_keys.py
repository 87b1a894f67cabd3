"""API keys and what each may use. An entry is `KEY [limit=number ...]`, in the key file as elsewhere."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, fields
from pathlib import Path

_ENTRY = "a key must be printable ASCII without spaces, and behind it may come limit=number"


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """None: no limit of its own."""

    concurrent_requests: int | None = None
    """Answers that are open at once; `n` answers to one request are n."""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Of prompts and answers."""


LIMIT_NAMES = tuple(each.name for each in fields(KeyLimits))


@dataclass(frozen=True, slots=True)
class ApiKey:
    key: str = field(repr=False)
    limits: KeyLimits = KeyLimits()

    @property
    def digest(self) -> bytes:
        return key_digest(self.key)


def key_digest(key: str) -> bytes:
    """What stands for a key everywhere behind the door."""
    return hashlib.sha256(key.encode()).digest()


def parse_key(entry: str) -> ApiKey:
    """Raises ValueError, whose text does not repeat the entry."""
    key, *options = entry.split()
    check_key(key)
    limits: dict[str, int] = {}
    for option in options:
        name, _, number = option.partition("=")
        if name not in LIMIT_NAMES:
            raise ValueError(f"{_ENTRY}: {', '.join(LIMIT_NAMES)}")
        if name in limits or not number.isascii() or not number.isdecimal() or not 0 < int(number[:10]) < 2**31:
            raise ValueError(f"behind a key, {name} must stand once, with a positive number")
        limits[name] = int(number)
    return ApiKey(key, KeyLimits(**limits))


def check_key(key: str) -> None:
    """Raises ValueError for what cannot be sent as a key."""
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(_ENTRY)  # it travels in an HTTP header


def read_keys(file: Path) -> list[str]:
    """The entries of a key file. Raises ValueError."""
    try:
        lines = file.expanduser().read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not a text file") from None
    entries = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not entries:
        # An empty file would silently open the server to everybody.
        raise ValueError(f"{file} has no key in it")
    for entry in entries:
        parse_key(entry)
    return entries
