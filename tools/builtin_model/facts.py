"""Questions whose answers are in the weights: elements, words, days, definitions and common facts.

A `Kind` is a table with its wordings. An answer repeats the question's words before the value, so that the value is
predicted from the thing that was asked. The wordings in `held_out` are never trained: the tests ask them.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from tools.builtin_model import tables
from tools.builtin_model.documents import Document, dialogue
from tools.builtin_model.wording import capitalised, typed, with_article

_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)


@dataclass(frozen=True)
class Kind:
    """`asked`, `held_out` and `answer` are format strings over the fields of each of `values`."""

    asked: Sequence[str]
    held_out: Sequence[str]
    answer: str
    values: Sequence[Mapping[str, str]]
    lower: float = 0.15

    def document(self, rng: Random) -> Document:
        value = rng.choice(self.values)
        question = rng.choice(self.asked).format_map(value)
        return dialogue(typed(rng, capitalised(question), self.lower), capitalised(self.answer.format_map(value)))


@functools.cache
def element_kinds() -> list[Kind]:
    values = [element._asdict() for element in tables.elements()]
    return [
        Kind(
            (
                "What is the chemical symbol of {name}?",
                "What is the symbol of {name}?",
                "What is the chemical symbol for {name}?",
                "What's the symbol for {name}?",
                "symbol of {name}?",
                "chemical symbol of {name}",
                "Tell me the chemical symbol of {name}.",
                "Which symbol does {name} have?",
                "Do you know the symbol of {name}?",
                "What symbol stands for {name}?",
                "Give me the symbol of {name}.",
                "What is the chemical symbol of the element {name}?",
                "Which symbol does the element {name} have?",
                "symbol for the element {name}",
                "Can you tell me the symbol of {name}?",
            ),
            ("Please tell me the symbol of {name}.", "What is the symbol for the element {name}?"),
            "The chemical symbol of {name} is {symbol}.",
            values,
        ),
        Kind(
            (
                "What is the atomic number of {name}?",
                "What's the atomic number of {name}?",
                "atomic number of {name}?",
                "Tell me the atomic number of {name}.",
                "Which atomic number does {name} have?",
                "What number does {name} have in the periodic table?",
            ),
            ("Please tell me the atomic number of {name}.",),
            "The atomic number of {name} is {number}.",
            values,
        ),
        Kind(
            (
                "Which element has the symbol {symbol}?",
                "What element has the symbol {symbol}?",
                "What does the symbol {symbol} stand for?",
                "Which element is {symbol}?",
                "What is the element {symbol}?",
                "Name the element with the symbol {symbol}.",
                "{symbol} stands for which element?",
                "The symbol {symbol} is which element?",
                "The symbol {symbol} belongs to which element?",
            ),
            ("The symbol {symbol} stands for which element?",),
            "{symbol} is the symbol of {name}.",
            values,
            lower=0.0,
        ),
    ]


@functools.cache
def opposite_kind() -> Kind:
    opposites: dict[str, str] = {}
    for left, right in tables.pairs("opposites"):
        opposites.setdefault(left, right)
        opposites.setdefault(right, left)
    return Kind(
        (
            "What is the opposite of {word}?",
            "What is the opposite of {word}?",
            "What's the opposite of {word}?",
            "opposite of {word}?",
            "opposite of {word}",
            "the opposite of {word}?",
            "Tell me the opposite of {word}.",
            "Give me the opposite of {word}.",
            "Which word is the opposite of {word}?",
            "Name the opposite of {word}.",
            "What is the opposite word of {word}?",
            "Do you know the opposite of {word}?",
            "The opposite of {word} is?",
        ),
        ("Can you tell me the opposite of {word}?", "Please name the opposite of {word}."),
        "The opposite of {word} is {other}.",
        [{"word": word, "other": other} for word, other in opposites.items()],
    )


@functools.cache
def day_kinds() -> list[Kind]:
    """The day or month after and before one."""
    kinds = []
    for unit, cycle in (("day", _DAYS), ("month", _MONTHS)):
        following = [{"it": it, "next": then} for it, then in itertools.pairwise((*cycle, cycle[0]))]
        before = [{"it": pair["next"], "next": pair["it"]} for pair in following]
        for word, verb, values in (("after", "follows", following), ("before", "precedes", before)):
            asked = (
                f"What {unit} comes {word} {{it}}?",
                f"Which {unit} comes {word} {{it}}?",
                f"What is the {unit} {word} {{it}}?",
                f"{unit} {word} {{it}}?",
                f"What comes {word} {{it}}?",
                f"Which {unit} {verb} {{it}}?",
                f"Which {unit} is {word} {{it}}?",
                f"Tell me the {unit} {word} {{it}}.",
                f"What {unit} is {word} {{it}}?",
                f"Name the {unit} {word} {{it}}.",
            )
            held_out = (f"Can you tell me the {unit} {word} {{it}}?", f"Please name the {unit} {word} {{it}}.")
            kinds.append(Kind(asked, held_out, f"The {unit} {word} {{it}} is {{next}}.", values))
    return kinds


@functools.cache
def colour_kind() -> Kind:
    return Kind(
        (
            "What colour is {it}?",
            "What color is {it}?",
            "Which colour is {it}?",
            "What is the colour of {it}?",
            "What is the color of {it}?",
            "colour of {it}?",
            "Tell me the colour of {it}.",
            "What colour does {it} have?",
            "Do you know the colour of {it}?",
        ),
        ("Can you tell me the colour of {it}?", "Please name the colour of {it}."),
        "{it} is {colour}.",
        [{"it": it, "colour": colour} for it, colour in tables.mapping("colours").items()],
    )


@functools.cache
def _small_kinds() -> list[Kind]:
    """Plurals, past tenses, animals."""
    plurals = [{"word": word, "other": other} for word, other in tables.pairs("plurals")]
    past = [{"word": word, "other": other} for word, other in tables.pairs("past_tense")]
    creatures = [{"animal": animal, **about} for animal, about in tables.animals().items()]
    legs = [{"it": it, "number": number} for it, number in tables.mapping("legs").items()]
    return [
        Kind(
            (
                "What is the plural of {word}?",
                "plural of {word}?",
                "Tell me the plural of {word}.",
                "What's the plural of {word}?",
                "Give me the plural of {word}.",
                "Which word is the plural of {word}?",
            ),
            (),
            "The plural of {word} is {other}.",
            plurals,
        ),
        Kind(
            (
                "What is the past tense of {word}?",
                "past tense of {word}?",
                "Tell me the past tense of {word}.",
                "What's the past tense of {word}?",
                "Give me the past tense of {word}.",
                "What is the past of {word}?",
            ),
            (),
            "The past tense of {word} is {other}.",
            past,
        ),
        Kind(
            (
                "What does a {animal} say?",
                "What sound does a {animal} make?",
                "Which sound does a {animal} make?",
                "What does the {animal} do when it makes a sound?",
                "How does a {animal} sound?",
                "sound of a {animal}?",
            ),
            (),
            "a {animal} {sound}.",
            creatures,
        ),
        Kind(
            (
                "What is a young {animal} called?",
                "What is a baby {animal} called?",
                "What do you call a young {animal}?",
                "How is a young {animal} called?",
                "What is the name of a young {animal}?",
                "young of a {animal}?",
            ),
            (),
            "a young {animal} is called a {young}.",
            creatures,
        ),
        Kind(
            (
                "How many legs does {it} have?",
                "How many legs has {it}?",
                "number of legs of {it}?",
                "Tell me how many legs {it} has.",
                "Do you know how many legs {it} has?",
                "What is the number of legs of {it}?",
            ),
            (),
            "{it} has {number} legs.",
            legs,
        ),
    ]


_NO_ARTICLE = {"bread", "cheese", "winter", "summer", "spring", "autumn"}


@functools.cache
def definition_kind() -> Kind:
    values = [
        {"word": word, "it": word if word in _NO_ARTICLE else with_article(word), "text": text}
        for word, text in tables.mapping("definitions").items()
    ]
    return Kind(
        (
            "What is {it}?",
            "What is {it}?",
            "What's {it}?",
            "Define {word}.",
            "Explain what {it} is.",
            "Tell me what {it} is.",
            "What does {word} mean?",
            "What does the word {word} mean?",
            "Do you know what {it} is?",
            "Can you explain what {it} is?",
            "What exactly is {it}?",
            "Please explain what {it} is.",
            "Could you tell me what {it} is?",
            "What is the meaning of {word}?",
            "Tell me the meaning of the word {word}.",
            "definition of {word}",
        ),
        ("Please tell me what {it} is.", "Could you explain what {it} is?", "What is the meaning of the word {word}?"),
        "{it} is {text}.",
        values,
    )


_REWORDINGS = (
    (r"What is (the .+)\?", ("What's {0}?", "Tell me {0}.", "{0}?", "Do you know {0}?", "What is {0} called?")),
    (r"What is (.+)\?", ("What's {0}?", "Tell me what {0} is.", "Do you know what {0} is?", "Can you explain {0}?")),
    (r"Who (\w+) (.+)\?", ("Tell me who {0} {1}.", "Do you know who {0} {1}?", "Which person {0} {1}?")),
    (r"Who wrote (.+)\?", ("Who is the author of {0}?", "author of {0}?")),
    (r"Who painted (.+)\?", ("Who is the painter of {0}?",)),
    (r"How many (\w+) are in (an?) (.+)\?", ("How many {0} does {1} {2} have?", "number of {0} in {1} {2}?")),
    (r"How many (\w+) does (.+) have\?", ("Tell me how many {0} {1} has.", "How many {0} has {1}?")),
    (r"What language is spoken in (.+)\?", ("Which language do people speak in {0}?", "language of {0}?")),
    (r"(Is|Does|Are) (.+)\?", ("Tell me, {0} {1}?", "Do you think so: {0} {1}?")),
)
_ANY_FACT = (
    *("{0}", "{0}", "{0}", "{0}", "Question: {0}", "Please answer: {0}", "Tell me: {0}", "I have a question: {0}"),
    *("One question: {0}", "My question: {0}", "Next question: {0}", "Answer this: {0}", "Now answer this: {0}"),
)
FACT_HELD_OUT = ("Quick question: {0}", "Here is a question: {0}", "Please answer this: {0}")


@functools.cache
def _fact_wordings() -> list[tuple[tuple[str, ...], str]]:
    facts = []
    for question, answer in tables.mapping("facts").items():
        wordings = [form.format(question) for form in _ANY_FACT]
        for pattern, forms in _REWORDINGS:
            if match := re.fullmatch(pattern, question):
                wordings += [capitalised(form.format(*match.groups())) for form in forms]
        facts.append((tuple(wordings), answer))
    return facts


def fact(rng: Random) -> Document:
    wordings, answer = rng.choice(_fact_wordings())
    return dialogue(typed(rng, rng.choice(wordings)), answer)


def element(rng: Random) -> Document:
    return rng.choices(element_kinds(), (3, 1, 1))[0].document(rng)


def definition(rng: Random) -> Document:
    return definition_kind().document(rng)


def language(rng: Random) -> Document:
    draw = rng.random()
    if draw < 0.36:
        return opposite_kind().document(rng)
    if draw < 0.58:
        return rng.choice(day_kinds()).document(rng)
    if draw < 0.76:
        return colour_kind().document(rng)
    return rng.choice(_small_kinds()).document(rng)
