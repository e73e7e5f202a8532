"""The chart says what it should: configuration, sizes, secrets, pod policy, network, versions.

What it looks like to KubeRay is in test_kuberay.py. Nothing is applied to a cluster here, so whether pods start and
whether a NetworkPolicy is enforced is not tested.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import re
import shlex
import shutil
import tomllib
import warnings
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from cluster.config import Config, load
from cluster.errors import ResourcesShort
from cluster.resources import Role, check, demand
from k8s.render import RAY_VERSION, USER, capacity, main

REPO = Path(__file__).parents[2]
CHART = REPO / "k8s" / "chart"
SECRET_NAME = re.compile("TOKEN|SECRET|PASSWORD|ACCESS_KEY|CREDENTIAL")


def by_kind(documents, kind):
    return [document for document in documents if document["kind"] == kind]


def config_of(documents, tmp_path) -> Config:
    [config_map] = by_kind(documents, "ConfigMap")
    file = tmp_path / "metier.yaml"
    file.write_text(config_map["data"]["metier.yaml"])
    return load(file)


def containers(pod):
    return pod["spec"]["containers"] + pod["spec"].get("initContainers", [])


# -- values --------------------------------------------------------------------------------------------------


def test_lint_is_clean(helm):
    done = helm("lint", str(CHART), "--strict")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"serving": {"worker": {"minReplica": 2}}}, "minReplica"),
        ({"servng": {}}, "servng"),
        ({"image": {"tag": "latest"}}, "tag"),
        ({"head": {"memory": "8 GB"}}, "memory"),
        ({"milvus": {"token": "root:Milvus"}}, "token"),
        ({"networkPolicy": {"clientLabels": {"metier-client": None}}}, "clientLabels"),
        ({"training": {"run": "much-too-long-a-name"}}, "run"),
    ],
)
def test_wrong_value_is_refused_by_name(helm, values, named):
    done = helm("template", "metier", str(CHART), values=values)
    assert done.returncode != 0
    assert named in done.stderr


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"config": "serving: {}"}, "say serving.request_timeout_s"),
        ({"config": "serving: {request_timeout_s: 9}\nname: a", "training": {"enabled": True}}, "say training.workers"),
        ({"config": "- not\n- a mapping"}, "not a YAML mapping"),
        ({"serving": {"worker": {"minReplicas": 5}}}, "maxReplicas must be at least minReplicas"),
    ],
)
def test_what_the_schema_cannot_see_fails_with_a_sentence(helm, values, sentence):
    done = helm("template", "metier", str(CHART), values=values)
    assert done.returncode != 0
    assert sentence in done.stderr


def test_schema_knows_every_value():
    """A value that the schema does not name could not be set, and one that only the schema names does nothing."""
    schema = json.loads((CHART / "values.schema.json").read_text())

    def compare(node, values, path):
        if "properties" not in node:
            return
        assert node["additionalProperties"] is False, path
        assert set(node["properties"]) == set(values), path
        for key, value in values.items():
            compare(node["properties"][key], value, f"{path}.{key}")

    del schema["properties"]["global"]
    compare(schema, yaml.safe_load((CHART / "values.yaml").read_text()), "values")


# -- configuration -------------------------------------------------------------------------------------------


def test_config_map_is_the_file_and_loads(charts, tmp_path):
    for case, documents in charts.items():
        config = config_of(documents, tmp_path)
        assert config.store.uri == "http://milvus.milvus.svc:19530", case
        assert config.storage.url.startswith("s3://"), case
    [config_map] = by_kind(charts["default"], "ConfigMap")
    assert config_map["data"]["metier.yaml"] == (CHART / "files" / "metier.yaml").read_text()


def test_config_can_be_given_as_a_file(helm, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("name: own\nserving: {request_timeout_s: 30}\n")
    done = helm("template", "metier", str(CHART), "--set-file", f"config={own}")
    documents = list(yaml.safe_load_all(done.stdout))
    assert config_of(documents, tmp_path).name == "own"
    [service] = by_kind(documents, "RayService")
    assert yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["name"] == "own"


def test_default_config_points_at_what_is_there():
    config = load(CHART / "files" / "metier.yaml")
    assert config.knowledge.name == "corvane"
    assert config.ray.address == "auto"
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert config.store.uri.endswith(f":{values['networkPolicy']['milvus']['port']}")
    for path in (config.knowledge.documents, *config.data.train, *config.data.heldout):
        assert path and path.startswith("/opt/metier/examples/"), "inside the image"
        assert (REPO / Path(path).relative_to("/opt/metier")).exists(), path


def test_changed_config_makes_a_new_cluster_and_a_changed_override_does_not(render):
    def cluster(values) -> Any:
        [service] = by_kind(render(values), "RayService")
        return service["spec"]["rayClusterConfig"]

    base = {"config": "name: a\nserving: {request_timeout_s: 30}"}
    assert cluster(base) != cluster({"config": base["config"] + "\nlogging: {level: debug}"})
    assert cluster(base) == cluster({**base, "serving": {"overrides": ["serving.max_tokens=9"]}})


# -- sizes ---------------------------------------------------------------------------------------------------


def test_worker_pods_hold_what_the_config_asks(ray_objects, charts, tmp_path):
    roles: dict[str, Role] = {"RayService": "serve", "RayJob": "train"}
    for case, manifest in ray_objects:
        check(demand(config_of(charts[case], tmp_path), roles[manifest["kind"]]), capacity(manifest))


def test_too_small_workers_are_noticed(render, tmp_path):
    documents = render({"serving": {"worker": {"cpu": "2"}}})
    [service] = by_kind(documents, "RayService")
    with pytest.raises(ResourcesShort, match=r"serving\.generator"):
        check(demand(config_of(documents, tmp_path), "serve"), capacity(service))


def test_autoscaling_off_means_a_fixed_number(charts):
    [service] = by_kind(charts["autoscaling off"], "RayService")
    [group] = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert group["minReplicas"] == group["maxReplicas"] == group["replicas"] == 2


# -- pods ----------------------------------------------------------------------------------------------------


def test_every_container_is_sized_and_restricted(pod_templates):
    """Pod Security "restricted", which no admission controller checks inside Ray objects; KubeRay copies it."""
    assert len(pod_templates) > 20
    for case, pod in pod_templates:
        assert pod["spec"]["securityContext"]["runAsUser"] == USER, case
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod["spec"]), case
        assert all("hostPath" not in volume for volume in pod["spec"].get("volumes", [])), case
        for container in containers(pod):
            resources, security = container["resources"], container["securityContext"]
            assert {"cpu", "memory"} <= set(resources["limits"]), case
            assert resources["limits"] == resources["requests"], case
            assert security["allowPrivilegeEscalation"] is False, case
            assert security["runAsNonRoot"] is True, case
            assert security["capabilities"] == {"drop": ["ALL"]}, case
            assert security["seccompProfile"] == {"type": "RuntimeDefault"}, case


def test_only_the_autoscaling_head_holds_an_api_token(ray_objects):
    for case, manifest in ray_objects:
        spec = manifest["spec"]
        cluster = spec.get("rayClusterConfig") or spec["rayClusterSpec"]
        head = cluster["headGroupSpec"]["template"]["spec"]
        assert head["automountServiceAccountToken"] is cluster["enableInTreeAutoscaling"], case
        for group in cluster["workerGroupSpecs"]:
            assert group["template"]["spec"]["automountServiceAccountToken"] is False, case


def test_autoscaler_is_restricted_too(charts):
    [service] = by_kind(charts["default"], "RayService")
    options = service["spec"]["rayClusterConfig"]["autoscalerOptions"]
    assert options["securityContext"]["allowPrivilegeEscalation"] is False
    assert options["resources"]["limits"] == options["resources"]["requests"]


def test_secrets_are_references(charts, pod_templates):
    for documents in charts.values():
        assert not by_kind(documents, "Secret")
    seen = set()
    for case, pod in pod_templates:
        for container in containers(pod):
            assert "envFrom" not in container, case
            for variable in container.get("env", []):
                if SECRET_NAME.search(variable["name"]):
                    seen.add(variable["name"])
                    assert set(variable) == {"name", "valueFrom"}, case
                    assert set(variable["valueFrom"]) == {"secretKeyRef"}, case
    assert seen == {"METIER_MILVUS_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}


def test_empty_secret_names_leave_the_variables_out(charts):
    for manifest in by_kind(charts["bare"], "RayService") + by_kind(charts["bare"], "RayJob"):
        assert "secretKeyRef" not in json.dumps(manifest)
        assert "cloud-identity" in json.dumps(manifest)


# -- network -------------------------------------------------------------------------------------------------


def test_policies_cover_every_pod(charts):
    for case, documents in charts.items():
        policies = by_kind(documents, "NetworkPolicy")
        if case == "bare":
            assert not policies
            continue
        for manifest in by_kind(documents, "RayService") + by_kind(documents, "RayJob"):
            spec = manifest["spec"]
            cluster = spec.get("rayClusterConfig") or spec["rayClusterSpec"]
            templates = [cluster["headGroupSpec"]["template"], *(g["template"] for g in cluster["workerGroupSpecs"])]
            for template in templates + [spec[key] for key in ("submitterPodTemplate",) if key in spec]:
                labels = template["metadata"]["labels"].items()
                covering = [p for p in policies if p["spec"]["podSelector"]["matchLabels"].items() <= labels]
                assert len(covering) == 1, (case, manifest["kind"])
                assert set(covering[0]["spec"]["policyTypes"]) == {"Ingress", "Egress"}


def test_only_labelled_pods_reach_port_8000(charts):
    policies = {p["metadata"]["name"]: p["spec"] for p in by_kind(charts["training"], "NetworkPolicy")}
    own, operator, clients = policies["metier-serving"]["ingress"]
    assert "ports" not in own
    assert own["from"] == [{"podSelector": policies["metier-serving"]["podSelector"]}]
    assert [port["port"] for port in operator["ports"]] == [8265]
    assert clients == {
        "from": [{"podSelector": {"matchLabels": {"metier-client": "true"}}}],
        "ports": [{"protocol": "TCP", "port": 8000}],
    }
    assert len(policies["metier-training"]["ingress"]) == 2


def test_egress_is_named(charts):
    policies = {p["metadata"]["name"]: p["spec"] for p in by_kind(charts["default"], "NetworkPolicy")}
    ports = [{port["port"] for port in rule.get("ports", [])} for rule in policies["metier-serving"]["egress"]]
    assert ports == [set(), {53}, {19530}, {443}, {443, 6443}]
    for rule in policies["metier-serving"]["egress"][:3]:
        assert all("ipBlock" not in peer for peer in rule["to"])
    [web] = policies["metier-serving"]["egress"][3]["to"]
    assert web["ipBlock"]["except"] == ["169.254.169.254/32"]


def test_only_the_serving_port_has_a_service(charts):
    for case, documents in charts.items():
        assert not by_kind(documents, "Service") + by_kind(documents, "Ingress"), case
        for service in by_kind(documents, "RayService"):
            spec = service["spec"]["serveService"]["spec"]
            assert spec["type"] == "ClusterIP", case
            assert [(port["name"], port["port"]) for port in spec["ports"]] == [("serve", 8000)], case


# -- Ray Serve -----------------------------------------------------------------------------------------------


def unknown_keys(model: type[BaseModel], data: Any, path: str = "") -> list[str]:
    """Keys of `data` that `model` has no field for. Ray's own schema drops them in silence."""
    found = []
    for key, value in data.items():
        if key not in model.model_fields:
            found.append(f"{path}{key}")
            continue
        annotation = model.model_fields[key].annotation
        inner = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, BaseModel)]
        items = value if isinstance(value, list) else [value]
        for item in items:
            if inner and isinstance(item, dict):
                found += unknown_keys(inner[0], item, f"{path}{key}.")
    return found


