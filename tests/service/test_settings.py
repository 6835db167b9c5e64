"""Settings: from the environment, checked when they are read."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from service.security import hash_key
from service.settings import Settings

HASH = hash_key("secret")


def test_a_laptop_needs_none():
    settings = Settings()
    assert (settings.host, settings.port, settings.redis_url) == ("127.0.0.1", 8000, None)
    assert settings.api_key_hashes == ()


def test_they_come_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SIDREC_BUNDLES", "/srv/bundles")
    monkeypatch.setenv("SIDREC_PORT", "9000")
    monkeypatch.setenv("SIDREC_LOG_LEVEL", "WARNING")
    monkeypatch.setenv("SIDREC_API_KEY_HASHES", f" {HASH.upper()} ,{hash_key('other')},")
    settings = Settings()
    assert settings.bundles == Path("/srv/bundles")
    assert (settings.port, settings.log_level) == (9000, "warning")
    assert settings.api_key_hashes == (HASH, hash_key("other"))


def test_a_key_may_belong_to_a_tenant(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SIDREC_API_KEY_HASHES", f"{HASH.upper()}:shop-1, {hash_key('other')}")
    monkeypatch.setenv("SIDREC_ADMIN_KEY_HASHES", f"{HASH}:shop-1")
    settings = Settings()
    assert settings.api_key_hashes == (f"{HASH}:shop-1", hash_key("other"))
    assert settings.admin_key_hashes == (f"{HASH}:shop-1",)


@pytest.mark.parametrize("tenant", ["", "Shop", "shop 1", "shop_1", "x" * 33, "a:b", "é", "shop\n", "{a}"])
def test_a_tenant_of_another_form_is_refused(tenant: str):
    with pytest.raises(ValidationError, match=r"1 to 32 of a-z, 0-9 and -"):
        Settings(api_key_hashes=(f"{HASH}:{tenant}",))


def test_a_key_belongs_to_one_tenant(monkeypatch: pytest.MonkeyPatch):
    for callers, admins in ((f"{HASH}:a,{HASH}:b", ""), (f"{HASH}:a", HASH)):
        monkeypatch.setenv("SIDREC_API_KEY_HASHES", callers)
        monkeypatch.setenv("SIDREC_ADMIN_KEY_HASHES", admins)
        with pytest.raises(ValidationError, match=r"has two tenants, 'a' and '(b|default)'"):
            Settings()


def test_an_error_does_not_repeat_what_may_be_a_key():
    with pytest.raises(ValidationError) as refusal:
        Settings(api_key_hashes=("my-secret-key",))
    assert "my-secret-key" not in str(refusal.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1"])
def test_loopback_needs_no_key(host: str):
    assert Settings(host=host).host == host


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.org", "", "127.0.0.1.example.org"])
def test_any_other_host_needs_one(host: str):
    with pytest.raises(ValidationError, match=r"loopback only.*SIDREC_API_KEY_HASHES.*hash-key.*SIDREC_HOST"):
        Settings(host=host)
    assert Settings(host=host, api_key_hashes=(HASH,)).host == host


@pytest.mark.parametrize("hashes", ["secret", HASH[:-1], f"{HASH}0", "g" * 64, f"{HASH},secret"])
def test_a_key_in_place_of_its_hash_is_refused(monkeypatch: pytest.MonkeyPatch, hashes: str):
    monkeypatch.setenv("SIDREC_API_KEY_HASHES", hashes)
    with pytest.raises(ValidationError, match="64 hex digits of a sha256"):
        Settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "70000"),
        ("PORT", "http"),
        ("BEAM_WIDTH", "0"),
        ("BEAM_WIDTH", "501"),
        ("MAX_BATCH", "0"),
        ("PROMPT_CACHE_MB", "-1"),
        ("MAX_IN_FLIGHT", "0"),
        ("BREAKER_FAILURES", "0"),
        ("REDIS_BREAKER_OPEN_S", "0"),
        ("ANSWER_CACHE_SIZE", "-1"),
        ("MAX_BODY_BYTES", "1023"),
        ("BODY_TIMEOUT_S", "0"),
        ("RATE_LIMIT_PER_S", "-1"),
        ("RATE_LIMIT_PER_S", "inf"),
        ("RATE_LIMIT_PER_S", "nan"),
        ("RATE_LIMIT_BURST", "0"),
        ("THINK_MAX_TOKENS", "0"),
        ("THINK_MAX_TOKENS", "4097"),
        ("THINK_MAX_SECONDS", "0"),
        ("THINK_MAX_SECONDS", "61"),
        ("REDIS_TIMEOUT_S", "0"),
        ("REDIS_URL", "127.0.0.1:6379"),
        ("HISTORY_MAX_STORED", "5001"),
        ("HISTORY_TTL_DAYS", "0"),
        ("ENGINE", "remote"),
        ("DTYPE", "float16"),
        ("LOG_LEVEL", "loud"),
        ("LOG_FORMAT", "xml"),
    ],
)
def test_a_value_out_of_bounds_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str, value: str):
    monkeypatch.setenv(f"SIDREC_{name}", value)
    with pytest.raises(ValidationError) as refusal:
        Settings()
    assert [error["loc"] for error in refusal.value.errors()] == [(name.lower(),)]


def test_an_unknown_setting_is_refused():
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        Settings(beam_with=20)  # type: ignore[call-arg]


def test_settings_do_not_change():
    with pytest.raises(ValidationError, match="frozen"):
        Settings().port = 1  # type: ignore[misc]
