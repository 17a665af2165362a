"""configs/k8s: valid for Kubernetes, and of one mind with kos.yaml, the code, the image and docs/operations.md.

What kustomize makes of the base, each overlay and each component is looked at if kubectl is here; the base's files are
looked at in any case.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import kubernetes_validate
import msgspec
import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase

from kos import config, metrics
from kos.config_values import parse_size
from kos.node import admin, role, supervisor

REPOSITORY = Path(__file__).parents[2]
K8S = REPOSITORY / "configs" / "k8s"
RULES = REPOSITORY / "configs" / "prometheus" / "kos.rules.yaml"
PAGE = (REPOSITORY / "docs" / "operations.md").read_text()
DOCKERFILE = (REPOSITORY / "Dockerfile").read_text()

#: the oldest that docs/operations.md names, and the newest that has schemas here
VERSIONS = ("1.31", kubernetes_validate.latest_version())
#: custom resources, which Kubernetes' own schemas do not know
OPERATOR = "monitoring.coreos.com/v1"
OLDEST_NAMED = re.search(r"Kubernetes (\d+\.\d+) and later", PAGE)

OVERLAYS = sorted(f"overlays/{each.name}" for each in (K8S / "overlays").iterdir())
COMPONENTS = sorted(f"components/{each.name}" for each in (K8S / "components").iterdir())
#: these have a kos.yaml that was written for them; a component over the base has the base's
WHOLE = ["files", "base", *OVERLAYS]
ALL = [*WHOLE, *COMPONENTS]

Document = dict[str, Any]

#: ports of a container -> options of `listen`
LISTEN = {"s3": "s3", "s3-tls": "s3_tls", "admin": "admin", "peer": "peer", "cluster": "cluster"}
#: what the downward API puts in their place on a node
FIELDS = {"spec.nodeName": "gpu-node-17.city-a.internal", "status.podIP": "10.20.30.40"}


# --- what is looked at ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Manifests:
    """All documents of a base, an overlay, or a component over the base."""

    documents: list[Document]

    def of(self, kind: str) -> list[Document]:
        return [each for each in self.documents if each["kind"] == kind]

    def one(self, kind: str, name: str) -> Document:
        (found,) = [each for each in self.of(kind) if each["metadata"]["name"] == name]
        return found

    @property
    def workload(self) -> Document:
        (found,) = [each for each in self.documents if each["kind"] in ("DaemonSet", "StatefulSet") and _is_kos(each)]
        return found

    @property
    def pod(self) -> Document:
        spec: Document = self.workload["spec"]["template"]["spec"]
        return spec

    @property
    def labels(self) -> dict[str, str]:
        """Of the pods."""
        labels: dict[str, str] = self.workload["spec"]["template"]["metadata"]["labels"]
        return labels

    @property
    def container(self) -> Document:
        (found,) = self.pod["containers"]
        assert isinstance(found, dict)
        return found

    @property
    def ports(self) -> dict[str, int]:
        return {each["name"]: each["containerPort"] for each in self.container["ports"]}

    @property
    def environment(self) -> dict[str, str]:
        """As a node would have it, with the optional secrets."""
        found = {}
        for each in self.container["env"]:
            source = each["valueFrom"]
            found[each["name"]] = FIELDS[source["fieldRef"]["fieldPath"]] if "fieldRef" in source else "from-a-secret"
        return found

    @property
    def kos_yaml(self) -> str:
        (volume,) = [each for each in self.pod["volumes"] if each["name"] == "config"]
        text: str = self.one("ConfigMap", volume["configMap"]["name"])["data"]["kos.yaml"]
        return text

    @property
    def secrets(self) -> dict[str, str]:
        """Directory in the container -> Secret that is mounted there."""
        names = {each["name"]: each["secret"]["secretName"] for each in self.pod["volumes"] if "secret" in each}
        mounts = self.container["volumeMounts"]
        return {each["mountPath"]: names[each["name"]] for each in mounts if each["name"] in names}

    def policies(self) -> list[Document]:
        """NetworkPolicies of kos' pods."""
        policies = self.of("NetworkPolicy")
        return [each["spec"] for each in policies if _selects(each["spec"]["podSelector"], self.labels)]


def _is_kos(workload: Document) -> bool:
    return bool(workload["metadata"]["name"] == "kos")


