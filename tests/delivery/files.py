"""Where the delivery files are, and how the tests read them."""

import tomllib
from pathlib import Path
from typing import Any

import yaml

from tests.delivery.dockerfile import Dockerfile

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "docker-compose.yml"
KUBERNETES = ROOT / "k8s" / "base"
DOCKERFILE = Dockerfile(ROOT / "docker" / "Dockerfile")


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def compose_services() -> dict[str, dict[str, Any]]:
    """Each service as written, anchors merged, variables not filled in."""
    return dict(yaml.safe_load(COMPOSE.read_text())["services"])


def compose_volumes() -> set[str]:
    """Names of the volumes that compose keeps."""
    return set(yaml.safe_load(COMPOSE.read_text())["volumes"])


def prometheus() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "docker" / "prometheus.yml").read_text()))


def kustomization() -> dict[str, Any]:
    return dict(yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text()))


def kubernetes_documents(kind: str | None = None) -> dict[str, dict[str, Any]]:
    """Every document of the base (of one kind, if named) by `kind/name`."""
    documents = [
        document
        for name in kustomization()["resources"]
        for document in yaml.safe_load_all((KUBERNETES / name).read_text())
        if kind in (None, document["kind"])
    ]
    return {f"{document['kind']}/{document['metadata']['name']}": document for document in documents}


def workloads() -> dict[str, dict[str, Any]]:
    return {name: each for name, each in kubernetes_documents().items() if "template" in each.get("spec", {})}


def pod(workload: dict[str, Any]) -> dict[str, Any]:
    return dict(workload["spec"]["template"]["spec"])


def container(workload: dict[str, Any]) -> dict[str, Any]:
    """The only container of the workload."""
    (only,) = pod(workload)["containers"]
    return dict(only)


def literal_environment(workload: dict[str, Any]) -> dict[str, str]:
    """What the container sets by itself, over the map of settings; not what comes from a Secret."""
    return {each["name"]: each["value"] for each in container(workload).get("env", []) if "value" in each}


def volumes_by_mount(workload: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Mount path → the mount, with its volume's definition where the pod has one."""
    volumes = {each["name"]: each for each in pod(workload).get("volumes", [])}
    return {mount["mountPath"]: volumes.get(mount["name"], {}) | mount for mount in container(workload)["volumeMounts"]}


def settings_env() -> dict[str, str]:
    lines = (KUBERNETES / "settings.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
