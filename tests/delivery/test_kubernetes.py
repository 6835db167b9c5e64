"""k8s/base: valid by the Kubernetes schemas, wired together, and closed where it has no need to be open."""

from typing import Any

import kubernetes_validate
import pytest

from tests.delivery.files import (
    KUBERNETES,
    ROOT,
    container,
    kubernetes_documents,
    kustomization,
    pod,
    workloads,
)

OLDEST_VERSION = "1.30"
"""What k8s/README.md promises; `preStop.sleep` needs it."""

DOCUMENTS = kubernetes_documents()
WORKLOADS = workloads()
every_workload = pytest.mark.parametrize("workload", WORKLOADS.values(), ids=WORKLOADS)


@pytest.mark.parametrize("version", [OLDEST_VERSION, kubernetes_validate.latest_version()])
@pytest.mark.parametrize("document", DOCUMENTS.values(), ids=DOCUMENTS)
def test_a_document_is_valid_by_the_strict_schema(document: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(document, version, strict=True)


def test_the_schema_refuses_a_misspelt_key() -> None:
    service = DOCUMENTS["Service/sidrec-api"]
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(service | {"spce": {}}, kubernetes_validate.latest_version(), strict=True)


def test_the_readme_names_the_oldest_version() -> None:
    assert f"Kubernetes {OLDEST_VERSION} or newer" in (ROOT / "k8s" / "README.md").read_text()


def test_the_kustomization_lists_every_file() -> None:
    listed = [*kustomization()["resources"], *(env for each in generators() for env in each["envs"])]
    there = [path.name for path in KUBERNETES.iterdir() if path.name != "kustomization.yaml"]
    assert sorted(listed) == sorted(there)


def test_no_document_names_a_namespace() -> None:
    assert "namespace" not in kustomization()
    assert not [name for name, each in DOCUMENTS.items() if "namespace" in each["metadata"]]


def test_no_secret_is_shipped_and_the_readme_says_how_to_make_it() -> None:
    assert not kubernetes_documents("Secret")
    assert "secretGenerator" not in kustomization()
    wanted = [each["valueFrom"]["secretKeyRef"] for each in container(WORKLOADS["Deployment/sidrec-api"])["env"]]
    assert wanted == [{"name": "sidrec-api-keys", "key": "hashes"}]
    readme = (ROOT / "k8s" / "README.md").read_text()
    assert "create secret generic sidrec-api-keys" in readme
    assert "--from-literal=hashes=" in readme


@every_workload
def test_an_image_has_its_version_in_the_kustomization(workload: dict[str, Any]) -> None:
    tags = {each["name"]: each["newTag"] for each in kustomization()["images"]}
    assert tags[container(workload)["image"]] not in {"", "latest"}


@every_workload
def test_a_pod_is_restricted(workload: dict[str, Any]) -> None:
    """The "restricted" level of the Pod Security Standards, and a read-only root file system."""
    of_pod, of_container = pod(workload)["securityContext"], container(workload)["securityContext"]
    assert of_pod["runAsNonRoot"] is True
    assert of_pod["runAsUser"] > 0
    assert of_pod["runAsGroup"] > 0
    assert of_pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert of_container == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod(workload))


@every_workload
def test_a_pod_has_no_token_and_no_service_links(workload: dict[str, Any]) -> None:
    """Service links would set variables that begin with SIDREC_, the prefix of the settings."""
    assert pod(workload)["automountServiceAccountToken"] is False
    assert pod(workload)["enableServiceLinks"] is False
    account = DOCUMENTS[f"ServiceAccount/{pod(workload)['serviceAccountName']}"]
    assert account["automountServiceAccountToken"] is False


@every_workload
def test_a_pod_is_bounded(workload: dict[str, Any]) -> None:
    resources = container(workload)["resources"]
    assert {"cpu", "memory"} <= set(resources["requests"])
    assert resources["limits"]["memory"]
    assert all("sizeLimit" in each["emptyDir"] for each in pod(workload).get("volumes", []) if "emptyDir" in each)


@every_workload
def test_a_workload_selects_its_own_pods_and_no_others(workload: dict[str, Any]) -> None:
    assert selected_by(workload["spec"]["selector"]) == [workload["metadata"]["name"]]
    for constraint in pod(workload).get("topologySpreadConstraints", []):
        assert selected_by(constraint["labelSelector"]) == [workload["metadata"]["name"]]


@pytest.mark.parametrize("kind", ["Service", "PodDisruptionBudget"])
def test_a_selector_finds_the_workload_of_that_name(kind: str) -> None:
    for document in kubernetes_documents(kind).values():
        selector = document["spec"]["selector"]
        selector = {"matchLabels": selector} if kind == "Service" else selector
        assert selected_by(selector) == [document["metadata"]["name"]]


def test_a_service_leads_to_a_port_that_is_there() -> None:
    for name, service in kubernetes_documents("Service").items():
        (workload,) = (each for each in WORKLOADS.values() if each["metadata"]["name"] == name.partition("/")[2])
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= set(ports(workload))


