"""How people type: without capitals, without the mark at the end, with a greeting before the question."""

from __future__ import annotations

import re
from random import Random

_OPENINGS = ("Hi! ", "Hello, ", "Hello! ", "Hey, ", "Hi, ", "Ok. ", "Thanks. ", "And ", "So ", "Please: ")
_STARTS = {"What", "What's", "Which", "How", "Who", "Tell", "Is", "Does", "Do", "Give", "Name", "Can", "Where", "The"}
_MANNERS = {re.sub(r"\W", "", opening).casefold() for opening in _OPENINGS}
_MARKS = re.compile(r"[^\w+*/-]+")


def typed(rng: Random, text: str, lower: float = 0.15) -> str:
    """The question as somebody may type it; `lower`: the share in lower case."""
    draw = rng.random()
    if draw < 0.05:
        opening = rng.choice(_OPENINGS)
        if opening[-2] not in ".!" and text.split()[0] in _STARTS:
            text = text[0].lower() + text[1:]
        text = opening + text
    elif draw < 0.07:
        text = f"{text}?" if text[-1] == "?" else f"{text} please"
    if rng.random() < lower:
        text = text.lower()
        if rng.random() < 0.6:
            text = text.rstrip("?.!")
    elif rng.random() < 0.1:
        text = text.rstrip("?.!")
    return text


def essence(text: str) -> str:
    """What is left of a text without case and marks: two questions of one essence are the same question."""
    return _MARKS.sub(" ", text.casefold()).strip()


def without_manners(essence_of: str) -> str:
    """The essence of a question without what `typed` may have put around it."""
    first, _, rest = essence_of.partition(" ")
    return (rest if first in _MANNERS else essence_of).removesuffix(" please")


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


def enumeration(items: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)