def _selects(selector: Document, labels: dict[str, str]) -> bool:
    assert set(selector) <= {"matchLabels"}, "the only kind of selector that is used here"
    return selector.get("matchLabels", {}).items() <= labels.items()


def _load_all(text: str) -> list[Document]:
    return [each for each in yaml.safe_load_all(text) if each is not None]


def raw_files() -> list[Path]:
    """Every file that holds documents for Kubernetes."""
    others = ("kustomization.yaml", "kos.yaml")
    return sorted(each for each in K8S.rglob("*.yaml") if each.name not in others)


def _files_of_base() -> Manifests:
    """The base as kustomize would join it, but for names and labels that it adds."""
    documents = [each for file in raw_files() if file.parent.name == "base" for each in _load_all(file.read_text())]
    text = (K8S / "base" / "kos.yaml").read_text()
    made = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "kos-config"}, "data": {"kos.yaml": text}}
    return Manifests([*documents, made])


@cache
def _why_no_kustomize() -> str:
    """Empty if there is one that is new enough."""
    if shutil.which("kubectl") is None:
        return "no kubectl here: only the files are looked at (Debian: kubernetes-client; components need 1.21)"
    asked = ["kubectl", "version", "--client", "--output=json"]
    said = subprocess.run(asked, capture_output=True, check=False, timeout=60).stdout
    # Before 1.21 kubectl does not say which kustomize it has: it is one that knows no components.
    if b"kustomizeVersion" not in said:
        return "kubectl is older than 1.21, whose kustomize was the first to know components"
    return ""


@cache
def _kustomize(directory: Path) -> Manifests:
    asked = ["kubectl", "kustomize", str(directory)]
    made = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=60)
    assert made.returncode == 0, made.stderr
    assert not made.stderr, f"kustomize warns: {made.stderr}"
    return Manifests(_load_all(made.stdout))


