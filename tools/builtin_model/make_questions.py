"""Wrote `questions.jsonl`: `python -m tools.builtin_model.make_questions --cache DIR --data DATA`.

Rerun it only when the questions shall change: the training data depends on them (see `questions.py`), and scores of
different files do not compare. The texts with codes are as long as their rows say in tokens of DATA's tokenizer.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

from tokenizers import Tokenizer

from tools.builtin_model import arithmetic, capitals, facts, questions, recall, records, tables, tokenizer, tool_use
from tools.builtin_model import prose as prose_module
from tools.builtin_model.documents import Document, dialogue, encode, to_messages
from tools.builtin_model.prose import Prose
from tools.builtin_model.wording import capitalised

ITEMS = 40
SEED = 5
_SUGGESTED = 20
"""The first countries of the table are those that people ask for first: their plainest question is trained."""


_FITTING_TRIES = 60
"""How often one more sentence is tried that fills up a text with a code."""


def rows(prose: Prose, of_data: Tokenizer) -> dict[str, Callable[[Random], Document]]:
    """For each row what draws one question with its answer."""
    of_capital = capitals.capital_kind()
    lives = 0  # the relation

    def of_kind(kind: facts.Kind, wordings: Sequence[str] = ()) -> Callable[[Random], Document]:
        """In one of the wordings, else in a held-out one."""

        def draw(rng: Random) -> Document:
            value = rng.choice(kind.values)
            question = rng.choice(wordings or kind.held_out).format_map(value)
            return dialogue(capitalised(question), capitalised(kind.answer.format_map(value)))

        return draw

    def plain_capital(rng: Random) -> Document:
        value = rng.choice(of_capital.values[_SUGGESTED:])
        return dialogue(of_capital.asked[0].format_map(value), of_capital.answer.format_map(value))

    def lower_capital(rng: Random) -> Document:
        value = rng.choice(of_capital.values)
        question = rng.choice(of_capital.asked[3:]).format_map(value)
        return dialogue(question.lower().rstrip("?."), of_capital.answer.format_map(value))

    def yes_no(rng: Random) -> Document:
        return capitals.yes_no(rng, rng.choice((capitals.YES_NO[:1], capitals.YES_NO_HELD_OUT)), typed_freely=False)

    def fact(rng: Random) -> Document:
        question, answer = rng.choice(list(tables.mapping("facts").items()))
        return dialogue(rng.choice(facts.FACT_HELD_OUT).format(question), answer)

    def one_digit_sum(rng: Random) -> Document:
        a, b = rng.randrange(10), rng.randrange(10)
        question = rng.choice(arithmetic.SUM_HELD_OUT).format(a=a, b=b, sign="+")
        return dialogue(question, arithmetic.calculation(a, b, "+"))

    def two_digit_sum(rng: Random) -> Document:
        a = b = 0
        while not arithmetic.held_out_pair(a, b):
            a, b = rng.randrange(10, 100), rng.randrange(10, 100)
        return dialogue(f"What is {a} + {b}?", arithmetic.calculation(a, b, "+"))

    def copy(count: int) -> Callable[[Random], Document]:
        wordings = (*recall.COPY_WORDINGS[:2], *recall.COPY_HELD_OUT)
        return lambda rng: recall.copied(rng, rng.choice(wordings), count)

    def name(between: int) -> Callable[[Random], Document]:
        def draw(rng: Random) -> Document:
            others = (facts.opposite_kind(), facts.colour_kind(), of_capital, facts.definition_kind())
            turns = [turn for kind in rng.sample(others, between) for turn in of_kind(kind, kind.asked[:1])(rng).turns]
            introduced = rng.choice(recall.NAME_INTRODUCED_HELD_OUT)
            asked = rng.choice(recall.NAME_ASKED_HELD_OUT)
            return recall.name_turns(introduced, asked, rng.choice(tables.names()), turns)

        return draw

    def key_value(lines: int) -> Callable[[Random], Document]:
        def draw(rng: Random) -> Document:
            keys = rng.sample(tables.words(), lines)
            values = [recall.value(rng) for _ in keys]
            text = "\n".join(f"{key}: {value}" for key, value in zip(keys, values, strict=True))
            at = rng.randrange(lines)
            question = recall.KEY_WORDINGS[0].format(keys[at])
            return dialogue(f"{text}\n\n{question}", f"The value of {keys[at]} is {values[at]}.")

        return draw

    def code(tokens: int) -> Callable[[Random], Document]:
        """The code stands anywhere in a text that is as long as the prompt may be."""

        def prompt(sentences: list[str], subject: str) -> str:
            return f"{' '.join(sentences)}\n\n{recall.CODE_ASKED[0].format(subject)}"

        def size(sentences: list[str], subject: str) -> int:
            ids, weights = encode(dialogue(prompt(sentences, subject), "x"), of_data)
            return len(ids) - sum(weight > 0 for weight in weights)

        def draw(rng: Random) -> Document:
            subject, number = rng.choice(tables.words()), rng.randrange(1000, 10000)
            statement = f"The {subject} code is {number}."
            sentences = prose.sentences(rng, 4 * tokens)
            while size([*sentences, statement], subject) > tokens:
                sentences.pop()
            for _ in range(_FITTING_TRIES):
                longer = [*sentences, prose.sentence(rng)]
                if size([*longer, statement], subject) <= tokens:
                    sentences = longer
            sentences.insert(rng.randrange(len(sentences) + 1), statement)
            return dialogue(prompt(sentences, subject), statement)

        return draw

    def to_list(rng: Random) -> Document:
        if rng.random() < 0.5:
            return records.members(rng, rng.choice(records.MEMBERS_HELD_OUT))
        return records.listed(rng, (records.LIST_HELD_OUT, records.NUMBERED_HELD_OUT, records.ARRAY_HELD_OUT))

    def intent(row: str) -> Callable[[Random], Document]:
        pairs = [(text, intent.answer) for intent in tables.intents() if intent.row == row for text in intent.held_out]
        return lambda rng: dialogue(*rng.choice(pairs))

    return {
        "greetings": intent("greetings"),
        "identity": intent("identity"),
        "capitals": plain_capital,
        "capitals_unseen_wording": of_kind(of_capital),
        "capitals_lower": lower_capital,
        "capitals_yes_no": yes_no,
        "opposites": of_kind(facts.opposite_kind()),
        "days": lambda rng: of_kind(rng.choice(facts.day_kinds()))(rng),
        "colours": of_kind(facts.colour_kind()),
        "sums_one_digit": one_digit_sum,
        "copy_6": copy(6),
        "name_1_turn": name(1),
        "name_3_turns": name(3),
        "key_value_5": key_value(5),
        "key_value_12": key_value(12),
        "code_128": code(128),
        "code_512": code(512),
        "code_1024": code(1024),
        "code_2048": code(2048),
        "json": lambda rng: records.to_json(rng, rng.choice(records.JSON_HELD_OUT)),
        "lists": to_list,
        "tool_calls": lambda rng: tool_use.tool_call(rng, held_out=True, count=rng.randint(3, 5)),
        "facts": fact,
        "elements": lambda rng: of_kind(rng.choice(facts.element_kinds()))(rng),
        "definitions": of_kind(facts.definition_kind()),
        "sums_two_digits": two_digit_sum,
        "copy_3": copy(3),
        "who_lives_where": lambda rng: recall.people(rng, lives, rng.randint(2, 4), 1),
        "key_value_40": key_value(40),
        "unknown": intent("unknown"),
        "thanks": intent("thanks"),
    }


def draw_row(row: str, draw: Callable[[Random], Document]) -> list[str]:
    """Up to 40 lines, none twice; small tables have fewer."""
    rng = Random(f"{SEED}/{row}")
    lines: dict[str, str] = {}
    for _ in range(100 * ITEMS):
        document = draw(rng)
        prompt = Document(document.turns[:-1], document.tools)
        assert document.turns[-1].role == "assistant"
        line = questions.to_line(row, document, to_messages(prompt))
        lines.setdefault(questions.essences(prompt)[-1], line)
        if len(lines) == ITEMS:
            break
    return list(lines.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="folder of `fetch`")
    parser.add_argument("--data", type=Path, required=True, help="folder with tokenizer.json")
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    drawn = rows(prose_module.load(arguments.cache), tokenizer.load(arguments.data))
    lines = [line for row, draw in drawn.items() for line in draw_row(row, draw)]
    questions.FILE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} questions in {len(drawn)} rows")


if __name__ == "__main__":
    main()
