"""Regular expressions of requests, before anything compiles them: what they cost, and what would be enforced wrongly.

The syntax is that of Rust's regex crate, without look-around; `\\d`, `\\w` and `\\s` are ASCII.
"""

from __future__ import annotations

import re

_ATOM = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{(\d+)(?:,(\d*))?\}|.", re.DOTALL)
_CLASS = re.compile(r"(\\.)|\[(\^?)(\]?(?:\\.|[^\]\\])*)\]", re.DOTALL)
_FROM_CONTROL = re.compile(r"(?:[\x00-\n]|\\(?:x0|u000|x\{0|[0abtn]))[^-]{0,6}-.")


def nested_repeats(regex: str) -> int:
    """The largest product of bounded repeats inside one another: 6 for `(a{3}b){2}`. Unbounded ones do not count."""
    groups = [1]  # of each open group, the largest product so far
    last = 1  # of what a repeat would apply to
    for match in _ATOM.finditer(regex):
        token = match[0]
        if match[1] is not None:
            last *= max(int(match[1]), int(match[2] or 0), 1)
        elif token == "(":
            groups.append(1)
            last = 1
        elif token == ")" and len(groups) > 1:
            last = groups.pop()
        elif token not in "?*+":
            last = 1
        groups[-1] = max(groups[-1], last)
    return max(groups)


def inside_json(pattern: str) -> str:
    """A pattern of a JSON schema, so that llguidance enforces no less than it says. Raises ValueError if it cannot.

    In JSON a string's `"` and `\\` stand as escapes. A character class that has most of what lies below the space,
    written as escapes, too, lets llguidance (1.9) pass both, whether they are in it or not. So a negated class is made
    to exclude these control characters, and other ways to write such a class are refused.
    """

    def rewrite(match: re.Match[str]) -> str:
        if match[1] is not None:
            if match[1] == "\\P":
                raise ValueError("has \\P; use [^\\p{...}] instead")
            return match[0]
        body = match[3]
        plain = re.sub(r"\\.", "", body, flags=re.DOTALL)
        if "[" in plain or "--" in plain or "&&" in plain or "~~" in plain or "\\P" in body:
            raise ValueError("has a character class inside another, or set operations or \\P in one")
        if match[2]:
            parts = re.findall(r"\\.|.", body, re.DOTALL)
            if parts and parts[-1] == "-":
                parts[-1] = "\\-"  # or it would become a range
            return f"[^{''.join(parts)}\\x00-\\x1f]"
        if _FROM_CONTROL.search(body):
            raise ValueError("has a character class with a range that begins at a control character")
        return match[0]

    return _CLASS.sub(rewrite, pattern)
