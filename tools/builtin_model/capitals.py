"""Countries, their capitals and continents, asked in every direction."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from random import Random

from tools.builtin_model import tables
from tools.builtin_model.documents import Document, dialogue
from tools.builtin_model.facts import Kind
from tools.builtin_model.wording import capitalised, typed


@functools.cache
def capital_kind() -> Kind:
    values = []
    for name, capital, continent in tables.countries():
        bare = name.removeprefix("the ")
        owner = f"{name}'" if name[-1] == "s" else f"{name}'s"
        values.append({"country": name, "bare": bare, "owner": owner, "city": capital, "continent": continent})
    return Kind(
        (
            "What is the capital of {country}?",
            "What is the capital of {country}?",
            "What's the capital of {country}?",
            "whats the capital of {country}?",
            "capital of {country}?",
            "capital of {bare}",
            "the capital of {country}?",
            "Tell me the capital of {country}.",
            "Please tell me the capital of {country}.",
            "Can you tell me the capital of {country}?",
            "Which city is the capital of {country}?",
            "Name the capital of {country}.",
            "What is {owner} capital?",
            "{bare} capital",
            "{bare} capital city?",
            "What is the capital city of {country}?",
            "Do you know the capital of {country}?",
            "Do you know what the capital of {country} is?",
            "I need the capital of {country}.",
            "What is the name of the capital of {country}?",
            "Give me the capital of {country}.",
            "The capital of {country} is?",
            "The capital of {country} is",
        ),
        (
            "Can you tell me what the capital of {country} is?",
            "I want to know the capital of {country}.",
            "What city is the capital of {country}?",
            "Could you name the capital of {country}?",
            "What is the capital city of {country} called?",
            "Please give me the capital of {country}.",
        ),
        "The capital of {country} is {city}.",
        values,
        lower=0.3,
    )


def capital(rng: Random) -> Document:
    """Half ask for the capital, the others whether it is one or go the other way."""
    draw = rng.random()
    if draw < 0.5:
        return capital_kind().document(rng)
    if draw < 0.82:
        return yes_no(rng, YES_NO)
    if draw < 0.90:
        return _city_in_country(rng)
    return rng.choice(_places()).document(rng)


YES_NO = (
    "Is {city} the capital of {country}?",
    "Is {city} the capital of {country}?",
    "Is {city} the capital city of {country}?",
    "Is the capital of {country} {city}?",
    "{city} is the capital of {country}, correct?",
    "Is {city} really the capital of {country}?",
    "The capital of {country} is {city}, right?",
    "Do you know if {city} is the capital of {country}?",
    "Yes or no: is {city} the capital of {country}?",
    "Is it right that {city} is the capital of {country}?",
    "Is it so that {city} is the capital of {country}?",
    "Tell me, is {city} the capital of {country}?",
    "I think {city} is the capital of {country}, is it?",
    "{city} is the capital of {country}, isn't it?",
)
YES_NO_HELD_OUT = ("{city} is the capital of {country}, right?", "Is it true that {city} is the capital of {country}?")


def yes_no(rng: Random, asked: Sequence[str], typed_freely: bool = True) -> Document:
    """Half of them true. The fact comes before the verdict: so few layers cannot recall it and compare at once."""
    right = rng.choice(capital_kind().values)
    city = right["city"] if rng.random() < 0.5 else rng.choice(capital_kind().values)["city"]
    question = capitalised(rng.choice(asked).format(city=city, country=right["country"]))
    if typed_freely:
        question = typed(rng, question, lower=0.3)
    verdict = "yes" if city == right["city"] else "no"
    return dialogue(question, f"The capital of {right['country']} is {right['city']}, so {verdict}.")


def _city_in_country(rng: Random) -> Document:
    right = rng.choice(capital_kind().values)
    country = right["country"] if rng.random() < 0.5 else rng.choice(capital_kind().values)["country"]
    asked = ("Is {city} in {country}?", "Is {city} a city in {country}?", "Does {city} lie in {country}?")
    question = typed(rng, rng.choice(asked).format(city=right["city"], country=country), lower=0.3)
    verdict = "yes" if country == right["country"] else "no"
    return dialogue(question, f"{right['city']} is in {right['country']}, so {verdict}.")


@functools.cache
def _places() -> list[Kind]:
    values = capital_kind().values
    return [
        Kind(
            (
                "Which country has the capital {city}?",
                "{city} is the capital of which country?",
                "What country is {city} the capital of?",
                "Of which country is {city} the capital?",
                "{city} is the capital of?",
                "Which country's capital is {city}?",
            ),
            (),
            "{city} is the capital of {country}.",
            values,
            lower=0.3,
        ),
        Kind(
            (
                "Where is {city}?",
                "In which country is {city}?",
                "What country is {city} in?",
                "Which country is {city} in?",
                "Where is {city} located?",
                "Do you know where {city} is?",
            ),
            (),
            "{city} is in {country}.",
            values,
            lower=0.3,
        ),
        Kind(
            (
                "On which continent is {country}?",
                "Which continent is {country} in?",
                "What continent is {country} on?",
                "Where is {country}?",
                "Where is {country} located?",
                "On what continent is {country}?",
            ),
            (),
            "{country} is in {continent}.",
            values,
            lower=0.3,
        ),
    ]
