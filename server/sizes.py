"""Memory sizes as people write them: `4GiB`, `512MB`, `1073741824`."""

from __future__ import annotations

import re

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", start=1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", start=1)},
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_size(text: str) -> int:
    """Bytes of a number with a unit: KiB, MiB, GiB, TiB are powers of 1024, KB, MB, GB, TB of 1000; none is bytes.

    Raises ValueError for anything else; a bare `4G` is refused because it means either.
    """
    match = _SIZE.fullmatch(text)
    unit = next((known for known in _UNITS if match and known.lower() == match[2].lower()), None)
    if match is None or unit is None:
        raise ValueError(f"{text!r} is not a size; write for example 4GiB, 512MB or a number of bytes")
    return int(float(match[1]) * _UNITS[unit]) if "." in match[1] else int(match[1]) * _UNITS[unit]


def format_size(count: int) -> str:
    """`1.5 GiB`: the largest binary unit that leaves at least 1."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def format_count(count: int) -> str:
    """`15.7 B`: thousands, millions and billions as the field writes parameter counts."""
    for unit, scale in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return str(count)