@pytest.fixture(scope="module")
def over_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a kustomization for each component alone over the base."""
    # kustomize takes relative paths alone, and resolves links in them.
    directory = tmp_path_factory.mktemp("over-base").resolve()
    for component in COMPONENTS:
        here = directory / component
        here.mkdir(parents=True)
        written = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [os.path.relpath(K8S.resolve() / "base", here)],
            "components": [os.path.relpath(K8S.resolve() / component, here)],
        }
        (here / "kustomization.yaml").write_text(yaml.safe_dump(written))
    return directory


@pytest.fixture
def manifests(request: pytest.FixtureRequest, over_base: Path) -> Manifests:
    """Parametrized by one of ALL."""
    name: str = request.param
    if name == "files":
        return _files_of_base()
    if reason := _why_no_kustomize():
        pytest.skip(reason)
    return _kustomize((over_base if name in COMPONENTS else K8S) / name)


in_all = pytest.mark.parametrize("manifests", ALL, indirect=True)
in_whole = pytest.mark.parametrize("manifests", WHOLE, indirect=True)


def only(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("manifests", [name], indirect=True)


def settings_of(manifests: Manifests, directory: Path) -> config.Config:
    """kos.yaml as the container would load it, with a file for every secret."""
    text = manifests.kos_yaml
    for mounted in manifests.secrets:
        here = directory / mounted.lstrip("/")
        here.mkdir(parents=True, exist_ok=True)
        for name in re.findall(rf"_file: {mounted}/(\S+)", text):
            (here / name).write_text("a-secret-of-sufficient-length\n")
    file = directory / "kos.yaml"
    file.write_text(text.replace("_file: /run/kos/", f"_file: {directory}/run/kos/"))
    return config.load(file, manifests.environment)


# --- valid ----------------------------------------------------------------------------------------------------------


class Metadata(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    namespace: str
    labels: dict[str, str]


class Alert(msgspec.Struct, forbid_unknown_fields=True):
    alert: str
    expr: str
    labels: dict[str, str]
    annotations: dict[str, str]
    pending: str = msgspec.field(name="for", default="0s")


class Group(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    rules: list[Alert]


class Groups(msgspec.Struct, forbid_unknown_fields=True):
    groups: list[Group]


class PrometheusRule(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    api_version: str
    kind: str
    metadata: Metadata
    spec: Groups


class Selector(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    match_labels: dict[str, str]


class Relabeling(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    source_labels: list[str]
    target_label: str


class Endpoint(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    port: str
    path: str
    interval: str
    scrape_timeout: str
    relabelings: list[Relabeling]


class Monitor(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    job_label: str
    selector: Selector
    endpoints: list[Endpoint]


class ServiceMonitor(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    api_version: str
    kind: str
    metadata: Metadata
    spec: Monitor


CUSTOM = {"PrometheusRule": PrometheusRule, "ServiceMonitor": ServiceMonitor}


@cache
def _validate(document: str, version: str) -> None:
    """Most documents are the same in every rendering, and the schemas are read anew each time."""
    kubernetes_validate.validate(json.loads(document), version, strict=True)


def check(document: Document, version: str) -> None:
    if document["apiVersion"] == OPERATOR:
        msgspec.convert(document, CUSTOM[document["kind"]])
    else:
        _validate(json.dumps(document, sort_keys=True), version)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("file", raw_files(), ids=lambda file: str(file.relative_to(K8S)))
def test_every_file_is_valid(file: Path, version: str) -> None:
    for document in _load_all(file.read_text()):
        check(document, version)


@pytest.mark.parametrize("version", VERSIONS)
@in_all
def test_everything_that_is_made_is_valid(manifests: Manifests, version: str) -> None:
    for document in manifests.documents:
        check(document, version)


def test_the_page_names_the_oldest_version() -> None:
    assert OLDEST_NAMED is not None
    assert OLDEST_NAMED[1] == VERSIONS[0]


def test_a_mistake_would_be_found() -> None:
    document = _load_all((K8S / "base" / "daemonset.yaml").read_text())[0]
    document["spec"]["template"]["spec"]["terminationGracePeriod"] = 60
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGracePeriod"):
        check(document, VERSIONS[0])


def kustomizations() -> list[Path]:
    return sorted(K8S.rglob("kustomization.yaml"))


@pytest.mark.parametrize("file", kustomizations(), ids=lambda file: str(file.parent.relative_to(K8S)))
def test_what_a_kustomization_names_is_there(file: Path) -> None:
    (written,) = _load_all(file.read_text())
    assert written["kind"] == ("Component" if file.parent.parent.name == "components" else "Kustomization")
    named = [*written.get("resources", ()), *written.get("components", ())]
    named += [name for made in written.get("configMapGenerator", ()) for name in made["files"]]
    for name in named:
        assert (file.parent / name).exists(), name


@in_all
def test_names_and_namespaces(manifests: Manifests) -> None:
    seen = set()
    for document in manifests.documents:
        metadata = document["metadata"]
        name = (document["kind"], metadata["name"])
        assert name not in seen
        seen.add(name)
        if len(manifests.of("Namespace")) and "namespace" in metadata:
            assert metadata["namespace"] == "kos"


# --- of one mind ----------------------------------------------------------------------------------------------------


@in_whole
def test_kos_takes_its_configuration(manifests: Manifests, tmp_path: Path) -> None:
    settings = settings_of(manifests, tmp_path)
    assert settings.cluster.membership == "control"
    assert settings.cluster.name == FIELDS["spec.nodeName"]
    assert settings.cluster.advertise == FIELDS["status.podIP"]
    assert settings.control.url.startswith("postgresql://"), "SQLite is for one machine"
    assert settings.control.password is not None
    (config_mount,) = [each for each in manifests.container["volumeMounts"] if each["name"] == "config"]
    assert manifests.container["command"] == ["kos", "up", "--config", f"{config_mount['mountPath']}/kos.yaml"]


@in_whole
def test_ports_are_those_that_kos_listens_on(manifests: Manifests, tmp_path: Path) -> None:
    listen = settings_of(manifests, tmp_path).listen
    listened = {}
    for port, option in LISTEN.items():
        if (address := getattr(listen, option)) is not None:
            host, listened[port] = config.split_address(address)
            assert host == "0.0.0.0", "a pod is reached at its own address"
    assert manifests.ports == listened


@in_all
def test_services_lead_to_ports_of_the_pods(manifests: Manifests) -> None:
    for service in (each["spec"] for each in manifests.of("Service")):
        if not _selects({"matchLabels": service["selector"]}, manifests.labels):
            continue
        for port in service["ports"]:
            assert port["targetPort"] == port["name"]
            assert port["port"] == manifests.ports[port["name"]]
    s3 = manifests.one("Service", "kos")["spec"]
    assert {each["name"] for each in s3["ports"]} == manifests.ports.keys() & {"s3", "s3-tls"}
    peers = manifests.one("Service", "kos-peers")["spec"]
    assert {each["name"] for each in peers["ports"]} == {"peer", "cluster"}
    assert peers["clusterIP"] == "None"
    assert peers["publishNotReadyAddresses"] is True


@in_all
def test_selectors_select_the_pods(manifests: Manifests) -> None:
    assert _selects(manifests.workload["spec"]["selector"], manifests.labels)
    for kind, name in (("PodDisruptionBudget", "kos"), ("NetworkPolicy", "kos")):
        spec = manifests.one(kind, name)["spec"]
        assert _selects(spec.get("podSelector", spec.get("selector")), manifests.labels)
    for name in ("kos", "kos-peers"):
        assert manifests.one("Service", name)["spec"]["selector"].items() <= manifests.labels.items()
    for workload in (*manifests.of("StatefulSet"), *manifests.of("Deployment")):
        labels = workload["spec"]["template"]["metadata"]["labels"]
        assert _selects(workload["spec"]["selector"], labels)
        if not _is_kos(workload):
            assert not _selects(manifests.workload["spec"]["selector"], labels), "nobody else is taken for kos"
    for workload in manifests.of("StatefulSet"):
        assert manifests.one("Service", workload["spec"]["serviceName"])


def _allowed(policy: Document, direction: str) -> Iterator[tuple[Document, set[int]]]:
    """(peer, ports) of every rule; a rule without a peer is for anybody: {}."""
    for rule in policy.get(direction, ()):
        for peer in rule.get("from" if direction == "ingress" else "to", [{}]):
            yield peer, {each["port"] for each in rule["ports"]}


@in_all
def test_the_network_policy_lets_in_what_is_meant_and_no_more(manifests: Manifests) -> None:
    ports = manifests.ports
    allowed = [each for policy in manifests.policies() for each in _allowed(policy, "ingress")]
    s3 = {ports[name] for name in ports.keys() & {"s3", "s3-tls"}}
    reached: set[int] = set()
    for peer, opened in allowed:
        assert peer, "no rule is for anybody"
        reached |= opened
        if "podSelector" in peer:
            assert _selects(peer["podSelector"], manifests.labels)
            assert peer["podSelector"]["matchLabels"]
            assert opened == {ports["peer"], ports["cluster"]}
        elif ports["admin"] in opened:
            assert peer["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "monitoring"}
            assert opened == {ports["admin"]}
        else:
            assert opened == s3
    assert reached == set(ports.values())


@in_whole
def test_the_network_policy_lets_kos_reach_what_it_needs(manifests: Manifests, tmp_path: Path) -> None:
    settings = settings_of(manifests, tmp_path)
    allowed = [each for policy in manifests.policies() for each in _allowed(policy, "egress")]
    opened = set().union(*(ports for _, ports in allowed))
    origin, control = urlsplit(settings.origin.endpoint), urlsplit(settings.control.url)
    assert (origin.port or {"http": 80, "https": 443}[origin.scheme]) in opened
    assert (control.port or 5432) in opened
    assert 53 in opened
    peers = [
        ports
        for peer, ports in allowed
        if _selects(peer.get("podSelector", {"matchLabels": {"": ""}}), manifests.labels)
    ]
    assert {manifests.ports["peer"], manifests.ports["cluster"]} in peers


@in_all
def test_probes_ask_what_the_admin_port_answers(manifests: Manifests) -> None:
    answered = set(re.findall(r'web\.get\("([^"]+)"', inspect.getsource(admin)))
    asked = {}
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked[kind] = manifests.container[kind]["httpGet"]
        assert asked[kind]["port"] == "admin"
    assert {each["path"] for each in asked.values()} <= answered
    assert asked["startupProbe"]["path"] == asked["readinessProbe"]["path"] == "/readyz"
    assert asked["livenessProbe"]["path"] == "/healthz"


@in_whole
def test_the_kubelet_waits_as_long_as_the_supervisor(manifests: Manifests, tmp_path: Path) -> None:
    settings = settings_of(manifests, tmp_path)
    probe = manifests.container["startupProbe"]
    starting_s = settings.supervisor.start_timeout_s * settings.supervisor.start_attempts
    assert probe["periodSeconds"] * probe["failureThreshold"] >= starting_s


@in_all
def test_the_grace_period_holds_all_that_stopping_takes(manifests: Manifests, tmp_path: Path) -> None:
    settings = settings_of(manifests, tmp_path)
    hook = manifests.container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["sleep", "0"])
    assert hook[0] == "sleep"
    worst_s = (
        int(hook[1])
        + settings.limits.drain_s
        + role.DRAIN_GRACE_S
        + supervisor.KILL_WAIT_S
        + settings.supervisor.stop_timeout_s
        + supervisor.KILL_WAIT_S
        + settings.control.timeout_s
        + admin.SHUTDOWN_S
    )
    assert manifests.pod["terminationGracePeriodSeconds"] >= worst_s


@in_all
def test_every_secret_is_documented(manifests: Manifests) -> None:
    """| `NAME` | `KEY`, … | in the table of docs/operations.md; its keys are those that kos.yaml reads, and all are mounted."""
    documented = dict(re.findall(r"^ *\| `(kos-[a-z]+)` \| ([^|]+) \|", PAGE, re.MULTILINE))
    needed: list[tuple[str, str]] = []
    for file in re.findall(r"_file: (/run/kos/\S+)", manifests.kos_yaml):
        directory, _, key = file.rpartition("/")
        needed.append((manifests.secrets[directory], key))
    for container in (*manifests.pod["containers"], *_containers_beside(manifests)):
        for each in container.get("env", ()):
            if reference := each.get("valueFrom", {}).get("secretKeyRef"):
                needed.append((reference["name"], reference["key"]))
    generated = {each["metadata"]["name"]: set(each["data"]) for each in manifests.of("Secret")}
    for name, key in needed:
        plain = name.rsplit("-", 1)[0] if name in generated else name
        if generated:
            assert key in generated[name]
        assert f"`{key}`" in documented[plain]
    for name in manifests.secrets.values():
        assert (name.rsplit("-", 1)[0] if name in generated else name) in documented


def _containers_beside(manifests: Manifests) -> list[Document]:
    """Of other workloads."""
    others = [each for kind in ("StatefulSet", "Deployment") for each in manifests.of(kind) if not _is_kos(each)]
    return [container for each in others for container in each["spec"]["template"]["spec"]["containers"]]


@in_all
def test_images_name_no_registry(manifests: Manifests) -> None:
    of_kos = [*manifests.pod["containers"], *manifests.pod.get("initContainers", ())]
    assert {each["image"].partition(":")[0] for each in of_kos} == {"kos"}
    assert len({each["image"] for each in of_kos}) == 1, "what runs first is of the same version"
    for container in (*of_kos, *_containers_beside(manifests)):
        name, _, tag = container["image"].partition(":")
        assert tag and tag != "latest"
        assert not re.search(r"[.:]|^localhost", name.partition("/")[0] if "/" in name else "")


@pytest.mark.parametrize("manifests", OVERLAYS, indirect=True)
def test_an_overlay_names_the_image(manifests: Manifests) -> None:
    assert manifests.container["image"] != _files_of_base().container["image"]


@in_all
def test_nothing_runs_with_more_rights_than_it_needs(manifests: Manifests) -> None:
    assert manifests.pod["automountServiceAccountToken"] is False
    assert manifests.one("ServiceAccount", "kos")["automountServiceAccountToken"] is False
    of_pod = manifests.pod["securityContext"]
    uid = re.search(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)
    assert uid is not None
    assert (of_pod["runAsUser"], of_pod["runAsGroup"]) == (int(uid[1]), int(uid[2]))
    assert of_pod["fsGroup"] == int(uid[2])
    assert of_pod["runAsNonRoot"] is True
    assert of_pod["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in (*manifests.pod["containers"], *_containers_beside(manifests)):
        own = container["securityContext"]
        assert own["allowPrivilegeEscalation"] is False
        assert own["readOnlyRootFilesystem"] is True
        assert own["capabilities"] == {"drop": ["ALL"]}
        assert "runAsUser" not in own
    for container in manifests.pod.get("initContainers", ()):
        # Changing the owner of a directory takes this one right, and is all that it does.
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["CHOWN"]}
        assert container["command"] == ["chown", f"{uid[1]}:{uid[2]}", "/var/lib/kos"]


@in_all
def test_kos_writes_where_it_may(manifests: Manifests, tmp_path: Path) -> None:
    settings = settings_of(manifests, tmp_path)
    mounts = {each["mountPath"]: each for each in manifests.container["volumeMounts"]}
    assert not mounts["/tmp"].get("readOnly")
    assert not mounts["/var/lib/kos"].get("readOnly")
    assert Path(settings.cache.dir).is_relative_to("/var/lib/kos")
    assert all(mounts[directory]["readOnly"] for directory in (*manifests.secrets, "/etc/kos"))


@in_all
def test_one_node_at_a_time(manifests: Manifests) -> None:
    spec = manifests.workload["spec"]
    assert spec["minReadySeconds"] > 0
    assert spec["updateStrategy"]["type"] == "RollingUpdate"
    if manifests.workload["kind"] == "DaemonSet":
        assert spec["updateStrategy"]["rollingUpdate"] == {"maxUnavailable": 1, "maxSurge": 0}


@in_all
def test_a_budget_that_its_controller_can_work_out(manifests: Manifests) -> None:
    budget = manifests.one("PodDisruptionBudget", "kos")["spec"]
    if manifests.workload["kind"] == "DaemonSet":
        assert isinstance(budget["minAvailable"], int)
        assert "maxUnavailable" not in budget
    else:
        assert budget["maxUnavailable"] == 1


# --- components -----------------------------------------------------------------------------------------------------


@only("components/gpu")
def test_gpu(manifests: Manifests) -> None:
    assert manifests.pod["nodeSelector"]
    assert [each["key"] for each in manifests.pod["tolerations"]] == ["nvidia.com/gpu"]


@in_all
def test_https_is_whole_or_not_there(manifests: Manifests) -> None:
    if "s3-tls" in manifests.ports:
        assert manifests.secrets["/run/kos/tls"] == "kos-tls"
    else:
        assert "/run/kos/tls" not in manifests.secrets


@pytest.mark.parametrize("manifests", ["components/https", "overlays/gpu"], indirect=True)
def test_https_mounts_what_cert_manager_writes(manifests: Manifests) -> None:
    (directory,) = [directory for directory, name in manifests.secrets.items() if name == "kos-tls"]
    comment = (K8S / "components" / "https" / "kustomization.yaml").read_text()
    for text in (comment, (K8S / "overlays" / "gpu" / "kos.yaml").read_text()):
        assert f"s3_tls: 0.0.0.0:{manifests.ports['s3-tls']}" in text
        assert f"tls_cert_file: {directory}/tls.crt" in text
        assert f"tls_key_file: {directory}/tls.key" in text


@in_all
def test_where_clients_are_sent(manifests: Manifests) -> None:
    service = manifests.one("Service", "kos")["spec"]
    others_may = service["internalTrafficPolicy"] == "Cluster"
    # Waiting before the end helps only where another pod can take over.
    assert others_may == ("lifecycle" in manifests.container)
    assert others_may or "trafficDistribution" not in service


@only("components/prefer-same-node")
def test_prefer_same_node(manifests: Manifests) -> None:
    assert manifests.one("Service", "kos")["spec"]["trafficDistribution"] == "PreferSameNode"


@only("components/all-namespaces")
def test_all_namespaces(manifests: Manifests) -> None:
    peers = [
        peer for peer, ports in _allowed(manifests.one("NetworkPolicy", "kos")["spec"], "ingress") if 9000 in ports
    ]
    assert peers == [{"namespaceSelector": {}}]


@in_all
def test_the_disk(manifests: Manifests, tmp_path: Path) -> None:
    volumes = {each["name"]: each for each in manifests.pod["volumes"]}
    enforced = manifests.one("Namespace", "kos")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
    if "data" not in volumes:
        (claim,) = manifests.workload["spec"]["volumeClaimTemplates"]
        assert claim["metadata"]["name"] == "data"
        assert enforced == "restricted"
        cache = settings_of(manifests, tmp_path).cache
        asked = parse_size(claim["spec"]["resources"]["requests"]["storage"] + "B")
        assert asked >= 1.1 * (cache.size_bytes + cache.listings_bytes + cache.min_free_bytes)
        return
    assert enforced == "privileged"
    made = volumes["data"]["hostPath"]["type"] == "DirectoryOrCreate"
    # Who makes the directory must give it away too, or kos could not write to it.
    assert made == ("initContainers" in manifests.pod)


# --- monitoring -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("manifests", ["components/monitoring", "overlays/gpu"], indirect=True)
def test_the_monitor_finds_the_admin_port(manifests: Manifests) -> None:
    monitor = msgspec.convert(manifests.one("ServiceMonitor", "kos"), ServiceMonitor).spec
    chosen = [
        each
        for each in manifests.of("Service")
        if monitor.selector.match_labels.items() <= each["metadata"]["labels"].items()
    ]
    assert [each["metadata"]["name"] for each in chosen] == ["kos-admin"]
    (service,) = chosen
    assert _selects({"matchLabels": service["spec"]["selector"]}, manifests.labels)
    assert [each.port for each in monitor.endpoints] == [each["name"] for each in service["spec"]["ports"]] == ["admin"]
    assert monitor.endpoints[0].path in re.findall(r'web\.get\("([^"]+)"', inspect.getsource(admin))
    assert service["metadata"]["labels"][monitor.job_label] == "kos"


@in_all
def test_the_operator_is_needed_only_where_it_is_chosen(manifests: Manifests) -> None:
    custom = any(each["apiVersion"] == OPERATOR for each in manifests.documents)
    assert custom == any(each["metadata"]["name"] == "kos-admin" for each in manifests.of("Service"))


def _groups() -> Groups:
    return msgspec.convert(yaml.safe_load(RULES.read_text()), Groups)


def _alerts() -> list[Alert]:
    return [alert for group in _groups().groups for alert in group.rules]


def test_both_files_of_alerts_say_the_same() -> None:
    (document,) = _load_all((K8S / "components" / "monitoring" / "prometheus-rule.yaml").read_text())
    assert msgspec.convert(document, PrometheusRule).spec == _groups()


def _known_metrics() -> dict[str, set[str]]:
    """Name on the admin port's page -> its labels, for all that kos counts."""
    known: dict[str, set[str]] = {"up": set()}
    for metric in vars(metrics).values():
        if isinstance(metric, MetricWrapperBase):
            (family,) = metric.describe()
            suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
            known |= {f"{family.name}{suffix}": set(metric._labelnames) for suffix in suffixes}
    return known


