"""Small talk: greetings, thanks, what the model is, and what it does not know."""

from __future__ import annotations

from random import Random

from tools.builtin_model import tables
from tools.builtin_model.documents import Document, Turn, dialogue, joined
from tools.builtin_model.wording import typed

SYSTEM_TEXTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are a helpful Assistant.",
    "You are a friendly assistant.",
    "You are a helpful, honest assistant. Answer briefly.",
    "Answer briefly.",
    "Be concise.",
    "Answer in one sentence.",
    "You are latentd's built-in model.",
    "You answer questions.",
    "Answer the user's questions.",
    "You are a chat bot.",
    "Be polite and precise.",
)
_ROW_SHARES = {"greetings": 0.3, "thanks": 0.12, "identity": 0.3, "chat": 0.16, "unknown": 0.12}


def small_talk(rng: Random) -> Document:
    row = rng.choices(list(_ROW_SHARES), list(_ROW_SHARES.values()))[0]
    intent = rng.choice([intent for intent in tables.intents() if intent.row == row])
    text = rng.choice(intent.asked)
    draw = rng.random()
    if draw < 0.1:
        text = typed(rng, text)
    elif draw < 0.2:
        text = text.lower()
    elif draw < 0.3:
        text = text.rstrip("?.!")
    elif draw < 0.4 and text[-1] != "?":
        text = text.rstrip(".!") + rng.choice("!.")
    return dialogue(text, intent.answer)


def conversation(rng: Random, parts: list[Document]) -> Document:
    """The parts one after another; one of five with a system text first."""
    document = joined(parts)
    if rng.random() < 0.2 and document.turns[0].role == "user":
        return Document((Turn("system", rng.choice(SYSTEM_TEXTS)), *document.turns))
    return document
