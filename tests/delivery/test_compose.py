"""docker-compose.yml: valid by the specification's schema, hardened, and closed without an API key."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.delivery.files import COMPOSE, DOCKERFILE, ROOT, compose_services, prometheus

SERVICES = compose_services()
services = pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES)


def check_schema(path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_it_is_valid_by_the_schema() -> None:
    run = check_schema(COMPOSE)
    assert run.returncode == 0, run.stdout


def test_the_schema_refuses_a_misspelt_key(tmp_path: Path) -> None:
    broken = tmp_path / "docker-compose.yml"
    broken.write_text(COMPOSE.read_text().replace("restart:", "restrat:"))
    assert check_schema(broken).returncode == 1


def test_it_holds_the_online_half() -> None:
    assert set(SERVICES) == {"redis", "api", "worker", "prometheus"}


@services
def test_a_service_is_hardened(service: dict[str, Any]) -> None:
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", service["user"])
    assert "privileged" not in service


@services
def test_a_service_is_bounded_and_comes_back(service: dict[str, Any]) -> None:
    assert service["mem_limit"]
    assert service["pids_limit"]
    assert service["restart"] == "unless-stopped"


@services
def test_an_image_has_a_version(service: dict[str, Any]) -> None:
    name, _, tag = service["image"].partition(":")
    assert name
    assert tag not in {"", "latest"}


@services
def test_ports_are_published_on_loopback_by_default(service: dict[str, Any]) -> None:
    for port in service.get("ports", []):
        assert re.match(r"(127\.0\.0\.1|\$\{BIND_ADDRESS:-127\.0\.0\.1\}):", port)


def test_only_api_and_prometheus_are_published() -> None:
    assert {name for name, service in SERVICES.items() if "ports" in service} == {"api", "prometheus"}
    assert SERVICES["redis"]["networks"] == SERVICES["worker"]["networks"] == ["backend"]


def test_the_api_does_not_start_without_a_key() -> None:
    value = SERVICES["api"]["environment"]["SIDREC_API_KEY_HASHES"]
    message = re.fullmatch(r"\$\{SIDREC_API_KEY_HASHES:\?(.+)\}", value)
    assert message
    assert "hash-key" in message[1]
    assert "SIDREC_API_KEY_HASHES" not in SERVICES["worker"]["environment"]


@pytest.mark.parametrize("name", ["api", "worker"])
def test_bundles_are_read_only_and_where_the_settings_say(name: str) -> None:
    (volume,) = (each for each in SERVICES[name]["volumes"] if each["type"] == "bind")
    assert volume["source"] == "${SIDREC_BUNDLES_DIR:-./runs/demo/bundles}"
    assert volume["read_only"] is True
    assert volume["target"] == SERVICES[name]["environment"]["SIDREC_BUNDLES"]


@pytest.mark.parametrize("name", ["api", "worker"])
def test_build_targets_exist(name: str) -> None:
    build = SERVICES[name]["build"]
    assert (ROOT / build["context"] / build["dockerfile"]).exists()
    assert build["target"] in DOCKERFILE.stages
    assert set(build["args"]) == {"TORCH_BACKEND"} | ({"ENGINE_EXTRA"} if name == "api" else set())


@services
def test_dependencies_wait_for_what_can_be_waited_for(service: dict[str, Any]) -> None:
    for name, dependency in service.get("depends_on", {}).items():
        if dependency["condition"] == "service_healthy":
            assert "healthcheck" in SERVICES[name]


@pytest.mark.parametrize("name", ["api", "worker"])
def test_redis_is_healthy_before_its_clients_start(name: str) -> None:
    assert SERVICES[name]["depends_on"]["redis"]["condition"] == "service_healthy"


def test_prometheus_scrapes_services_that_exist() -> None:
    names = {urlless.partition(":")[0] for job in prometheus()["scrape_configs"] for urlless in targets(job)}
    assert names == {"api", "127.0.0.1"}


def test_prometheus_reads_the_mounted_file_and_forgets() -> None:
    command = SERVICES["prometheus"]["command"]
    mount = SERVICES["prometheus"]["volumes"][0]
    assert f"--config.file={mount['target']}" in command
    assert mount["read_only"] is True
    assert (ROOT / mount["source"]).exists()
    assert any(flag.startswith("--storage.tsdb.retention.time=") for flag in command)
    assert any(flag.startswith("--storage.tsdb.retention.size=") for flag in command)


def test_prometheus_times_out_within_its_interval() -> None:
    times = {
        name: int(prometheus()["global"][name].removesuffix("s")) for name in ("scrape_interval", "scrape_timeout")
    }
    assert times["scrape_timeout"] <= times["scrape_interval"]
    names = [job["job_name"] for job in prometheus()["scrape_configs"]]
    assert len(names) == len(set(names))


def targets(job: dict[str, Any]) -> list[str]:
    return [target for group in job["static_configs"] for target in group["targets"]]
