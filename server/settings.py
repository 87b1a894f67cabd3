"""What the operator may set: flags over environment (`LATENTD_*`) over file (TOML). Nothing else reads the environment.

`load_settings` gives a frozen `Settings` or raises `SettingsError`, whose text is one line that names the option as it
was written (`--port`, `LATENTD_PORT`, `port in FILE`) and the reason.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

import model.config
from scheduler.config import EngineConfig
from server.api_keys import ApiKey, check_key, parse_key, read_keys
from server.sizes import parse_size

ENV_PREFIX = "LATENTD_"
CONFIG_ENV = f"{ENV_PREFIX}CONFIG"
BUILTIN_MODEL = Path(model.config.__file__).parent / "builtin"
"""The checkpoint inside the package, served when no MODEL is given."""
BUILTIN_MODEL_NAME = "latentd-builtin"


class SettingsError(ValueError):
    """One line for the operator: which option, and what is wrong with it. The command ends with exit code 2."""


class Settings(BaseSettings):
    """Every option of `latentd serve`, validated. A field's description is its help text."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_prefix=ENV_PREFIX, validate_default=True)

    model: Path = Field(
        BUILTIN_MODEL,
        description="Folder with config.json, *.safetensors and tokenizer.json. Default: the built-in model.",
    )
    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on; 0.0.0.0 is every interface.")
    port: int = Field(8000, ge=0, le=65535, description="TCP port; 0 takes a free one and prints it.")
    served_model_name: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Name clients call the model by; several are allowed. Default: the folder's name."
    )
    api_key_file: Path | None = Field(
        None,
        description="File with API keys, one a line, each with limits of its own behind it if it has any: "
        "`KEY concurrent_requests=8 requests_per_minute=60 tokens_per_minute=100000`. Empty lines and lines that begin "
        "with # do not count.",
    )
    api_key: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        repr=False,
        description="Key that clients must send (`Authorization: Bearer KEY`); several are allowed. "
        "Flags can be seen in the process list: prefer the environment or --api-key-file.",
    )
    admin_key: str | None = Field(
        None,
        repr=False,
        description="Key for POST /reset_prefix_cache, which does not exist without one. It must not be an API key.",
    )
    allowed_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Origin whose web pages may call the server from a browser (CORS), e.g. https://chat.example.org; "
        "several are allowed, `*` is any. Default: none.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where the model runs; auto takes a GPU if any.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Number format of weights and cache; auto is bfloat16, or float32 for a float32 checkpoint."
    )
    quantization: Literal["none", "int8", "int4"] = Field(
        "none",
        description="Rounds the weights of linear layers and experts to so many bits while loading: less memory, more "
        "speed. With dtype bfloat16, on a GPU also float16.",
    )
    kv_cache_dtype: Literal["auto", "fp8"] = Field(
        "auto",
        description="Number format of cached latents: auto is --dtype; fp8 is 8 bits, their keys stay in --dtype, and "
        "almost twice as many tokens fit. On a CPU plain torch computes with it, slowly.",
    )
    max_model_len: int | None = Field(
        None,
        ge=1,
        description="Longest prompt + answer in tokens. Default: the model's, cut to what the cache holds.",
    )
    max_num_seqs: int = Field(64, ge=1, le=4096, description="Most requests that run at the same time.")
    max_num_batched_tokens: int | None = Field(
        None,
        ge=1,
        le=1 << 20,
        description="Token budget of one step of the engine. Default: 256 on a CPU (up to 1024 for a long prompt while "
        "nobody else is served), 4096 on a GPU.",
    )
    num_blocks: int | None = Field(
        None, ge=1, description="Size of the latent cache in blocks of 64 tokens; wins over --kv-cache-memory."
    )
    kv_cache_memory: int | None = Field(
        None, ge=1, description="Size of the latent cache, e.g. 4GiB. Default: from the free memory."
    )
    prefix_cache: bool = Field(
        True, description="Reuse the cached blocks of prompts that begin alike; the flag turns it off."
    )
    speculative: Literal["off", "ngram"] = Field(
        "off",
        description="ngram: guess tokens that repeat the prompt or the answer, and check several in one step. Answers "
        "stay the same; where texts repeat they come sooner. On a GPU steps then no longer overlap, and those with "
        "guesses are no CUDA graphs.",
    )
    seed: int | None = Field(
        None, ge=0, lt=1 << 64, description="Makes the seeds of requests that bring none repeatable. Default: random."
    )
    num_threads: int | None = Field(
        None, ge=1, le=1024, description="Threads of the model on a CPU. Default: the cores this process may use."
    )
    weights_cache: Path | None = Field(
        None,
        description="Folder where packed weights are kept, so that the next start takes seconds. Default: nowhere.",
    )
    max_open_requests: int = Field(
        256, ge=1, description="Most requests open at once, running and waiting; one more is answered with 503."
    )
    max_queued_tokens: int = Field(
        262_144,
        ge=1,
        description="Most prompt tokens that wait to be computed; a request that would add more is answered with 503, "
        "unless it is the only one.",
    )
    queue_timeout: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Seconds a request may wait for its first step: then 503. Default: as long as it takes.",
    )
    request_timeout: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Seconds a request may take: then 504, or an error event once its answer has begun. Default: as "
        "long as it takes.",
    )
    drain_timeout: float = Field(
        30.0, ge=0, allow_inf_nan=False, description="Seconds that requests in flight get to finish after SIGTERM."
    )
    stall_timeout: float = Field(
        30.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds that one step of the engine may take before it is taken for dead and started again. "
        "A large --max-num-batched-tokens on a slow machine needs more.",
    )
    strict: bool = Field(False, description="Refuse requests with fields that the server does not know.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe lines to log.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what `load_settings` merged, so that `Settings(...)` in a test never depends on the environment."""
        return (init_settings,)

    @field_validator("served_model_name", "api_key", "allowed_origins", mode="before")
    @classmethod
    def _split_commas(cls, value: object) -> object:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("kv_cache_memory", mode="before")
    @classmethod
    def _parse_size(cls, value: object) -> object:
        return parse_size(value) if isinstance(value, str) else value

    @field_validator("log_level", mode="before")
    @classmethod
    def _lower(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value

    @field_validator("model", "weights_cache")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return None if value is None else Path(os.path.abspath(value.expanduser()))

    @field_validator("served_model_name")
    @classmethod
    def _default_name(cls, names: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        folder = info.data.get("model", BUILTIN_MODEL)
        return names or (BUILTIN_MODEL_NAME if folder == BUILTIN_MODEL else folder.name,)

    @field_validator("api_key_file")
    @classmethod
    def _check_key_file(cls, file: Path | None) -> Path | None:
        if file is not None:
            read_keys(file)
        return file

    @field_validator("api_key")
    @classmethod
    def _add_keys_of_file(cls, keys: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        file = info.data.get("api_key_file")
        keys = keys if file is None else (*keys, *read_keys(file))
        for key in keys:
            parse_key(key)
        return keys

    @field_validator("admin_key")
    @classmethod
    def _check_admin_key(cls, key: str | None, info: ValidationInfo) -> str | None:
        if key is not None:
            check_key(key)
            if key in (parse_key(entry).key for entry in info.data.get("api_key", ())):
                raise ValueError("must not be one of the API keys")
        return key

    @field_validator("allowed_origins")
    @classmethod
    def _check_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            # A browser sends exactly this form, and a comparison with anything else never succeeds.
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^\s/?#@]+", origin):
                raise ValueError(f"an origin is SCHEME://HOST[:PORT] without a path, or *, not {origin!r}")
        return origins

    @property
    def keys(self) -> tuple[ApiKey, ...]:
        return tuple(map(parse_key, self.api_key))

    @property
    def is_builtin(self) -> bool:
        return self.model == BUILTIN_MODEL

    def to_engine_config(self) -> EngineConfig:
        return EngineConfig(
            model_dir=str(self.model),
            device=self.device,
            dtype=self.dtype,
            quantization=self.quantization,
            kv_cache_dtype=self.kv_cache_dtype,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            num_blocks=self.num_blocks,
            kv_cache_memory=self.kv_cache_memory,
            prefix_cache=self.prefix_cache,
            speculative=self.speculative,
            log_level=self.log_level,
            num_threads=self.num_threads,
            weights_cache=None if self.weights_cache is None else str(self.weights_cache),
        )

    def shown(self) -> dict[str, object]:
        """Field name to value as `--print-config` prints it: keys are masked, unset options are None."""
        values = self.model_dump(mode="json")
        values["api_key"] = ["***"] * len(self.api_key)
        values["admin_key"] = None if self.admin_key is None else "***"
        return values


def flag_of(field: str) -> str:
    """`max_model_len` -> `--max-model-len`; the one switch that is on is spelt by what it turns off."""
    return "--no-prefix-cache" if field == "prefix_cache" else "--" + field.replace("_", "-")


def load_settings(flags: Mapping[str, object], config_file: Path | None = None) -> Settings:
    """Merges the sources and validates. `flags` has only the options given on the command line, by field name.

    Raises SettingsError.
    """
    if config_file is None and os.environ.get(CONFIG_ENV):
        config_file = Path(os.environ[CONFIG_ENV])
    from_file = {} if config_file is None else _read_config(config_file)
    from_environment = EnvSettingsSource(Settings, env_ignore_empty=True)()
    try:
        return Settings(**{**from_file, **from_environment, **flags})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = str(first["loc"][0])
        if field in flags:
            where = "MODEL" if field == "model" else flag_of(field)
        elif field in from_environment:
            where = ENV_PREFIX + field.upper()
        else:
            where = f"{field} in {config_file}"
        raise SettingsError(f"{where}: {_reason(field, dict(first))}") from None


def unknown_environment() -> list[str]:
    """One line for each `LATENTD_*` variable that no option reads: most likely a misspelling."""
    known = [ENV_PREFIX + name.upper() for name in Settings.model_fields] + [CONFIG_ENV]
    names = sorted(name for name in os.environ if name.startswith(ENV_PREFIX) and name not in known)
    return [f"{name} is not an option and is ignored{suggestion(name, known, ENV_PREFIX)}" for name in names]


def suggestion(word: str, known: Iterable[str], prefix: str = "") -> str:
    """What may have been meant, for the end of a message. The `prefix` of all of them does not make two alike."""
    close = difflib.get_close_matches(word.removeprefix(prefix), [each.removeprefix(prefix) for each in known], n=1)
    return f" (did you mean {prefix}{close[0]}?)" if close else ""


def _reason(field: str, error: dict[str, Any]) -> str:
    message = str(error["msg"]).removeprefix("Value error, ").removeprefix("Input ").split(", unable to parse")[0]
    if field.startswith("api_key") or field == "admin_key":
        return message  # the value may be a secret
    given = error["input"]
    if field == "port" and isinstance(given, str) and given.startswith("tcp://"):
        return "Kubernetes set it for a Service of this name; use `enableServiceLinks: false` or give --port"
    return message if error["type"] == "value_error" else f"{message}, not {given!r}"


def _read_config(file: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"--config: cannot read {file}: {error.strerror}") from None
    except ValueError as error:  # TOML or UTF-8
        raise SettingsError(f"--config: {file} is not valid TOML: {str(error).splitlines()[0]}") from None
    for name in values:
        if name not in Settings.model_fields:
            raise SettingsError(f"{name} in {file}: no such option{suggestion(name, Settings.model_fields)}")
    return values
