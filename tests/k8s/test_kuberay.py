"""The Ray objects are ones that KubeRay 1.6 and 1.7 take: their CRDs, and rules that only their Go code knows.

:func:`violations` ports the rules of ``ray-operator/controllers/ray/utils/validation.go`` (v1.7.0) that bite a chart
like ours; features we do not use (history server, mTLS, RocksDB, deletion rules beyond their exclusions) are left out.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

from cluster.config import load
from k8s.render import ray_job

REPO = Path(__file__).parents[2]
CRDS = REPO.parent / "shared" / "contracts" / "kuberay-crds"
DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
ALPHA_FIELDS = ("networkPolicy", "tlsOptions", "historyServerOptions")


@pytest.fixture(scope="session")
def everything(ray_objects) -> list[tuple[str, dict[str, Any]]]:
    """The chart's matrix and the run rendered by Python."""
    config = load(REPO / "k8s" / "chart" / "files" / "metier.yaml")
    return [*ray_objects, ("render.py", ray_job(config, image="metier:0.1.0", name="run", config_map="run"))]


# -- CRDs ----------------------------------------------------------------------------------------------------


def strict(schema: Any) -> Any:
    """An openAPIV3Schema as JSON schema that refuses unknown fields, as server-side strict validation does."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]} | {k: schema[k] for k in ("pattern",) if k in schema}
    converted = {
        key: {name: strict(inner) for name, inner in value.items()} if key == "properties" else strict(value)
        for key, value in schema.items()
    }
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        converted.setdefault("additionalProperties", False)
    return converted


@pytest.fixture(scope="session", params=["v1.6.2", "v1.7.0"])
def crds(request) -> dict[str, Draft7Validator]:
    folder = CRDS / request.param
    if not folder.is_dir():
        pytest.skip(f"KubeRay's CRDs are not at {folder}; the rules below are checked all the same")
    validators = {}
    for kind, file in (("RayService", "ray.io_rayservices.yaml"), ("RayJob", "ray.io_rayjobs.yaml")):
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        crd = yaml.load((folder / file).read_text(), Loader=loader)
        [schema] = [v["schema"]["openAPIV3Schema"] for v in crd["spec"]["versions"] if v["name"] == "v1"]
        validators[kind] = Draft7Validator(strict(schema))
    return validators


def test_crds_take_every_object(crds, everything):
    for case, manifest in everything:
        errors = [f"{error.json_path}: {error.message[:200]}" for error in crds[manifest["kind"]].iter_errors(manifest)]
        assert errors == [], case


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "rayClusterSpec"), {}),
        (("spec", "rayClusterConfig", "headGroupSpec", "template", "spec", "containers", 0, "livenessProb"), {}),
        (("spec", "rayClusterConfig", "autoscalerOptions", "version"), "v3"),
        (("spec", "rayClusterConfig", "workerGroupSpecs", 0, "minReplicas"), "1"),
        (("spec", "serveService", "spec", "port"), 8000),
    ],
)
def test_crds_are_read_strictly(crds, ray_objects, path, value):
    service = copy.deepcopy(next(manifest for _, manifest in ray_objects if manifest["kind"] == "RayService"))
    target: Any = service
    for part in path[:-1]:
        target = target[part]
    target[path[-1]] = value
    assert not crds["RayService"].is_valid(service)


# -- the operator's own rules --------------------------------------------------------------------------------


def violations(manifest: dict[str, Any]) -> list[str]:
    """What the operator would refuse, one word or two a rule."""
    spec = manifest["spec"]
    found = []
    name = manifest["metadata"]["name"]
    if len(name) > 47 or not DNS_1035.fullmatch(name):
        found.append("name")
    cluster = spec.get("rayClusterConfig") or spec.get("rayClusterSpec")
    if cluster is None:
        return [*found, "no cluster"]
    found += _cluster_violations(cluster)
    if manifest["kind"] == "RayJob":
        found += _job_violations(spec)
    else:
        found += _service_violations(spec)
    return found


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def _environment(group: dict[str, Any]) -> set[str]:
    return {variable["name"] for variable in group["template"]["spec"]["containers"][0].get("env", [])}


def _cluster_violations(cluster: dict[str, Any]) -> list[str]:
    found = []
    autoscaling = cluster.get("enableInTreeAutoscaling", False)
    head, workers = cluster["headGroupSpec"], cluster.get("workerGroupSpecs", [])
    version = _version(cluster.get("rayVersion", "0"))
    auth = cluster.get("authOptions", {})
    if auth.get("mode") == "token" and version < (2, 52):
        found.append("token auth")
    if auth.get("enableK8sTokenAuth"):
        found.append("k8s token auth")
    if "upgradeStrategy" in cluster:
        found.append("upgradeStrategy in cluster")
    found += [f"alpha {name}" for name in ALPHA_FIELDS if name in cluster]
    for group in [head, *workers]:
        start = group.get("rayStartParams", {})
        if "labels" in start:
            found.append("labels in rayStartParams")
        if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & set(start):
            found.append("resources twice")
        if not all(isinstance(value, str) for value in start.values()):
            found.append("rayStartParams not strings")
        if autoscaling and group["template"]["spec"].get("restartPolicy", "Never") != "Never":
            found.append("restartPolicy")
    for group in workers:
        low, high = group.get("minReplicas"), group.get("maxReplicas")
        if low is None or high is None or not 0 <= low <= high:
            found.append("replicas")
        if "idleTimeoutSeconds" in group and not autoscaling:
            found.append("group idle timeout")
        if "priority" in group and version < (2, 56):
            found.append("priority")
    if "gcsFaultToleranceOptions" in cluster:
        if "redis-password" in head.get("rayStartParams", {}):
            found.append("redis-password")
        if {"REDIS_PASSWORD", "RAY_REDIS_ADDRESS"} & _environment(head):
            found.append("redis variables")
    elif "RAY_REDIS_ADDRESS" in _environment(head):
        found.append("redis without options")
    return found


def _job_violations(spec: dict[str, Any]) -> list[str]:
    found = []
    shutdown, ttl = spec.get("shutdownAfterJobFinishes", False), spec.get("ttlSecondsAfterFinished", 0)
    if ttl and not shutdown:
        found.append("ttl without shutdown")
    if spec.get("suspend") and not shutdown:
        found.append("suspend without shutdown")
    if spec.get("deletionStrategy", {}).get("deletionRules") and shutdown:
        found.append("deletionRules with shutdown")
    if ttl < 0 or any(spec.get(key, 1) <= 0 for key in ("activeDeadlineSeconds", "preRunningDeadlineSeconds")):
        found.append("deadlines")
    if spec.get("submissionMode") == "SidecarMode" and {"submitterPodTemplate", "submitterConfig"} & set(spec):
        found.append("sidecar with submitter")
    if spec.get("backoffLimit", 0) and (spec.get("clusterSelector") or spec.get("submissionMode") == "InteractiveMode"):
        found.append("backoffLimit")
    return found


def _service_violations(spec: dict[str, Any]) -> list[str]:
    found = []
    strategy = spec.get("upgradeStrategy", {})
    if strategy.get("type") not in (None, "None", "NewCluster", "NewClusterWithIncrementalUpgrade"):
        found.append("upgrade type")
    if spec.get("rayClusterDeletionDelaySeconds", 0) < 0:
        found.append("deletion delay")
    if strategy.get("type") == "NewClusterWithIncrementalUpgrade":
        options = strategy.get("clusterUpgradeOptions", {})
        step, surge = options.get("stepSizePercent", -1), options.get("maxSurgePercent", 100)
        autoscaling = spec["rayClusterConfig"].get("enableInTreeAutoscaling")
        steps = 0 <= step <= surge <= 100 and options.get("intervalSeconds", 0) > 0
        if not (autoscaling and steps and options.get("gatewayClassName")):
            found.append("incremental upgrade")
    return found


def test_operator_takes_every_object(everything):
    assert {manifest["kind"] for _, manifest in everything} == {"RayService", "RayJob"}
    for case, manifest in everything:
        assert violations(manifest) == [], case


def test_long_release_name_still_gives_legal_names(charts):
    for document in charts["long name"]:
        name = document["metadata"]["name"]
        assert len(name) <= 47, document["kind"]
        assert DNS_1035.fullmatch(name), document["kind"]


def test_what_the_operator_does_not_demand_but_operations_taught(everything):
    for case, manifest in everything:
        cluster = manifest["spec"].get("rayClusterConfig") or manifest["spec"]["rayClusterSpec"]
        assert cluster["authOptions"]["mode"] == "token", case
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", case
        ports = {port["name"] for port in cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]}
        assert "client" not in ports, "10001 runs code for whoever reaches it, and nothing of ours uses it"
        if manifest["kind"] == "RayService":
            assert manifest["spec"]["excludeHeadPodFromServeSvc"] is True, case
            assert "serve" in ports, "KubeRay makes the Service of serving from this port"
        else:
            assert manifest["spec"]["submissionMode"] == "K8sJobMode", case
            assert manifest["spec"]["activeDeadlineSeconds"] > 0, case


SERVICE_BREAKAGES: dict[str, dict[str, Any]] = {
    "token auth": {"rayVersion": "2.51.0"},
    "k8s token auth": {"authOptions": {"mode": "token", "enableK8sTokenAuth": True}},
    "upgradeStrategy in cluster": {"upgradeStrategy": {"type": "Recreate"}},
    "alpha networkPolicy": {"networkPolicy": {}},
    "redis without options": {"env": "RAY_REDIS_ADDRESS"},
    "redis variables": {"env": "REDIS_PASSWORD", "gcsFaultToleranceOptions": {"redisAddress": "redis:6379"}},
}


@pytest.mark.parametrize("rule", SERVICE_BREAKAGES)
def test_broken_cluster_is_noticed(charts, rule):
    service = copy.deepcopy(next(d for d in charts["default"] if d["kind"] == "RayService"))
    cluster = service["spec"]["rayClusterConfig"]
    change = dict(SERVICE_BREAKAGES[rule])
    if variable := change.pop("env", None):
        cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["env"].append({"name": variable, "value": "x"})
    cluster.update(change)
    assert violations(service) == [rule]


JOB_BREAKAGES: dict[str, dict[str, Any]] = {
    "ttl without shutdown": {"shutdownAfterJobFinishes": False},
    "deletionRules with shutdown": {"deletionStrategy": {"deletionRules": [{}]}},
    "sidecar with submitter": {"submissionMode": "SidecarMode"},
    "backoffLimit": {"submissionMode": "InteractiveMode", "backoffLimit": 1},
    "deadlines": {"activeDeadlineSeconds": 0},
}


@pytest.mark.parametrize("rule", JOB_BREAKAGES)
def test_broken_job_is_noticed(charts, rule):
    job = copy.deepcopy(next(d for d in charts["training"] if d["kind"] == "RayJob"))
    job["spec"].update(JOB_BREAKAGES[rule])
    assert violations(job) == [rule]


def test_broken_group_is_noticed(charts):
    service = copy.deepcopy(next(d for d in charts["default"] if d["kind"] == "RayService"))
    [group] = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    group.update(minReplicas=5, rayStartParams={"num-cpus": 4, "labels": "a=b"})
    group["template"]["spec"]["restartPolicy"] = "Always"
    service["metadata"]["name"] = "7x"
    service["spec"]["upgradeStrategy"] = {"type": "NewClusterWithIncrementalUpgrade"}
    assert set(violations(service)) == {
        "name",
        "replicas",
        "labels in rayStartParams",
        "rayStartParams not strings",
        "restartPolicy",
        "incremental upgrade",
    }
