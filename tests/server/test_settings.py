"""Sources and their order, values and their refusal: what an operator writes, and the one line he gets back."""

from __future__ import annotations

from pathlib import Path

import pytest

from scheduler.config import EngineConfig
from server.settings import (
    BUILTIN_MODEL,
    BUILTIN_MODEL_NAME,
    ENV_PREFIX,
    Settings,
    SettingsError,
    flag_of,
    load_settings,
    unknown_environment,
)
from server.sizes import format_count, format_size, parse_size


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(ENV_PREFIX + name.upper(), raising=False)


def write(file: Path, text: str) -> Path:
    file.write_text(text, encoding="utf-8")
    return file


def test_defaults_serve_the_builtin_model_on_loopback() -> None:
    settings = load_settings({})
    assert settings.model == BUILTIN_MODEL
    assert settings.served_model_name == (BUILTIN_MODEL_NAME,)
    assert (settings.host, settings.port, settings.api_key) == ("127.0.0.1", 8000, ())
    assert settings.to_engine_config() == EngineConfig(model_dir=str(BUILTIN_MODEL))


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "latentd.toml", 'port = 1\nmax_num_seqs = 2\nseed = 3\nserved_model_name = ["a", "b"]\n')
    monkeypatch.setenv("LATENTD_PORT", "10")
    monkeypatch.setenv("LATENTD_MAX_NUM_SEQS", "20")
    settings = load_settings({"port": "100"}, file)
    assert (settings.port, settings.max_num_seqs, settings.seed) == (100, 20, 3)
    assert settings.served_model_name == ("a", "b")
    monkeypatch.setenv("LATENTD_CONFIG", str(file))
    assert load_settings({}).seed == 3


def test_environment_spells_every_kind_of_value(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "MODEL": "/models/DeepSeek-V2-Lite",
        "API_KEY": "one, two",
        "KV_CACHE_MEMORY": "1.5GiB",
        "PREFIX_CACHE": "false",
        "DRAIN_TIMEOUT": "2.5",
        "LOG_LEVEL": "DEBUG",
        "PORT": "",  # as compose files set what is not given
    }.items():
        monkeypatch.setenv(ENV_PREFIX + name, value)
    settings = load_settings({})
    assert settings.model == Path("/models/DeepSeek-V2-Lite")
    assert settings.served_model_name == ("DeepSeek-V2-Lite",)
    assert settings.api_key == ("one", "two")
    assert settings.kv_cache_memory == 3 * 2**29
    assert not settings.prefix_cache
    assert (settings.drain_timeout, settings.log_level, settings.port) == (2.5, "debug", 8000)
    engine = settings.to_engine_config()
    assert (engine.kv_cache_memory, engine.prefix_cache, engine.log_level) == (3 * 2**29, False, "debug")


def test_settings_built_by_hand_ignore_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTD_PORT", "9")
    assert Settings().port == 8000


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"port": "http"}, "--port: should be a valid integer, not 'http'"),
        ({"port": "65536"}, "--port: should be less than or equal to 65535, not '65536'"),
        ({"device": "tpu"}, "--device: should be 'auto', 'cpu' or 'cuda', not 'tpu'"),
        ({"max_model_len": "0"}, "--max-model-len: should be greater than or equal to 1, not '0'"),
        ({"drain_timeout": "inf"}, "--drain-timeout: should be a finite number, not 'inf'"),
        ({"kv_cache_memory": "4G"}, "--kv-cache-memory: '4G' is not a size; write for example 4GiB"),
        ({"api_key_file": "/nowhere/keys"}, "--api-key-file: cannot read /nowhere/keys: No such file"),
        (
            {"allowed_origins": "https://a.example/"},
            "--allowed-origins: an origin is SCHEME://HOST[:PORT]",
        ),
        ({"prefix_cache": "perhaps"}, "--no-prefix-cache: should be a valid boolean"),
    ],
)
def test_a_bad_value_is_one_line_that_names_the_flag(flags: dict[str, object], line: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(flags)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_origins_are_separated_by_commas() -> None:
    assert load_settings({"allowed_origins": "https://a.example, http://localhost:3000"}).allowed_origins == (
        "https://a.example",
        "http://localhost:3000",
    )


def test_a_bad_value_names_the_source_it_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "latentd.toml", "seed = -1\n")
    with pytest.raises(SettingsError, match=rf"^seed in {file}: should be greater than or equal to 0"):
        load_settings({}, file)
    monkeypatch.setenv("LATENTD_SEED", "x")
    with pytest.raises(SettingsError, match=r"^LATENTD_SEED: "):
        load_settings({}, file)
    monkeypatch.setenv("LATENTD_SEED", "1")
    assert load_settings({}, file).seed == 1


