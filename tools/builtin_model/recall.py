"""Questions whose answers are in the prompt: copies, lists of keys and values, codes in a text, people and names."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from tools.builtin_model import tables
from tools.builtin_model.documents import Document, Turn, dialogue
from tools.builtin_model.prose import Prose
from tools.builtin_model.wording import capitalised, typed

COPY_WORDINGS = (
    "Repeat: {}",
    "Repeat this: {}",
    "Repeat this.\n{}",
    "Repeat after me: {}",
    "Repeat these words: {}",
    "Please repeat: {}",
    "Please repeat this: {}",
    "repeat {}",
    "Copy: {}",
    "Copy this: {}",
    "Say: {}",
    "Say exactly this: {}",
    "Write this again: {}",
    "Echo: {}",
    "{}\nRepeat this.",
    "Please copy this text:\n{}",
)
COPY_HELD_OUT = ("Please say this again: {}", "Copy these words: {}", "Repeat the words: {}")


def any_words() -> list[str]:
    """What is copied and looked up: words, names and cities."""
    return [*tables.words(), *tables.names(), *tables.cities()]


def copied(rng: Random, wording: str, count: int) -> Document:
    text = " ".join(rng.sample(tables.words(), count))
    return dialogue(wording.format(text), text)


def copy(rng: Random, prose: Prose, longest: int) -> Document:
    """Words, a sentence or numbers, said again; `longest`: the number of words."""
    draw = rng.random()
    if draw < 0.72:
        items = rng.sample(tables.words() if rng.random() < 0.6 else any_words(), rng.randint(1, longest))
        text = rng.choice((" ", " ", " ", ", ")).join(items)
    elif draw < 0.88:
        text = prose.sentence(rng)
    else:
        text = " ".join(number(rng) for _ in range(rng.randint(1, longest // 2)))
    return dialogue(rng.choice(COPY_WORDINGS).format(text), text)


def number(rng: Random) -> str:
    """Four digits mostly."""
    return str(rng.randrange(1000, 10000) if rng.random() < 0.75 else rng.randrange(10, 100))


def value(rng: Random) -> str:
    return rng.choice(any_words()) if rng.random() < 0.5 else number(rng)


KEY_WORDINGS = (
    "What is the value of {}?",
    "What is the value of {}?",
    "What is the value of {}?",
    "what is the value of {}",
    "Which value does {} have?",
    "Tell me the value of {}.",
    "What is {}?",
    "value of {}?",
    "{}?",
    "Give me the value of {}.",
    "Look up {}.",
    "And {}?",
)
_LIST_OPENINGS = (
    "",
    "",
    "Here is a list.\n",
    "Remember these values.\n",
    "Read this list.\n",
    "Values:\n",
    "This is a table:\n",
    "Keys and values:\n",
)
_SEPARATORS = (": ", ": ", ": ", " = ", " is ", " - ")


def key_value(rng: Random, lines: int, questions: int) -> Document:
    """A list of `key: value` lines, then some of the keys are asked, the first in the same message as the list."""
    keys = rng.sample(any_words(), lines)
    values = [value(rng) for _ in keys]
    separator = rng.choice(_SEPARATORS)
    text = "\n".join(f"{key}{separator}{of_key}" for key, of_key in zip(keys, values, strict=True))
    asked = rng.sample(range(lines), min(questions, lines))
    contents = []
    for at in asked:
        contents += [rng.choice(KEY_WORDINGS).format(keys[at]), f"The value of {keys[at]} is {values[at]}."]
    return _behind_text(rng, rng.choice(_LIST_OPENINGS) + text, contents)


def _behind_text(rng: Random, text: str, contents: list[str]) -> Document:
    """Questions and answers about a text: it stands before the first question mostly, else it is a turn of its own."""
    draw = rng.random()
    if draw < 0.78:
        return dialogue(f"{text}\n\n{contents[0]}", *contents[1:])
    if draw < 0.86:
        return dialogue(f"{contents[0]}\n\n{text}", *contents[1:])
    if draw < 0.94:
        return dialogue(text, "I have read it. What do you want to know?", *contents)
    return Document((Turn("system", text), *dialogue(*contents).turns))


CODE_ASKED = (
    "What is the {} code?",
    "What is the {} code?",
    "what is the {} code",
    "What was the {} code?",
    "Tell me the {} code.",
    "Which code is the {} code?",
    "What is the {} code in the text?",
    "Find the {} code.",
    "Do you remember the {} code?",
)
_ONLY_CODE_ASKED = ("What is the code?", "Which code is in the text?", "What code does the text name?")
_TEXT_OPENINGS = ("", "", "Read this text.\n\n", "Read the text and answer the question.\n\n", "Text:\n")
_KINDS_OF_CODE = ("secret", "access", "door", "pin", "safe", "lock")


def code_in_text(rng: Random, prose: Prose, characters: int, statements: int) -> Document:
    """`The river code is 4821.` among other sentences; all codes are asked."""
    subjects = rng.sample(tables.words(), statements)
    if rng.random() < 0.15:
        subjects[0] = rng.choice(_KINDS_OF_CODE)
    values = [rng.choice(tables.words()) if rng.random() < 0.15 else str(rng.randrange(1000, 10000)) for _ in subjects]
    form = "The code of {} is {}." if rng.random() < 0.12 else "The {} code is {}."
    sentences = prose.sentences(rng, characters)
    asked = list(zip(subjects, values, strict=True))
    for subject, of_subject in asked:
        sentences.insert(rng.randrange(len(sentences) + 1), form.format(subject, of_subject))
    rng.shuffle(asked)
    contents = []
    for subject, of_subject in asked:
        question = rng.choice(CODE_ASKED) if "of" not in form else "What is the code of {}?"
        if statements == 1 and rng.random() < 0.15:
            question = rng.choice(_ONLY_CODE_ASKED)
        contents += [question.format(subject), form.format(subject, of_subject)]
    return _behind_text(rng, rng.choice(_TEXT_OPENINGS) + " ".join(sentences), contents)


NAME_INTRODUCED = (
    "My name is {}.",
    "My name is {}.",
    "I am {}.",
    "I'm {}.",
    "Hi, I am {}.",
    "Hello, my name is {}.",
    "Hello! My name is {}.",
    "Hi, my name is {}",
    "my name is {}",
    "Call me {}.",
    "You can call me {}.",
    "People call me {}.",
    "Hi, I'm {}!",
    "The name is {}.",
)
NAME_INTRODUCED_HELD_OUT = ("Hey, my name is {}.", "Please call me {}.", "Hello, I am {}.", "Hi! My name is {}.")
NAME_ASKED = (
    "What is my name?",
    "what is my name",
    "What's my name?",
    "whats my name?",
    "Do you know my name?",
    "Who am I?",
    "What am I called?",
    "Tell me my name.",
    "Do you remember my name?",
    "my name?",
    "Can you tell me my name?",
)
NAME_ASKED_HELD_OUT = (
    "What was my name?",
    "So what is my name?",
    "Please tell me my name.",
    "Do you still know my name?",
)


def name_turns(introduced: str, asked: str, name: str, between: list[Turn]) -> Document:
    """A name is told, something else is talked about, the name is asked back."""
    start = dialogue(introduced.format(name), f"Nice to meet you, {capitalised(name)}!")
    return Document((*start.turns, *between, *dialogue(asked, f"Your name is {capitalised(name)}.").turns))


def name(rng: Random, others: Callable[[Random], Document]) -> Document:
    """After none to four other exchanges; one of five tells something else about the speaker."""
    between = [turn for _ in range(rng.choice((0, 0, 1, 1, 2, 3, 4))) for turn in others(rng).turns]
    if rng.random() < 0.2:
        return _about_me(rng, between)
    text = rng.choice(tables.names())
    introduced = rng.choice(NAME_INTRODUCED)
    if rng.random() < 0.2:
        introduced, text = introduced.lower(), text.lower()
    if not between and rng.random() < 0.5:
        question = f"{introduced.format(text)} {rng.choice(NAME_ASKED)}"
        return dialogue(question, f"Your name is {capitalised(text)}.")
    return name_turns(introduced, rng.choice(NAME_ASKED), text, between)


def _about_me(rng: Random, between: list[Turn]) -> Document:
    told, asked, answer, values = rng.choice(
        (
            ("I live in {}.", "Where do I live?", "You live in {}.", tables.cities()),
            ("I am from {}.", "Where am I from?", "You are from {}.", tables.cities()),
            ("My favourite colour is {}.", "What is my favourite colour?", "Your favourite colour is {}.", _colours()),
            ("My favourite word is {}.", "What is my favourite word?", "Your favourite word is {}.", tables.words()),
            ("My dog is called {}.", "What is my dog called?", "Your dog is called {}.", tables.names()),
            ("My best friend is {}.", "Who is my best friend?", "Your best friend is {}.", tables.names()),
            ("Remember the number {}.", "Which number did I tell you?", "The number is {}.", _codes()),
            ("My code is {}.", "What is my code?", "Your code is {}.", _codes()),
            ("I am {} years old.", "How old am I?", "You are {} years old.", [str(n) for n in range(10, 90)]),
        )
    )
    text = rng.choice(values)
    start = dialogue(told.format(text), "Thank you, I will remember that.")
    return Document((*start.turns, *between, *dialogue(typed(rng, asked), answer.format(text)).turns))


def _codes() -> list[str]:
    return [str(number) for number in range(1000, 10000)]


def _colours() -> list[str]:
    return sorted(set(tables.mapping("colours").values()))


# Statement, question, answer; the answer repeats the statement.
PEOPLE_RELATIONS = (
    ("{0} lives in {1}.", "Where does {0} live?", "cities"),
    ("{0} comes from {1}.", "Where does {0} come from?", "cities"),
    ("{0} has the {1}.", "What does {0} have?", "things"),
    ("{0} wants the {1}.", "What does {0} want?", "things"),
    ("{0} is {1} years old.", "How old is {0}?", "ages"),
)

_THINGS = ("animals", "fruits", "vegetables", "musical instruments")


def people(rng: Random, relation: int, count: int, questions: int) -> Document:
    """Several people and where each lives (or what each has); some are asked."""
    statement, question, kind = PEOPLE_RELATIONS[relation]
    things = [thing for kind in _THINGS for thing in tables.kinds()[kind]]
    pool = {"cities": tables.cities(), "things": things, "ages": [str(n) for n in range(10, 90)]}[kind]
    pairs = list(zip(rng.sample(tables.names(), count), rng.sample(pool, count), strict=True))
    text = " ".join(statement.format(*pair) for pair in pairs)
    contents = []
    for pair in rng.sample(pairs, min(questions, count)):
        contents += [question.format(pair[0]), statement.format(*pair)]
    return dialogue(f"{text} {contents[0]}", *contents[1:])
