"""Answers of a fixed form: JSON objects and arrays, numbered and dashed lists, members of a kind."""

from __future__ import annotations

import json
from random import Random

from tools.builtin_model import tables
from tools.builtin_model.documents import Document, dialogue
from tools.builtin_model.wording import capitalised, enumeration, typed

Record = dict[str, str | int]

JSON_WORDINGS = (
    "Write as JSON: {}",
    "Write as JSON: {}",
    "Write this as JSON: {}",
    "As JSON: {}",
    "Convert to JSON: {}",
    "Convert this to JSON: {}",
    "Turn this into JSON: {}",
    "Give me this as JSON: {}",
    "Make JSON of this: {}",
    "json: {}",
    "JSON please: {}",
    "Put this into a JSON object: {}",
    "{}\nWrite this as JSON.",
    "{}\nAs JSON, please.",
    "Can you write as JSON: {}",
    "Now show as JSON: {}",
)
JSON_HELD_OUT = ("Please write as JSON: {}", "Convert this into JSON: {}", "Show this as JSON: {}")
_PAIR_FORMS = ("{} {}", "{} {}", "{}: {}", "{} = {}", "{} is {}")


def record(rng: Random) -> Record:
    """Two to four fields of a person or a thing."""
    if rng.random() < 0.65:
        fields: Record = {
            "name": rng.choice(tables.names()),
            "age": rng.randrange(1, 100),
            "city": rng.choice(tables.cities()),
            "country": rng.choice([c.name for c in tables.countries() if " " not in c.name]),
            "pet": rng.choice(list(tables.animals())),
            "colour": rng.choice(tables.kinds()["colours"]),
            "code": rng.randrange(1000, 10000),
        }
    else:
        fields = {
            "item": rng.choice(tables.words()),
            "price": rng.randrange(1, 100),
            "colour": rng.choice(tables.kinds()["colours"]),
            "number": rng.randrange(1, 1000),
            "shop": rng.choice(tables.words()),
            "city": rng.choice(tables.cities()),
        }
    chosen = rng.sample(list(fields), rng.choice((2, 3, 3, 3, 4)))
    first = next(iter(fields))
    keys = [first, *(key for key in chosen if key != first)] if rng.random() < 0.7 else chosen
    return {key: fields[key] for key in keys[:4]}


def to_json(rng: Random, wording: str) -> Document:
    of_one = record(rng)
    form = rng.choice(_PAIR_FORMS)
    text = ", ".join(form.format(key, of_key) for key, of_key in of_one.items())
    return dialogue(wording.format(text), json.dumps(of_one))


def _sentence_to_json(rng: Random) -> Document:
    name, age, city = rng.choice(tables.names()), rng.randrange(1, 100), rng.choice(tables.cities())
    text = f"{name} is {age} years old and lives in {city}."
    return dialogue(rng.choice(JSON_WORDINGS).format(text), json.dumps({"name": name, "age": age, "city": city}))


def _from_json(rng: Random) -> Document:
    of_one = record(rng)
    key = rng.choice(list(of_one))
    forms = ("What is the {}?", "What is the {} in this JSON?", "Tell me the {}.", "{}?", "What {} is given?")
    question = rng.choice(forms).format(key)
    return dialogue(f"{json.dumps(of_one)}\n{capitalised(question)}", f"The {key} is {of_one[key]}.")


LIST_WORDINGS = (
    "Write as a list: {}",
    "Write these as a list: {}",
    "List: {}",
    "As a list: {}",
    "Make a list: {}",
    "Can you write as a list: {}",
    "Now write as a list: {}",
    "Please make a list: {}",
    "Put into a list: {}",
)
LIST_HELD_OUT = ("Please write as a list: {}", "Write this as a list: {}")
NUMBERED_WORDINGS = (
    "Write as a numbered list: {}",
    "Number these: {}",
    "As a numbered list: {}",
    "Make a numbered list: {}",
    "Can you write as a numbered list: {}",
    "Now write these as a numbered list: {}",
    "Please make a numbered list: {}",
    "Write these with numbers: {}",
)
NUMBERED_HELD_OUT = ("Please write as a numbered list: {}", "Write this as a numbered list: {}")
ARRAY_WORDINGS = (
    "Write as a JSON list: {}",
    "As a JSON list: {}",
    "Make a JSON array: {}",
    "Convert to a JSON list: {}",
    "Write these as a JSON array: {}",
    "Can you write as a JSON list: {}",
    "Now write these as a JSON list: {}",
    "Please make a JSON list: {}",
)
ARRAY_HELD_OUT = ("Please write as a JSON list: {}", "Write this as a JSON list: {}")


def listed(
    rng: Random, wordings: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]], longest: int = 6
) -> Document:
    """Words with commas between to lines with dashes, numbered lines, or a JSON array: one wording tuple of each."""
    items = rng.sample(tables.words() if rng.random() < 0.8 else tables.names(), rng.randint(2, longest))
    form = rng.randrange(3)
    answer = (
        "\n".join(f"- {item}" for item in items),
        "\n".join(f"{number}. {item}" for number, item in enumerate(items, 1)),
        json.dumps(items),
    )[form]
    return dialogue(rng.choice(wordings[form]).format(rng.choice((", ", ", ", " ")).join(items)), answer)


_COUNTS = ("two", "three", "four", "five")
MEMBERS_WORDINGS = (
    "Name {count} {kind}.",
    "name {count} {kind}",
    "List {count} {kind}.",
    "Give me {count} {kind}.",
    "Tell me {count} {kind}.",
    "Can you name {count} {kind}?",
    "{count} {kind}",
    "Say {count} {kind}.",
    "Write down {count} {kind}.",
    "Do you know {count} {kind}?",
    "I want {count} {kind}.",
    "We need {count} {kind}.",
    "I would like {count} {kind}.",
    "Show me {count} {kind}.",
    "Please tell me {count} {kind}.",
    "Could you list {count} {kind}?",
    "I am looking for {count} {kind}.",
)
MEMBERS_HELD_OUT = ("Please list {count} {kind}.", "Please name {count} {kind}.", "I need {count} {kind}.")


def members(rng: Random, wording: str, as_digit: bool = False) -> Document:
    """`Three fruits are apple, banana and orange.`: always the first of the table, so that it can be learned."""
    kind = rng.choice(list(tables.kinds()))
    number = rng.randint(2, min(5, len(tables.kinds()[kind])))
    count = _COUNTS[number - 2]
    answer = f"{capitalised(count)} {kind} are {enumeration(tables.kinds()[kind][:number])}."
    return dialogue(capitalised(wording.format(count=number if as_digit else count, kind=kind)), answer)


def form(rng: Random) -> Document:
    """Any of these."""
    draw = rng.random()
    if draw < 0.25:
        return to_json(rng, rng.choice(JSON_WORDINGS))
    if draw < 0.3:
        return _sentence_to_json(rng)
    if draw < 0.36:
        return _from_json(rng)
    if draw < 0.8:
        return listed(rng, (LIST_WORDINGS, NUMBERED_WORDINGS, ARRAY_WORDINGS), longest=8)
    document = members(rng, rng.choice(MEMBERS_WORDINGS), as_digit=rng.random() < 0.3)
    return dialogue(typed(rng, document.turns[0].content), document.turns[1].content)