@pytest.fixture(scope="module")
def deploy_schema() -> type[BaseModel]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray.serve.schema import ServeDeploySchema
    return ServeDeploySchema


def test_serve_config_is_rays_and_holds_no_unknown_key(charts, deploy_schema):
    for case, documents in charts.items():
        for service in by_kind(documents, "RayService"):
            data = yaml.safe_load(service["spec"]["serveConfigV2"])
            assert unknown_keys(deploy_schema, data) == [], case
            parsed = deploy_schema.model_validate(data)
            assert parsed.proxy_location.value == "EveryNode", case
            [application] = parsed.applications
            assert application.import_path == "serving.app:build", case
            assert application.args["config"] == "/etc/metier/metier.yaml", case
            assert isinstance(application.args["overrides"], list), case


def test_unknown_keys_are_found(deploy_schema):
    data = {
        "http_options": {"request_timeout": 3},
        "applications": [{"import_path": "a:b", "deployments": [{"name": "a", "max_queue_requests": 1}]}],
    }
    deploy_schema.model_validate(data)  # this is why
    assert unknown_keys(deploy_schema, data) == [
        "http_options.request_timeout",
        "applications.deployments.max_queue_requests",
    ]


def test_times_of_going_down_agree(charts, tmp_path):
    """A request may run to its timeout: an old cluster outlives it, and a pod outlives its own drain."""
    for case, documents in charts.items():
        for service in by_kind(documents, "RayService"):
            timeout = config_of(documents, tmp_path).serving.request_timeout_s
            assert yaml.safe_load(service["spec"]["serveConfigV2"])["http_options"]["request_timeout_s"] >= timeout, (
                case
            )
            assert service["spec"]["rayClusterDeletionDelaySeconds"] > timeout, case
            [group] = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
            pod = group["template"]["spec"]
            drain = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
            assert pod["terminationGracePeriodSeconds"] > int(drain.split()[1].rstrip(";")), case


