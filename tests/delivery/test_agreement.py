"""What several delivery files say, they say alike: settings, ports, paths, users, versions, Redis' promise."""

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.delivery.files import (
    COMPOSE,
    DOCKERFILE,
    ROOT,
    compose_services,
    compose_volumes,
    container,
    kubernetes_documents,
    kustomization,
    literal_environment,
    pod,
    prometheus,
    pyproject,
    settings_env,
    volumes_by_mount,
    workloads,
)

SETTINGS = {
    "SIDREC_API_KEY_HASHES",
    "SIDREC_BUNDLES",
    "SIDREC_CATALOG_CACHE",
    "SIDREC_CELERY_BROKER_URL",
    "SIDREC_CELERY_RESULT_URL",
    "SIDREC_DATA_DIR",
    "SIDREC_ENGINE",
    "SIDREC_HOST",
    "SIDREC_LOG_LEVEL",
    "SIDREC_PORT",
    "SIDREC_REDIS_URL",
    "SIDREC_THINK_AHEAD",
    "SIDREC_THINK_MAX_TOKENS",
    "SIDREC_VLLM_REPLICAS",
}
"""Every setting of the service that a delivery file names."""

COMPOSE_ONLY = {"SIDREC_BUNDLES_DIR"}
"""Filled in by docker compose on the host; no container sees it."""

EPOCH_BYTES = 12_300_000
"""What `Catalog.save_trie` writes of a million items; the engine keeps it in the temporary folder."""
MERGED_BYTES = 150_000_000
"""A merged catalogue of a million items."""

PORT = 8000
COMPOSE_SERVICES = compose_services()
WORKLOADS = workloads()
API = WORKLOADS["Deployment/sidrec-api"]
WORKER = WORKLOADS["Deployment/sidrec-worker"]


def delivery_files() -> list[Path]:
    folders = [path for folder in ("docker", "k8s") for path in (ROOT / folder).rglob("*") if path.is_file()]
    return [COMPOSE, *(path for path in folders if "__pycache__" not in path.parts)]


def environments() -> dict[str, dict[str, str]]:
    """The SIDREC_* environment of each container as it would be, compose's variables at their defaults."""
    hashes = {"SIDREC_API_KEY_HASHES": "0" * 64}
    in_image = {target: DOCKERFILE.environment(target) for target in ("api", "worker")}
    in_compose = {
        target: {
            name: re.sub(r"\$\{\w+:-(.*)\}", r"\1", str(value))
            for name, value in COMPOSE_SERVICES[target]["environment"].items()
        }
        for target in ("api", "worker")
    }
    everything = {
        "compose api": in_image["api"] | in_compose["api"] | hashes,
        "compose worker": in_image["worker"] | in_compose["worker"],
        "k8s api": in_image["api"] | settings_env() | literal_environment(API) | hashes,
        "k8s worker": in_image["worker"] | settings_env() | literal_environment(WORKER),
    }
    return {
        place: {name: value for name, value in environment.items() if name.startswith("SIDREC_")}
        for place, environment in everything.items()
    }


ENVIRONMENTS = environments()


def test_every_sidrec_variable_is_listed() -> None:
    used = {name for path in delivery_files() for name in re.findall(r"SIDREC_[A-Z0-9_]*[A-Z0-9]", path.read_text())}
    assert used == SETTINGS | COMPOSE_ONLY


def test_every_listed_variable_is_a_setting_of_the_service() -> None:
    from service.settings import Settings

    assert Settings.model_config["env_prefix"] == "SIDREC_"
    fields = {f"SIDREC_{name.upper()}" for name in Settings.model_fields}
    assert fields >= SETTINGS
    assert not COMPOSE_ONLY & fields