def test_a_port_that_kubernetes_injected_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTD_PORT", "tcp://10.96.0.7:8000")
    with pytest.raises(SettingsError, match=r"^LATENTD_PORT: .*enableServiceLinks"):
        load_settings({})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("prot = 1", r"prot in .*: no such option \(did you mean port\?\)"),
        ("port = ", "is not valid TOML"),
        (None, "cannot read"),
    ],
)
def test_a_bad_config_file_is_refused(tmp_path: Path, text: str | None, reason: str) -> None:
    file = tmp_path / "latentd.toml"
    if text is not None:
        write(file, text)
    with pytest.raises(SettingsError, match=reason):
        load_settings({}, file)


def test_a_misspelt_variable_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTD_PROT", "9000")
    monkeypatch.setenv("LATENTD_CONFIG", "/some/file")
    monkeypatch.setenv("LATENTD_FOO", "1")
    assert unknown_environment() == [
        "LATENTD_FOO is not an option and is ignored",
        "LATENTD_PROT is not an option and is ignored (did you mean LATENTD_PORT?)",
    ]


def test_keys_of_file_and_environment_add_up_and_never_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "keys", "# of the team\nfrom-file\n\n  padded  \n")
    monkeypatch.setenv("LATENTD_API_KEY", "from-environment")
    settings = load_settings({"api_key_file": str(file)})
    assert settings.api_key == ("from-environment", "from-file", "padded")
    assert "from-" not in repr(settings) + str(settings.shown())


@pytest.mark.parametrize("content", ["", "# only a comment\n", "two words\n", "schlüssel\n"])
def test_a_key_file_without_usable_keys_does_not_open_the_server(tmp_path: Path, content: str) -> None:
    file = write(tmp_path / "keys", content)
    with pytest.raises(SettingsError, match=r"^--api-key-file: ") as caught:
        load_settings({"api_key_file": str(file)})
    assert "words" not in str(caught.value)
    assert "schl" not in str(caught.value)


def test_a_bad_key_is_not_repeated() -> None:
    with pytest.raises(SettingsError, match=r"^--api-key: a key must be printable") as caught:
        load_settings({"api_key": ["sec ret"]})
    assert "sec" not in str(caught.value)


def test_flags_are_spelt_as_vllm_users_know_them() -> None:
    expected = "--host --port --served-model-name --api-key --device --dtype --max-model-len --max-num-seqs"
    expected += " --max-num-batched-tokens --num-blocks --kv-cache-memory --no-prefix-cache --seed --log-level"
    assert set(expected.split()) <= {flag_of(name) for name in Settings.model_fields}


@pytest.mark.parametrize(
    ("text", "size"),
    [("17", 17), ("4GiB", 4 << 30), ("512MB", 512_000_000), ("1.5 KiB", 1536), ("2tib", 2 << 40), ("7b", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "4G", "1e9", "4 GiB x", "∞"])
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


def test_sizes_and_counts_as_people_read_them() -> None:
    assert [format_size(n) for n in (0, 1023, 1536, 5 << 30, 3 << 40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.0 GiB",
        "3.0 TiB",
    ]
    assert [format_count(n) for n in (999, 1_510_000, 15_700_000_000)] == ["999", "1.51 M", "15.7 B"]


def test_the_admin_key_is_a_secret_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTD_ADMIN_KEY", "the-admin-key")
    settings = load_settings({"api_key": ["one"]})
    assert settings.admin_key == "the-admin-key"
    assert "the-admin" not in repr(settings) + str(settings.shown())
    with pytest.raises(SettingsError, match=r"^LATENTD_ADMIN_KEY: must not be one of the API keys$"):
        load_settings({"api_key": ["the-admin-key"]})
    with pytest.raises(SettingsError, match=r"^--admin-key: a key must be printable") as caught:
        load_settings({"admin_key": "sec ret"})
    assert "sec" not in str(caught.value)