# -- versions and the image ----------------------------------------------------------------------------------


def test_versions_agree(charts):
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    assert chart["appVersion"] == project["version"]
    [lock] = re.findall(r"^ray(?:\[[^\]]*\])?==(\S+)", (REPO / "requirements.lock").read_text(), re.MULTILINE)
    declared = set(re.findall(r"ray(?:\[[^\]]*\])?==([\d.]+)", (REPO / "pyproject.toml").read_text()))
    assert {RAY_VERSION, importlib.metadata.version("ray"), lock} | declared == {RAY_VERSION}
    [service] = by_kind(charts["default"], "RayService")
    cluster = service["spec"]["rayClusterConfig"]
    assert cluster["rayVersion"] == RAY_VERSION
    [container] = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    assert container["image"] == f"metier:{project['version']}"
    assert f"ARG VERSION={project['version']}" in (REPO / "Dockerfile").read_text()


def test_digest_wins_over_tag(charts):
    [service] = by_kind(charts["gpu"], "RayService")
    [container] = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert container["image"] == "metier@sha256:" + "a" * 64


def test_image_is_not_root_and_holds_what_kuberay_calls():
    text = (REPO / "Dockerfile").read_text()
    assert f"USER {USER}:{USER}" in text
    assert re.search(r"apt-get install .*\bbash wget\b", text), "KubeRay's probes run wget in bash"
    assert "://" not in text, "no address of a package index"
    assert "--no-deps" in text and "requirements.lock" in text


