"""The hand-written tables in `tables/`: general knowledge in our own words, under the project's licence."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

_FOLDER = Path(__file__).parent / "tables"
_WITH_ARTICLE = {"United Kingdom", "Netherlands", "Czech Republic", "Philippines", "United States"}


class Country(NamedTuple):
    """`name`: with its article, as inside a sentence."""

    name: str
    capital: str
    continent: str


class Element(NamedTuple):
    name: str
    symbol: str
    number: str


class Intent(NamedTuple):
    """Small talk: every wording of `asked` gets `answer`; those of `held_out` are only for tests of `row`."""

    row: str
    answer: str
    asked: list[str]
    held_out: list[str]


@functools.cache
def countries() -> list[Country]:
    rows = _rows("capitals.tsv")
    return [Country("the " * (name in _WITH_ARTICLE) + name, *rest) for name, *rest in rows]


@functools.cache
def elements() -> list[Element]:
    return [Element(*row) for row in _rows("elements.tsv")]


@functools.cache
def intents() -> list[Intent]:
    return [Intent(**entry) for entry in _json("chat.json")]


@functools.cache
def words() -> list[str]:
    """Common words, each of which is one token: what lists, copies and codes are made of."""
    texts: list[str] = _json("words.json")
    return texts


@functools.cache
def names() -> list[str]:
    """First names."""
    texts: list[str] = _json("names.json")
    return texts


@functools.cache
def cities() -> list[str]:
    """Capitals of one word."""
    return sorted({country.capital for country in countries() if " " not in country.capital})


@functools.cache
def mapping(name: str) -> dict[str, str]:
    """`facts` (question to answer), `definitions`, `colours` or `legs`."""
    texts: dict[str, str] = _json(f"{name}.json")
    return texts


@functools.cache
def pairs(name: str) -> list[tuple[str, str]]:
    """`opposites`, `plurals` or `past_tense`."""
    return [(left, right) for left, right in _json(f"{name}.json")]


@functools.cache
def animals() -> dict[str, dict[str, str]]:
    """Animal to `sound` (a verb, third person) and `young`."""
    entries: dict[str, dict[str, str]] = _json("animals.json")
    return entries


@functools.cache
def kinds() -> dict[str, list[str]]:
    """Plural of a kind to its best known members, in the order in which they are named."""
    members: dict[str, list[str]] = _json("lists.json")
    return members


def _json(name: str) -> Any:
    return json.loads((_FOLDER / name).read_text(encoding="utf-8"))


def _rows(name: str) -> list[list[str]]:
    """Of a table with a heading, tabs between the fields."""
    return [line.split("\t") for line in (_FOLDER / name).read_text(encoding="utf-8").splitlines()[1:]]
