"""Every setting of the service, from the environment (`SIDREC_*`). Built once in the command line, then passed on."""

import ipaddress
import string
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


class Settings(BaseSettings):
    """Settings with their defaults; a laptop needs none of them."""

    model_config = SettingsConfigDict(env_prefix="SIDREC_", frozen=True, extra="forbid")

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65_535)
    api_key_hashes: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="sha256 (hex, comma-separated) of the keys accepted in x-api-key; none: loopback only"
    )

    admin_key_hashes: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="the same for keys that may also administer: activate bundles, change items and experiments"
    )

    bundles: Path = Field(Path("runs/demo/bundles"), description="folder of bundles, with its `current` pointer")

    follow_bundles_s: float = Field(2.0, gt=0, description="how often `current` is looked at for another bundle")

    redis_url: str | None = Field(
        None,
        pattern="^(redis|rediss|unix)://",
        description="of the histories; absent: an embedded Redis in data_dir",
    )
    redis_timeout_s: float = Field(1.0, gt=0)
    redis_max_connections: int = Field(64, ge=1)
    data_dir: Path = Field(Path("runs/demo/redis"), description="the embedded Redis keeps its append-only file here")
    history_max_stored: int = Field(1_000, ge=1, le=5_000, description="history entries kept per user")
    history_ttl_days: int | None = Field(None, ge=1, description="a user without events for so long is forgotten")

    engine: Literal["local", "vllm", "auto"] = Field("local", description="auto: vLLM where it is installed")
    beam_width: int = Field(20, ge=1, le=500, description="width is the larger of this and num_items")
    max_batch: int = Field(16, ge=1)
    decode_threads: int = Field(1, ge=1)
    dtype: Literal["float32", "bfloat16"] = "float32"
    vllm_replicas: int = Field(1, ge=1, le=64, description="processes of the vLLM engine; on CPUs each uses one core")
    vllm_kv_cache_gib: float = Field(1.0, gt=0, description="KV cache of one replica, on CPUs")
    vllm_args: dict[str, Any] = Field({}, description="further engine arguments of vLLM's, as a JSON object")
    think_max_tokens: int = Field(128, ge=1, le=4_096, description="most tokens of one thought")
    think_max_seconds: float = Field(
        2.0, gt=0, le=60, description="longest thought; a request's deadline may cut it shorter"
    )
    max_in_flight: int = Field(256, ge=1, description="requests answered at once; more are shed with 503")

    celery_broker_url: str = "redis://127.0.0.1:6379/1"
    celery_result_url: str = "redis://127.0.0.1:6379/2"

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["json", "console"] = "json"

    @property
    def history_ttl_s(self) -> int | None:
        """`history_ttl_days` in seconds."""
        return self.history_ttl_days * 86_400 if self.history_ttl_days else None

    @field_validator("api_key_hashes", "admin_key_hashes", mode="before")
    @classmethod
    def _split_hashes(cls, value: object) -> object:
        return (
            tuple(part.strip().lower() for part in value.split(",") if part.strip())
            if isinstance(value, str)
            else value
        )

    @field_validator("api_key_hashes", "admin_key_hashes")
    @classmethod
    def _are_hashes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any(len(one) != 64 or set(one) - set(string.hexdigits) for one in value):
            raise ValueError("each must be the 64 hex digits of a sha256: make one with `sidrec-serve hash-key`")
        return value

    @field_validator("log_level", mode="before")
    @classmethod
    def _lower(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value

    @model_validator(mode="after")
    def _keys_or_loopback(self) -> Self:
        if not self.api_key_hashes and not _is_loopback(self.host):
            raise ValueError(
                f"without API keys the service binds to loopback only, and host is {self.host!r}: set "
                "SIDREC_API_KEY_HASHES (make one with `sidrec-serve hash-key`), or SIDREC_HOST=127.0.0.1"
            )
        return self


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
