"""Writes the parts of the documents that follow from the code: `python -m tools.write_docs`.

Such a part stands between `<!-- generated: NAME -->` and `<!-- end -->`; tests/test_docs.py fails when one is stale.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from model.config import load_config
from server.app import build_app
from server.limits import LIMITS
from server.metrics import Metrics
from server.middleware import OPEN_PATHS
from server.openapi import STATUSES
from server.schemas import chat, completion, messages, responses
from server.schemas.sampling import SamplingFields
from server.settings import BUILTIN_MODEL, ENV_PREFIX, Settings, flag_of
from server.supervisor import Supervisor
from server.tokenizer import load_tokenizer
from tools.builtin_model.evaluate import TARGETS
from tools.parameters import rows as parameter_rows

ROOT = Path(__file__).parent.parent
BUILTIN_CARD = BUILTIN_MODEL / "README.md"
FILES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), BUILTIN_CARD)


def options() -> str:
    """Every option, with its name in the environment and its default."""
    rows = []
    for name, field in Settings.model_fields.items():
        flag = "`MODEL`" if name == "model" else f"`{flag_of(name)}`"
        default = "" if name == "model" or field.default in (None, ()) else f"`{str(field.default).lower()}`"
        rows.append((flag, f"`{ENV_PREFIX}{name.upper()}`", default, str(field.description)))
    return table(("option", "environment", "default", "meaning"), rows)


def _supervisor() -> Supervisor:
    """Of an engine that is never started."""
    return Supervisor(Settings().to_engine_config())


def limits() -> str:
    rows = []
    for limit in LIMITS:
        low = "" if limit.minimum is None else f"{limit.minimum:,} to "
        rows.append((limit.where, f"{low}{limit.maximum:,} {limit.unit}".strip()))
    return table(("what", "bound"), rows)


def endpoints() -> str:
    settings = Settings()
    tokenizer = load_tokenizer(settings.model, load_config(settings.model).vocab_size)
    paths = build_app(settings, _supervisor(), tokenizer).openapi()["paths"]
    rows = [
        (f"`{method.upper()} {path}`", operation["summary"], "no" if path in OPEN_PATHS else "yes")
        for path, methods in paths.items()
        for method, operation in methods.items()
    ]
    return table(("endpoint", "answer", "needs a key"), rows)


def fields() -> str:
    """The request fields that are read: those of both completion endpoints, then each endpoint's own."""
    shared = SamplingFields.model_fields
    rows = [("both", f"`{name}`", field.description or "") for name, field in shared.items()]
    for path, model in (("chat", chat.ChatCompletionRequest), ("completions", completion.CompletionRequest)):
        own = {name: field for name, field in model.model_fields.items() if name not in shared}
        rows += [(path, f"`{name}`", field.description or "") for name, field in own.items()]
    for path, other in (("responses", responses.ResponsesRequest), ("messages", messages.MessagesRequest)):
        rows += [(path, f"`{name}`", field.description or "") for name, field in other.model_fields.items()]
    return table(("endpoint", "field", "meaning"), rows)


def refused() -> str:
    """The request fields that are refused by name, but for those that are fields of chat completions."""
    both = chat.UNSUPPORTED.keys() & completion.UNSUPPORTED.keys()
    others = chat.UNSUPPORTED.keys() | chat.ChatCompletionRequest.model_fields.keys()
    lines = [
        ("all", both),
        ("all but completions", chat.UNSUPPORTED.keys() - both),
        ("responses", responses.UNSUPPORTED.keys() - others),
        ("messages", messages.UNSUPPORTED.keys() - others),
    ]
    return table(
        ("endpoint", "refused"), [(path, ", ".join(f"`{name}`" for name in sorted(names))) for path, names in lines]
    )


def parameters() -> str:
    """What becomes of every parameter that other servers know."""
    return table(("parameter", "chat", "completions"), parameter_rows())


def statuses() -> str:
    return table(("status", "meaning"), [(str(status), text) for status, text in sorted(STATUSES.items())])


def metrics() -> str:
    families = text_string_to_metric_families(Metrics("model", _supervisor()).render().decode())
    return table(
        ("metric", "kind", "meaning"), [(f"`{each.name}`", each.type, each.documentation) for each in families]
    )


def evaluation() -> str:
    """What the built-in model can do, row by row, as `eval.json` has it."""
    result = json.loads((BUILTIN_MODEL / "eval.json").read_text(encoding="utf-8"))
    rows = []
    for row, counts in result["rows"].items():
        target = f"{TARGETS[row]} %" if row in TARGETS else ""
        share = f"{100 * counts['right'] / counts['asked']:.0f} %"
        rows.append((row.replace("_", " "), f"{counts['right']} of {counts['asked']}", share, target))
    tokens = f"perplexity of the right answers, {result['answer_tokens']:,} tokens"
    return table(("row", "right", "", "target"), [*rows, (tokens, f"{result['answer_perplexity']:.3f}", "", "")])


PARTS: dict[str, Callable[[], str]] = {
    part.__name__: part
    for part in (options, limits, endpoints, fields, refused, parameters, statuses, metrics, evaluation)
}
_PART = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def lines() -> Iterator[str]:
        yield "| " + " | ".join(head) + " |"
        yield "|" + " --- |" * len(head)
        for row in rows:
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"

    return "\n".join(lines())


def updated(text: str) -> str:
    """The document with its generated parts as they must be now."""
    return _PART.sub(lambda match: f"{match[1]}{PARTS[match[2]]()}\n{match[3]}", text)


if __name__ == "__main__":
    for file in FILES:
        file.write_text(updated(file.read_text(encoding="utf-8")), encoding="utf-8")
