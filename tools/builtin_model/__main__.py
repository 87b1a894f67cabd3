"""`python -m tools.builtin_model fetch|data|train|score|export|eval`: how the built-in model was made, step by step."""

from __future__ import annotations

import argparse
import importlib

COMMANDS = {
    "fetch": ("fetch", "get the public texts that the data is made with"),
    "data": ("data", "write tokenizer and training documents"),
    "train": ("train", "train, or go on training"),
    "export": ("export", "write a run's averaged weights as a checkpoint folder"),
    "score": ("score", "quick scores of a run, without a server"),
    "eval": ("evaluate", "ask a running server all questions, and write eval.json"),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.builtin_model", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (module_name, description) in COMMANDS.items():
        module = importlib.import_module(f"tools.builtin_model.{module_name}")
        command = commands.add_parser(name, help=description, description=description)
        module.add_arguments(command)
        command.set_defaults(perform=module.run)
    arguments = parser.parse_args()
    arguments.perform(arguments)


if __name__ == "__main__":
    main()