@pytest.mark.parametrize("alert", _alerts(), ids=lambda alert: alert.alert)
def test_an_alert_asks_for_what_is_counted_and_explained(alert: Alert) -> None:
    known = _known_metrics()
    asked = set(re.findall(r"\b(kos_[a-z_]+|up)\b", alert.expr))
    assert asked
    assert asked <= known.keys()
    for metric in asked - {"up"}:
        assert re.search(rf"`{metric}[`{{]", PAGE), f"{metric} is not in docs/operations.md"
    said = set(re.findall(r"\$labels\.(\w+)", alert.annotations["summary"]))
    assert said <= {"instance"}.union(*(known[metric] for metric in asked))
    assert alert.labels.keys() == {"severity"}
    assert alert.labels["severity"] in ("page", "ticket")
    assert f"`{alert.alert}`" in PAGE, "the page says what to do"


# --- image and page -------------------------------------------------------------------------------------------------


def test_the_image_exposes_every_port() -> None:
    exposed = re.search(r"^EXPOSE (.+)$", DOCKERFILE, re.MULTILINE)
    assert exposed is not None
    ports = set(_files_of_base().ports.values()) | {9443}
    assert {int(port) for port in exposed[1].split()} == ports


def test_the_page_names_what_there_is() -> None:
    for name in set(re.findall(r"configs/[a-zA-Z0-9_./-]+[a-zA-Z0-9_]", PAGE)):
        assert (REPOSITORY / name).exists(), name
    for each in (*COMPONENTS, *OVERLAYS):
        assert f"`{each}`" in PAGE, f"{each} is not in docs/operations.md"
    for target in re.findall(r"\]\(([^)]+)\)", PAGE):
        file, _, anchor = target.partition("#")
        text = (REPOSITORY / "docs" / file).read_text() if file else PAGE
        assert not anchor or anchor in _anchors(text), target


def _anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
