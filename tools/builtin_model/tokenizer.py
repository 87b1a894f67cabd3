"""The model's tokenizer: a byte-level BPE of 4,096 tokens with DeepSeek-V2.5's control tokens and chat format.

What is to be copied must be one token, in every place where it can stand: a value of two tokens is found half as
surely. So the merges are counted on a sample of the training documents, which makes ordinary text short, and on lines
of the words that matter, which makes each of them one token: after a space, and bare, as after a quote or a line break.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tools.builtin_model import tables

VOCAB_SIZE = 4096
MAX_LENGTH = 8192
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
SPECIAL_TOKENS = (BOS, EOS)
# As in the family's own files, these are added tokens that are not "special": text decoding keeps them.
ADDED_TOKENS = (
    "<｜fim▁hole｜>",
    "<｜fim▁begin｜>",
    "<｜fim▁end｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<|EOT|>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁outputs▁begin｜>",
    "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
    "<｜tool▁sep｜>",
)
# DeepSeek-V2.5's format: no newlines, no spaces, role marks that are single tokens; tool calls and results as on
# its model card: after tool results the model goes on directly, without another <｜Assistant｜>.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages if message['role'] == 'system' -%}
{{- ('' if loop.first else '\\n\\n') + message['content'] -}}
{%- endfor -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- '<｜User｜>' + message['content'] -}}
{%- elif message['role'] == 'assistant' -%}
{%- if loop.previtem is not defined or loop.previtem['role'] != 'tool' -%}
{{- '<｜Assistant｜>' -}}
{%- endif -%}
{{- message['content'] or '' -}}
{%- if message['tool_calls'] -%}
{{- '<｜tool▁calls▁begin｜>' -}}
{%- for call in message['tool_calls'] -%}
{{- '' if loop.first else '\\n' -}}
{{- '<｜tool▁call▁begin｜>' + call['type'] + '<｜tool▁sep｜>' + call['function']['name'] -}}
{{- '\\n```json\\n' + call['function']['arguments'] + '\\n```<｜tool▁call▁end｜>' -}}
{%- endfor -%}
{{- '<｜tool▁calls▁end｜>' -}}
{%- endif -%}
{{- eos_token -}}
{%- elif message['role'] == 'tool' -%}
{{- '<｜tool▁outputs▁begin｜>' if loop.previtem is not defined or loop.previtem['role'] != 'tool' else '\\n' -}}
{{- '<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>' -}}
{{- '<｜tool▁outputs▁end｜>' if loop.nextitem is not defined or loop.nextitem['role'] != 'tool' else '' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and (not messages or messages[-1]['role'] != 'tool') -%}
{{- '<｜Assistant｜>' -}}
{%- endif -%}
"""
_REPEATS = 400
"""Of each line of words that matter: above the count of the rarest merge, so that all of them come in."""


def copied_words() -> list[str]:
    """Words that must be one token with a space before them, and bare: what is copied between forms."""
    found = [part for country in tables.countries() for text in country for part in text.split() if part != "the"]
    return sorted({*found, *tables.names(), *tables.words()})


def said_words() -> list[str]:
    """Words that must be one token with a space before them: names in lower case, as people type, and answers."""
    found = [word.lower() for word in copied_words()]
    found += [element.name for element in tables.elements()] + [element.symbol for element in tables.elements()]
    found += [word for members in tables.kinds().values() for word in members]
    found += [word for pair in tables.pairs("opposites") for word in pair]
    found += [*tables.mapping("colours").values(), *tables.animals(), *tables.mapping("definitions")]
    return sorted({word for word in found if word.isalpha()} - set(copied_words()))


def train(texts: Iterable[str]) -> Tokenizer:
    """Of the texts and the copied words; the same texts give the same tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # One digit a token, with the space before a number inside its first digit; then words, punctuation, spaces.
            pre_tokenizers.Split(
                Regex(
                    r" ?\p{N}|[^\r\n\p{L}\p{P}\p{S}\p{N}]?[\p{L}\p{M}]+"
                    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
                ),
                "isolated",
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS) - len(ADDED_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_with_words(texts), trainer)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in ADDED_TOKENS])
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer


def _with_words(texts: Iterable[str]) -> Iterator[str]:
    yield from texts
    line = " ".join([*(f'"{word}" {word}' for word in copied_words()), *said_words()])
    for _ in range(_REPEATS):
        yield line


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """`tokenizer.json` and `tokenizer_config.json`, as they go into the checkpoint."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_LENGTH,
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def load(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))