def test_build_context_holds_every_package():
    packages = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    kept = {line[1:] for line in (REPO / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for package in packages:
        folder = package.split(".")[0]
        assert folder in kept or f"{folder}/__init__.py" in kept, package
    assert {"pyproject.toml", "requirements.lock", "README.md", "LICENSE", "examples"} <= kept


# -- words ---------------------------------------------------------------------------------------------------


def test_notes_name_service_and_run(helm, tmp_path):
    copy = tmp_path / "chart"
    shutil.copytree(CHART, copy)
    (copy / "templates" / "notes.yaml").write_text(
        'notes: |\n  {{- include (print .Template.BasePath "/NOTES.txt") . | nindent 2 }}\n'
    )
    done = helm(
        "template", "shop", str(copy), "--show-only", "templates/notes.yaml", values={"training": {"enabled": True}}
    )
    notes = yaml.safe_load(done.stdout)["notes"]
    assert "port-forward service/shop-metier 8000:8000" in notes
    assert "metier-client=true" in notes
    assert "rayjob shop-metier-training" in notes


def shell_commands(text: str) -> list[str]:
    """Commands of the ``sh`` blocks, continuation lines joined."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def test_readme_commands_run(helm, capsys, monkeypatch):
    """What needs no cluster: ``helm upgrade --install`` as ``helm template``, and ``k8s.render`` on its output."""
    config = str(CHART / "files" / "metier.yaml")
    ran = []
    for command in shell_commands((REPO / "k8s" / "README.md").read_text()):
        output = ""
        for stage in command.split(" | ") if command.startswith(("helm", ".venv")) else []:
            words = [word.replace("metier.yaml", config) for word in shlex.split(stage)]
            if words[0] == "helm" and "k8s/chart" in words:
                kept = [word for word in words[2:] if word not in ("--install", "--reuse-values")]
                done = helm("template", *kept)
                assert done.returncode == 0, f"{command}\n{done.stderr}"
                output = done.stdout
            elif "k8s.render" in words:
                monkeypatch.setattr("sys.stdin", io.StringIO(output))
                assert main(words[3:]) == 0, capsys.readouterr().err
            else:
                continue
            ran.append(words[1])
    assert ran.count("-m") == 2
    assert ran.count("upgrade") == 4


def test_readme_names_every_group_of_values():
    text = (REPO / "k8s" / "README.md").read_text()
    missing = [key for key in yaml.safe_load((CHART / "values.yaml").read_text()) if f"`{key}" not in text]
    assert missing == []