def test_the_budget_leaves_a_pod_standing() -> None:
    (budget,) = kubernetes_documents("PodDisruptionBudget").values()
    assert budget["spec"]["maxUnavailable"] < WORKLOADS["Deployment/sidrec-api"]["spec"]["replicas"]


@every_workload
def test_a_probe_asks_a_port_that_is_there(workload: dict[str, Any]) -> None:
    probes = [probe for key, probe in container(workload).items() if key.endswith("Probe")]
    for probe in probes:
        target = probe.get("httpGet") or probe.get("tcpSocket")
        assert target is None or target["port"] in ports(workload)


@every_workload
def test_a_mount_has_its_volume_and_a_volume_its_claim(workload: dict[str, Any]) -> None:
    volumes = {each["name"]: each for each in pod(workload).get("volumes", [])}
    claimed = {each["metadata"]["name"] for each in workload["spec"].get("volumeClaimTemplates", [])}
    assert {mount["name"] for mount in container(workload)["volumeMounts"]} == set(volumes) | claimed
    for volume in volumes.values():
        if claim := volume.get("persistentVolumeClaim"):
            assert f"PersistentVolumeClaim/{claim['claimName']}" in DOCUMENTS


@pytest.mark.parametrize("name", ["Deployment/sidrec-api", "Deployment/sidrec-worker"])
def test_settings_come_from_the_generated_map(name: str) -> None:
    assert container(WORKLOADS[name])["envFrom"] == [{"configMapRef": {"name": "sidrec-settings"}}]
    assert [each["name"] for each in generators()] == ["sidrec-settings"]


@pytest.mark.parametrize("name", ["Deployment/sidrec-api", "Deployment/sidrec-worker"])
def test_bundles_are_mounted_read_only(name: str) -> None:
    (mount,) = (each for each in container(WORKLOADS[name])["volumeMounts"] if each["name"] == "bundles")
    (volume,) = (each for each in pod(WORKLOADS[name])["volumes"] if each["name"] == "bundles")
    assert mount["readOnly"] is True
    assert volume["persistentVolumeClaim"]["readOnly"] is True


def test_the_api_is_replaced_without_a_gap() -> None:
    api = WORKLOADS["Deployment/sidrec-api"]
    assert api["spec"]["replicas"] >= 2
    assert api["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    drain_s = container(api)["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod(api)["terminationGracePeriodSeconds"] > drain_s


def test_every_pod_is_denied_by_default() -> None:
    deny = kubernetes_documents("NetworkPolicy")["NetworkPolicy/sidrec-default-deny"]["spec"]
    assert selected_by(deny["podSelector"]) == names(WORKLOADS)
    assert sorted(deny["policyTypes"]) == ["Egress", "Ingress"]
    assert not {"ingress", "egress"} & set(deny)


def test_only_the_api_is_reached_from_outside() -> None:
    open_to_all = [
        (selected_by(policy["spec"]["podSelector"]), rule["ports"])
        for policy in kubernetes_documents("NetworkPolicy").values()
        for rule in policy["spec"].get("ingress", [])
        if any("namespaceSelector" in peer for peer in rule["from"])
    ]
    assert open_to_all == [(["sidrec-api"], [{"protocol": "TCP", "port": 8000}])]


def test_redis_and_its_clients_reach_each_other_and_nobody_else() -> None:
    policies = kubernetes_documents("NetworkPolicy")
    inward, outward = (
        policies["NetworkPolicy/sidrec-redis-in"]["spec"],
        policies["NetworkPolicy/sidrec-clients-out"]["spec"],
    )
    clients, redis = ["sidrec-api", "sidrec-worker"], ["sidrec-redis"]
    port = {"protocol": "TCP", "port": 6379}
    assert (selected_by(inward["podSelector"]), selected_by(outward["podSelector"])) == (redis, clients)
    (rule,) = inward["ingress"]
    assert ([selected_by(peer["podSelector"]) for peer in rule["from"]], rule["ports"]) == ([clients], [port])
    to_redis, to_dns = outward["egress"]
    assert ([selected_by(peer["podSelector"]) for peer in to_redis["to"]], to_redis["ports"]) == ([redis], [port])
    assert {each["port"] for each in to_dns["ports"]} == {53}


def generators() -> list[dict[str, Any]]:
    return list(kustomization()["configMapGenerator"])


def names(documents: dict[str, dict[str, Any]]) -> list[str]:
    return sorted(each["metadata"]["name"] for each in documents.values())


def ports(workload: dict[str, Any]) -> dict[str, int]:
    return {each["name"]: each["containerPort"] for each in container(workload).get("ports", [])}


def selected_by(selector: dict[str, Any]) -> list[str]:
    """Names of the workloads whose pods the selector finds."""
    return names({name: each for name, each in WORKLOADS.items() if selects(selector, pod_labels(each))})


def pod_labels(workload: dict[str, Any]) -> dict[str, str]:
    return dict(workload["spec"]["template"]["metadata"]["labels"])


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    assert selector.keys() <= {"matchLabels", "matchExpressions"}
    expressions = selector.get("matchExpressions", [])
    assert all(each["operator"] == "In" for each in expressions)
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        labels.get(each["key"]) in each["values"] for each in expressions
    )