@pytest.mark.parametrize("environment", ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def test_the_service_accepts_the_environment_it_is_given(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from service.settings import Settings

    for name in [name for name in os.environ if name.startswith("SIDREC_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert str(settings.bundles) == "/bundles"


@pytest.mark.parametrize("environment", ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def test_celery_has_databases_of_its_own(environment: dict[str, str]) -> None:
    names = ("SIDREC_REDIS_URL", "SIDREC_CELERY_BROKER_URL", "SIDREC_CELERY_RESULT_URL")
    urls = [urlsplit(environment[name]) for name in names]
    assert len({url.path for url in urls}) == 3
    assert len({url.netloc for url in urls}) == 1


def test_compose_and_kubernetes_set_the_same_variables() -> None:
    assert set(ENVIRONMENTS["compose api"]) == set(ENVIRONMENTS["k8s api"])
    assert set(ENVIRONMENTS["compose worker"]) == set(ENVIRONMENTS["k8s worker"])


@pytest.mark.parametrize("name", ["SIDREC_THINK_AHEAD", "SIDREC_THINK_MAX_TOKENS"])
def test_thinking_ahead_is_set_once_for_api_and_worker_and_off_by_default(name: str) -> None:
    from service.settings import Settings

    default = Settings.model_fields[name.removeprefix("SIDREC_").lower()].default
    assert {environment[name] for environment in ENVIRONMENTS.values()} == {str(default).lower()}
    for service in ("api", "worker"):
        assert COMPOSE_SERVICES[service]["environment"][name] == f"${{{name}:-{str(default).lower()}}}"
    for workload in (API, WORKER):
        assert name not in literal_environment(workload)


def test_the_worker_decodes_with_what_its_image_has_whatever_the_api_is_told() -> None:
    assert COMPOSE_SERVICES["api"]["environment"]["SIDREC_ENGINE"] == "${SIDREC_ENGINE:-local}"
    assert COMPOSE_SERVICES["worker"]["environment"]["SIDREC_ENGINE"] == "local"
    assert "SIDREC_ENGINE" not in literal_environment(API)
    assert literal_environment(WORKER)["SIDREC_ENGINE"] == "local"


def test_the_worker_runs_the_images_command() -> None:
    assert not {"command", "entrypoint"} & COMPOSE_SERVICES["worker"].keys()
    assert not {"command", "args"} & container(WORKER).keys()


@pytest.mark.parametrize(("target", "workload"), [("api", API), ("worker", WORKER)], ids=["api", "worker"])
def test_merged_catalogues_go_where_the_images_user_may_write(target: str, workload: dict[str, object]) -> None:
    (folder,) = {each["SIDREC_CATALOG_CACHE"] for each in ENVIRONMENTS.values()}
    user, group = COMPOSE_SERVICES[target]["user"].split(":")
    made = [each.words for each in DOCKERFILE.image(target)[1] if each.value.startswith("install --directory")]
    assert any(folder in words and {f"--owner={user}", f"--group={group}"} <= set(words) for words in made)
    (volume,) = (each for each in COMPOSE_SERVICES[target]["volumes"] if each["target"] == folder)
    assert (volume["type"], volume.get("read_only", False)) == ("volume", False)
    assert volume["source"] in compose_volumes()
    mount = volumes_by_mount(workload)[folder]
    assert not mount.get("readOnly", False)
    assert num_bytes(mount["emptyDir"]["sizeLimit"]) >= 2 * MERGED_BYTES, (
        "the next one is written beside the one before"
    )


@pytest.mark.parametrize(("target", "workload"), [("api", API), ("worker", WORKER)], ids=["api", "worker"])
def test_the_temporary_folder_takes_the_engines_socket_and_the_apis_epochs(
    target: str, workload: dict[str, object]
) -> None:
    """Two engines while a bundle is activated, each with as many epochs as may live, and one that is being written."""
    from service.deployments import _MAX_EPOCHS

    set_elsewhere = DOCKERFILE.environment(target) | COMPOSE_SERVICES[target]["environment"] | settings_env()
    assert "TMPDIR" not in set_elsewhere
    (tmpfs,) = COMPOSE_SERVICES[target]["tmpfs"]
    path, size = re.fullmatch(r"(\S+):size=(\w+),mode=1777", tmpfs).groups()  # type: ignore[union-attr]
    assert path == "/tmp"
    sizes = num_bytes(size), num_bytes(volumes_by_mount(workload)[path]["emptyDir"]["sizeLimit"])
    assert min(sizes) >= (2 * (_MAX_EPOCHS + 1) * EPOCH_BYTES if target == "api" else 1 << 20)


@pytest.mark.parametrize(("target", "workload"), [("api", API), ("worker", WORKER)], ids=["api", "worker"])
def test_memory_holds_what_the_documentation_says(target: str, workload: dict[str, object]) -> None:
    default = re.fullmatch(r"\$\{\w+:-(\w+)\}", COMPOSE_SERVICES[target]["mem_limit"])
    assert default
    assert num_bytes(default[1]) == num_bytes(container(workload)["resources"]["limits"]["memory"]) == 2 << 30
    assert f"`mem_limit: {default[1]}`" in (ROOT / "docs" / "deployment.md").read_text()


def test_the_api_listens_where_everyone_looks() -> None:
    image = DOCKERFILE.environment("api")
    exposed = [each.value for each in DOCKERFILE.stages["api"].instructions if each.name == "EXPOSE"]
    annotations = API["spec"]["template"]["metadata"]["annotations"]
    (published,) = COMPOSE_SERVICES["api"]["ports"]
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in prometheus()["scrape_configs"]}
    assert image["SIDREC_HOST"] == "0.0.0.0"
    assert image["SIDREC_PORT"] == str(PORT)
    assert exposed == [str(PORT)]
    assert published.endswith(f":{PORT}")
    assert targets["sidrec-api"] == [f"api:{PORT}"]
    assert container(API)["ports"] == [{"name": "http", "containerPort": PORT}]
    assert annotations["prometheus.io/port"] == str(PORT)


def test_metrics_are_at_one_path() -> None:
    (job,) = (each for each in prometheus()["scrape_configs"] if each["job_name"] == "sidrec-api")
    annotations = API["spec"]["template"]["metadata"]["annotations"]
    assert job["metrics_path"] == annotations["prometheus.io/path"] == "/metrics"
    assert annotations["prometheus.io/scrape"] == "true"


def test_a_restart_hangs_on_live_and_traffic_on_ready() -> None:
    (image_check,) = (each for each in DOCKERFILE.stages["api"].instructions if each.name == "HEALTHCHECK")
    assert "'/health/live'" in image_check.value
    assert "'/health/ready'" in COMPOSE_SERVICES["api"]["healthcheck"]["test"][-1]
    probes = {name: container(API)[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")}
    assert probes == {"startup": "/health/live", "liveness": "/health/live", "readiness": "/health/ready"}


def test_redis_is_named_where_it_is() -> None:
    assert urlsplit(ENVIRONMENTS["compose api"]["SIDREC_REDIS_URL"]).hostname in COMPOSE_SERVICES
    url = urlsplit(ENVIRONMENTS["k8s api"]["SIDREC_REDIS_URL"])
    (port,) = kubernetes_documents("Service")[f"Service/{url.hostname}"]["spec"]["ports"]
    assert url.port == port["port"]


def test_redis_keeps_its_promise_everywhere() -> None:
    """An acknowledged event survives a kill; a full memory refuses, below the limit at which the kernel would kill."""
    in_kubernetes = container(WORKLOADS["StatefulSet/sidrec-redis"])
    compose, kubernetes = redis_options(COMPOSE_SERVICES["redis"]["command"]), redis_options(in_kubernetes["args"])
    promise = {"--appendonly": "yes", "--appendfsync": "always", "--save": "", "--maxmemory-policy": "noeviction"}
    assert promise.items() <= compose.items()
    assert promise.items() <= kubernetes.items()
    assert num_bytes(compose["--maxmemory"]) < 0.7 * num_bytes(COMPOSE_SERVICES["redis"]["mem_limit"])
    assert num_bytes(kubernetes["--maxmemory"]) < 0.7 * num_bytes(in_kubernetes["resources"]["limits"]["memory"])
    assert COMPOSE_SERVICES["redis"]["volumes"] == ["redis-data:/data"]
    assert [mount["mountPath"] for mount in in_kubernetes["volumeMounts"]] == ["/data"]


@pytest.mark.parametrize(("target", "workload"), [("api", API), ("worker", WORKER)], ids=["api", "worker"])
def test_a_container_runs_as_the_images_user(target: str, workload: dict[str, object]) -> None:
    user = [each.value for each in DOCKERFILE.image(target)[1] if each.name == "USER"][-1]
    context = pod(workload)["securityContext"]
    assert COMPOSE_SERVICES[target]["user"] == f"{context['runAsUser']}:{context['runAsGroup']}" == user


def test_redis_runs_as_one_user_and_version() -> None:
    context = pod(WORKLOADS["StatefulSet/sidrec-redis"])["securityContext"]
    assert COMPOSE_SERVICES["redis"]["user"] == f"{context['runAsUser']}:{context['runAsGroup']}"
    assert COMPOSE_SERVICES["redis"]["image"] == f"redis:{image_tags()['redis']}"


def test_images_carry_the_packages_version() -> None:
    version = pyproject()["project"]["version"]
    defaults = {each.value for stage in DOCKERFILE.stages.values() for each in stage.instructions if each.name == "ARG"}
    assert f"VERSION={version}" in defaults
    for name in ("api", "worker"):
        assert COMPOSE_SERVICES[name]["image"] == f"sidrec-{name}:{version}"
        assert image_tags()[f"sidrec-{name}"] == version


def image_tags() -> dict[str, str]:
    return {each["name"]: each["newTag"] for each in kustomization()["images"]}


def redis_options(words: list[str]) -> dict[str, str]:
    server, *options = words
    assert server == "redis-server"
    return dict(zip(options[::2], options[1::2], strict=True))


def num_bytes(size: str) -> int:
    """Redis' `1gb`, compose's `1g` and Kubernetes' `1Gi` are all powers of 1024."""
    match = re.fullmatch(r"(\d+)([mg])[bi]?", size.lower())
    assert match, size
    return int(match[1]) << {"m": 20, "g": 30}[match[2]]
