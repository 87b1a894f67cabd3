"""Sums, differences, products, counting and comparing, with numbers below 100."""

from __future__ import annotations

import hashlib
from random import Random

from tools.builtin_model import tables
from tools.builtin_model.documents import Document, dialogue
from tools.builtin_model.wording import capitalised, typed

SUM_WORDINGS = (
    "What is {a} {sign} {b}?",
    "What is {a} {sign} {b}?",
    "{a} {sign} {b}",
    "{a} {sign} {b} =",
    "{a} {sign} {b}?",
    "{a}{sign}{b}",
    "{a}{sign}{b}=?",
    "What's {a} {sign} {b}?",
    "Calculate {a} {sign} {b}.",
    "How much is {a} {sign} {b}?",
    "Tell me {a} {sign} {b}.",
    "Compute {a} {sign} {b}",
    "What does {a} {sign} {b} equal?",
    "What is {a} {word} {b}?",
    "How much is {a} {word} {b}?",
    "{a} {word} {b}",
    "{a} {word} {b} is?",
    "Can you calculate {a} {sign} {b}?",
    "Now calculate {a} {sign} {b}.",
    "Could you tell me what {a} {sign} {b} is?",
    "Do you know what {a} {sign} {b} is?",
    "{verb} {a} {sign} {b}",
    "{verb} {a} {sign} {b}.",
    "Please {lower_verb} {a} {sign} {b}.",
    "Can you {lower_verb} {a} {sign} {b}?",
    "I want you to {lower_verb} {a} {sign} {b}",
)
_VERBS = (
    *("Work out", "Find", "Evaluate", "Determine", "Figure out", "Do", "Answer", "Say", "Compute", "Count", "Give me"),
    *("Reckon", "Estimate", "Write", "Try", "Think about", "Check", "Read", "Show", "Explain", "Start with", "Resolve"),
)
"""So many that an unknown one is passed over."""
SUM_HELD_OUT = ("Can you tell me what {a} {sign} {b} is?", "Please calculate {a} {sign} {b}.", "Solve {a} {sign} {b}")
_SIGNS = (("+", "plus"), ("-", "minus"), ("*", "times"))


def held_out_pair(a: int, b: int) -> bool:
    """One of twenty pairs with two-digit numbers is only for the tests; by a hash, so that all know it."""
    return max(a, b) > 9 and hashlib.sha256(f"{min(a, b)},{max(a, b)}".encode()).digest()[0] < 13


def calculation(a: int, b: int, sign: str) -> str:
    """The answer: `2 + 2 = 4`."""
    result = a + b if sign == "+" else a - b if sign == "-" else a * b
    return f"{a} {sign} {b} = {result}"


def arithmetic(rng: Random) -> Document:
    draw = rng.random()
    if draw < 0.45:
        return _calculate(rng, rng.randrange(10), rng.randrange(10))
    if draw < 0.6:
        return _calculate(rng, rng.randrange(21), rng.randrange(21))
    if draw < 0.8:
        return _calculate(rng, rng.randrange(10, 100), rng.randrange(1, 100))
    return rng.choice((_count, _larger, _next, _even))(rng)


def _calculate(rng: Random, a: int, b: int) -> Document:
    sign, word = rng.choices(_SIGNS, (6, 2, 2))[0]
    if held_out_pair(a, b) and sign == "+":
        a, b = 2, 2
    if sign == "-":
        a, b = max(a, b), min(a, b)
    if sign == "*":
        a, b = a % 11, b % 11
    verb = rng.choice(_VERBS) if rng.random() < 0.7 else capitalised(rng.choice(tables.words()))
    fields = {"a": a, "b": b, "sign": sign, "word": word, "verb": verb, "lower_verb": verb.lower()}
    question = rng.choice(SUM_WORDINGS).format_map(fields)
    return dialogue(typed(rng, question), calculation(a, b, sign))


def _count(rng: Random) -> Document:
    first = 1 if rng.random() < 0.6 else rng.randrange(2, 50)
    last = first + rng.randrange(2, 15)
    forms = ["Count from {0} to {1}.", "count from {0} to {1}", "Write the numbers from {0} to {1}."]
    if first == 1:
        forms += ["Count to {1}.", "count to {1}", "Please count to {1}.", "Can you count to {1}?"]
    return dialogue(rng.choice(forms).format(first, last), ", ".join(map(str, range(first, last + 1))))


def _larger(rng: Random) -> Document:
    a, b = rng.sample(range(100), 2)
    forms = ("Which is larger, {0} or {1}?", "What is more, {0} or {1}?", "Which number is bigger: {0} or {1}?")
    return dialogue(typed(rng, rng.choice(forms).format(a, b)), f"{max(a, b)} is larger than {min(a, b)}.")


def _next(rng: Random) -> Document:
    number = rng.randrange(1, 99)
    if rng.random() < 0.5:
        forms = ("What number comes after {0}?", "Which number follows {0}?", "What comes after {0}?")
        return dialogue(typed(rng, rng.choice(forms).format(number)), f"The number after {number} is {number + 1}.")
    forms = ("What number comes before {0}?", "Which number is before {0}?", "What comes before {0}?")
    return dialogue(typed(rng, rng.choice(forms).format(number)), f"The number before {number} is {number - 1}.")


def _even(rng: Random) -> Document:
    number = rng.randrange(100)
    kind = rng.choice(("even", "odd"))
    parity = "odd" if number % 2 else "even"
    forms = ("Is {0} an {1} number?", "Is {0} {1}?", "Is the number {0} {1}?")
    answer = f"{number} is {parity}, so {'yes' if parity == kind else 'no'}."
    return dialogue(typed(rng, rng.choice(forms).format(number, kind)), answer)
