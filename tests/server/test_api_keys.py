from __future__ import annotations

from pathlib import Path

import pytest

from server.api_keys import ApiKey, KeyLimits, parse_key
from server.settings import SettingsError, load_settings


def test_limits_behind_a_key() -> None:
    assert parse_key("k") == ApiKey("k")
    assert parse_key("k  requests_per_minute=60 tokens_per_minute=100000 concurrent_requests=8") == ApiKey(
        "k", KeyLimits(8, 60, 100_000)
    )


@pytest.mark.parametrize(
    "entry",
    [
        "secret requests=5",
        "secret requests_per_minute",
        "secret requests_per_minute=",
        "secret requests_per_minute=0",
        "secret requests_per_minute=-1",
        "secret requests_per_minute=1.5",
        "secret requests_per_minute=٣",
        "secret requests_per_minute=99999999999",
        "secret requests_per_minute=5 requests_per_minute=6",
        "sécret",
    ],
)
def test_what_is_no_entry(entry: str) -> None:
    with pytest.raises(ValueError, match="a key") as caught:
        parse_key(entry)
    assert "cret" not in str(caught.value)


def test_entries_of_file_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("# for the team\nteam requests_per_minute=6\nplain\n")
    monkeypatch.setenv("LATENTD_API_KEY", "other tokens_per_minute=7,more")
    settings = load_settings({"api_key_file": str(file)})
    assert [(each.key, each.limits) for each in settings.keys] == [
        ("other", KeyLimits(tokens_per_minute=7)),
        ("more", KeyLimits()),
        ("team", KeyLimits(requests_per_minute=6)),
        ("plain", KeyLimits()),
    ]
    assert "team" not in str(settings.shown()) + repr(settings) + repr(settings.keys)
    with pytest.raises(SettingsError, match="must not be one of the API keys"):
        load_settings({"api_key_file": str(file), "admin_key": "team"})
