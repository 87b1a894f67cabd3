"""The `latentd` command: `serve`, `inspect`, `doctor`, `version`.

Exit codes: 0 done, 1 the machine was in the way (port in use, engine lost while loading or time and again), 2 the
operator must change something (an option, the checkpoint). Every error is one line on stderr.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from model.config import CheckpointError
from server.inspect import inspect_checkpoint
from server.limits import LIMITS
from server.settings import (
    CONFIG_ENV,
    ENV_PREFIX,
    Settings,
    SettingsError,
    flag_of,
    load_settings,
    suggestion,
    unknown_environment,
)
from server.sizes import parse_size


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; `argv` defaults to the process's arguments."""
    parser, commands = _build_parser()
    try:
        arguments, unknown = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
        if arguments.command is None:
            parser.print_help(sys.stderr)
            return 2
        if unknown:
            raise SettingsError(_unknown_argument(unknown[0], commands[arguments.command]))
        match arguments.command:
            case "serve":
                return _serve(arguments)
            case "inspect":
                return _inspect(arguments)
            case "doctor":
                return _doctor()
            case _:
                print(f"latentd {version('latentd')}")
                return 0
    except (argparse.ArgumentError, SettingsError, CheckpointError) as error:
        print(f"latentd: {error}", file=sys.stderr)
        return 2


def _serve(arguments: argparse.Namespace) -> int:
    flags = {name: value for name, value in vars(arguments).items() if name in Settings.model_fields}
    settings = load_settings(flags, arguments.config)
    for line in unknown_environment():
        print(f"latentd: warning: {line}", file=sys.stderr)
    if arguments.print_config:
        print(_config_text(settings))
        return 0
    from server.daemon import run  # not for `--help`: it loads the HTTP server

    return run(settings)


def _inspect(arguments: argparse.Namespace) -> int:
    if arguments.model_dir is None:
        raise SettingsError("inspect: MODEL_DIR is missing")
    try:
        device_memory = None if arguments.device_memory is None else parse_size(arguments.device_memory)
    except ValueError as error:
        raise SettingsError(f"--device-memory: {error}") from None
    report = inspect_checkpoint(arguments.model_dir, device_memory)
    print(json.dumps(asdict(report), indent=2) if arguments.json else report.text())
    return 0


def _doctor() -> int:
    """By a process of its own, since it loads torch. `-P`: a `model` folder in the working directory is not ours."""
    return int(subprocess.run((sys.executable, "-P", "-m", "model.doctor")).returncode != 0)


def _build_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser and those of its commands. It leaves every value a string: `Settings` validates all sources alike."""
    parser = argparse.ArgumentParser(
        prog="latentd",
        description="Serves DeepSeek-V2-family models over the OpenAI HTTP API.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--version", action="version", version=f"latentd {version('latentd')}")
    added = parser.add_subparsers(dest="command", metavar="COMMAND")

    serve = added.add_parser(
        "serve",
        allow_abbrev=False,
        exit_on_error=False,
        help="start the daemon",
        description="Starts the daemon: loads the checkpoint and answers HTTP until SIGTERM or Ctrl-C.",
        epilog=f"Every option can also be set as {ENV_PREFIX}NAME in the environment (--max-model-len is "
        f"{ENV_PREFIX}MAX_MODEL_LEN; several values separated by commas) or as a line of the --config file "
        "(max_model_len = 4096). Flags win over the environment, the environment over the file.",
    )
    for name, field in Settings.model_fields.items():
        if name == "model":
            serve.add_argument("model", metavar="MODEL", nargs="?", default=argparse.SUPPRESS, help=field.description)
        elif field.annotation is bool:
            action: Literal["store_true", "store_false"] = "store_false" if field.default else "store_true"
            serve.add_argument(
                flag_of(name), dest=name, action=action, default=argparse.SUPPRESS, help=field.description
            )
        else:
            repeatable = get_origin(field.annotation) is tuple
            serve.add_argument(
                flag_of(name),
                dest=name,
                metavar=_metavar(name),
                action="append" if repeatable else "store",
                default=argparse.SUPPRESS,
                help=_help(name),
            )
    serve.add_argument("--config", type=Path, metavar="FILE", help=f"TOML file with options. Also {CONFIG_ENV}.")
    serve.add_argument("--print-config", action="store_true", help="Print the effective options and limits, and exit.")

    inspect = added.add_parser(
        "inspect",
        allow_abbrev=False,
        exit_on_error=False,
        help="say what a checkpoint needs, without loading it",
        description="Prints parameters, bytes, and what fits in memory. Reads config.json and the headers only.",
    )
    inspect.add_argument("model_dir", type=Path, metavar="MODEL_DIR", nargs="?", help="Folder of the checkpoint.")
    inspect.add_argument("--json", action="store_true", help="Print one JSON object.")
    inspect.add_argument("--device-memory", metavar="SIZE", help="Memory to plan for: 80GiB. Default: this machine's.")

    doctor = added.add_parser(
        "doctor",
        allow_abbrev=False,
        exit_on_error=False,
        help="say what this machine has for latentd, and what is amiss",
        description="Prints versions, processor, compiled kernels, GPU, memory and limits, one line each. Exit code 1 "
        "where something is amiss.",
    )

    show_version = added.add_parser("version", allow_abbrev=False, exit_on_error=False, help="print the version")
    return parser, {"serve": serve, "inspect": inspect, "doctor": doctor, "version": show_version}


def _unknown_argument(argument: str, parser: argparse.ArgumentParser) -> str:
    if not argument.startswith("-"):
        return f"unexpected argument {argument!r}"
    option = argument.split("=")[0]
    known = [option for action in parser._actions for option in action.option_strings]
    return f"{option}: no such option{suggestion(option, known)}"


def _help(name: str) -> str:
    """A setting's description, with its default where that is a value and not a behaviour."""
    field = Settings.model_fields[name]
    text = str(field.description)
    return text if field.default in (None, ()) else f"{text} Default: {field.default}."


def _metavar(name: str) -> str:
    annotation: Any = Settings.model_fields[name].annotation
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    if name == "kv_cache_memory":
        return "SIZE"
    if isinstance(annotation, UnionType):
        annotation = get_args(annotation)[0]
    return {int: "N", float: "SECONDS", Path: "FILE"}.get(annotation, name.rsplit("_", 1)[-1].upper())


def _config_text(settings: Settings) -> str:
    """The effective options as a file that `--config` reads, and the limits of a request as comments in it."""
    lines = []
    for name, value in settings.shown().items():
        if value is None:
            lines.append(f"# {name}: default")
        elif name == "api_key":
            lines.append(f"# {name}: {len(settings.api_key)} set, not shown")
        elif name == "admin_key":
            lines.append(f"# {name}: set, not shown")
        else:
            lines.append(f"{name} = {json.dumps(value, ensure_ascii=False)}")
    lines += ["", "# Limits of one request (fixed):"]
    for limit in LIMITS:
        low = "" if limit.minimum is None else f"{limit.minimum:,} to "
        lines.append(f"#   {limit.name:20} {low}{limit.maximum:,} {limit.unit}".rstrip() + f"   ({limit.where})")
    return "\n".join(lines)
