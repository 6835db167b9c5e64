"""Every setting of the service, from the environment (`SIDREC_*`). Built once in the command line, then passed on."""

import ipaddress
import re
import string
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

_TENANT = re.compile("[a-z0-9-]{1,32}")


class Settings(BaseSettings):
    """Settings with their defaults; a laptop needs none of them."""

    model_config = SettingsConfigDict(
        env_prefix="SIDREC_",
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,  # it may be a key in place of its hash
    )

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65_535)
    api_key_hashes: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="sha256[:tenant] (hex, comma-separated) of the keys accepted in x-api-key; none: loopback only",
    )

    admin_key_hashes: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="the same for keys that may also administer: activate bundles, change items and experiments"
    )

    bundles: Path = Field(Path("runs/demo/bundles"), description="folder of bundles, with its `current` pointer")

    follow_bundles_s: float = Field(2.0, gt=0, description="how often `current` is looked at for another bundle")

    catalog_cache: Path | None = Field(
        None, description="folder of catalogues with live changes worked in; absent: `.merged` in that of the bundles"
    )

    redis_url: str | None = Field(
        None,
        pattern="^(redis|rediss|unix)://",
        description="of the histories; absent: an embedded Redis in data_dir",
    )
    redis_timeout_s: float = Field(1.0, gt=0)
    redis_max_connections: int = Field(64, ge=2)
    data_dir: Path = Field(Path("runs/demo/redis"), description="the embedded Redis keeps its append-only file here")
    history_max_stored: int = Field(1_000, ge=1, le=5_000, description="history entries kept per user")
    history_ttl_days: int | None = Field(None, ge=1, description="a user without events for so long is forgotten")

    engine: Literal["local", "vllm", "auto"] = Field("local", description="auto: vLLM if installed and able to run it")
    beam_width: int = Field(20, ge=1, le=500, description="width is the larger of this and num_items")
    max_batch: int = Field(32, ge=1)
    decode_threads: int = Field(1, ge=1)
    dtype: Literal["float32", "bfloat16"] = "float32"
    prompt_cache_mb: int = Field(
        128,
        ge=0,
        description="prompts that the local engine keeps run, so that who comes back is answered sooner; 0: none",
    )
    vllm_replicas: int = Field(1, ge=1, le=64, description="processes of the vLLM engine; on CPUs each uses one core")
    vllm_kv_cache_gib: float = Field(1.0, gt=0, description="KV cache of one replica, on CPUs")
    vllm_args: dict[str, Any] = Field({}, description="further engine arguments of vLLM's, as a JSON object")
    experiments: Path | None = Field(
        None, description="YAML file of the A/B tests; absent: what the admin API was told"
    )
    follow_experiments_s: float = Field(2.0, gt=0, description="how often the experiments are looked at for a change")
    think_max_tokens: int = Field(128, ge=1, le=4_096, description="most tokens of one thought")
    think_max_seconds: float = Field(
        2.0, gt=0, le=60, description="longest thought; a request's deadline may cut it shorter"
    )
    thought_cache_ttl_s: float = Field(
        86_400.0, ge=0, le=31_536_000, allow_inf_nan=False, description="how long a thought is used again; 0: never"
    )
    think_ahead: bool = Field(False, description="let Celery's `think` worker think before it is asked to")
    max_in_flight: int = Field(256, ge=1, description="requests answered at once; more are shed with 503")
    breaker_failures: int = Field(5, ge=1, description="failures of the engine running after which it is left alone")
    breaker_open_s: float = Field(2.0, gt=0, description="how long the engine is left alone before it is tried again")
    redis_breaker_failures: int = Field(10, ge=1, description="the same for Redis")
    redis_breaker_open_s: float = Field(1.0, gt=0, description="the same for Redis")
    answer_cache_size: int = Field(10_000, ge=0, description="users whose last answer of the model is kept")
    answer_cache_ttl_s: float = Field(3_600.0, gt=0, description="how old such an answer may be")

    served_log_length: int = Field(
        0, ge=0, description="answers of /recommend kept with their propensities, for off-policy evaluation; 0: none"
    )
    served_log_days: int = Field(30, ge=1, description="how long they are kept at most")

    rate_limit_per_s: float = Field(
        0.0, ge=0, le=1e6, allow_inf_nan=False, description="requests a second of one API key, then 429; 0: no limit"
    )
    rate_limit_burst: int = Field(20, ge=1, le=1_000_000, description="requests that one key may send at once")
    max_body_bytes: int = Field(1_048_576, ge=1_024, description="longer bodies get 413")
    body_timeout_s: float = Field(10.0, gt=0, le=600, description="a body that has not come whole by then gets 408")

    celery_broker_url: str = "redis://127.0.0.1:6379/1"
    celery_result_url: str = "redis://127.0.0.1:6379/2"

    otlp_endpoint: str | None = Field(
        None, pattern="^https?://", description="of an OpenTelemetry collector (OTLP over HTTP); absent: no traces"
    )

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    request_log: bool = Field(False, description="a line in the log for each request: route, status, times, id")
    log_format: Literal["json", "console"] = "json"

    @property
    def history_ttl_s(self) -> int | None:
        """`history_ttl_days` in seconds."""
        return self.history_ttl_days * 86_400 if self.history_ttl_days else None

    @field_validator("api_key_hashes", "admin_key_hashes", mode="before")
    @classmethod
    def _split_hashes(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        records = (part.strip().partition(":") for part in value.split(",") if part.strip())
        return tuple(digest.lower() + colon + tenant for digest, colon, tenant in records)

    @field_validator("api_key_hashes", "admin_key_hashes")
    @classmethod
    def _are_hashes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for digest, colon, tenant in (one.partition(":") for one in value):
            if len(digest) != 64 or set(digest) - set(string.hexdigits):
                raise ValueError("each must be the 64 hex digits of a sha256: make one with `sidrec-serve hash-key`")
            if colon and not is_tenant(tenant):
                raise ValueError(
                    f"the tenant {tenant!r} after a hash must be 1 to 32 of a-z, 0-9 and -: <sha256>:<tenant>, or "
                    "<sha256> alone for the tenant 'default'"
                )
        return value

    @field_validator("log_level", mode="before")
    @classmethod
    def _lower(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_tenant_per_key(self) -> Self:
        tenants: dict[str, str] = {}
        for digest, _, tenant in (one.partition(":") for one in self.api_key_hashes + self.admin_key_hashes):
            named = tenant or "default"
            if tenants.setdefault(digest, named) != named:
                raise ValueError(
                    f"the key {digest[:12]}… has two tenants, {tenants[digest]!r} and {named!r}: a key belongs to one"
                )
        return self

    @model_validator(mode="after")
    def _keys_or_loopback(self) -> Self:
        if not self.api_key_hashes and not _is_loopback(self.host):
            raise ValueError(
                f"without API keys the service binds to loopback only, and host is {self.host!r}: set "
                "SIDREC_API_KEY_HASHES (make one with `sidrec-serve hash-key`), or SIDREC_HOST=127.0.0.1"
            )
        return self


def is_tenant(name: str) -> bool:
    """Whether a tenant may be called so."""
    return _TENANT.fullmatch(name) is not None


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
