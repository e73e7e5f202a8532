"""The chart, rendered by the real helm for a matrix of values. No cluster, no Ray."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

REPO = Path(__file__).parents[2]
CHART = REPO / "k8s" / "chart"
HELM = Path(sys.executable).parent / "helm"

GPU_CONFIG = """
name: support
store: {uri: "http://milvus.milvus.svc:19530"}
storage: {url: "s3://metier/gpu"}
training: {workers: 8, cpus_per_worker: 3.5, gpus_per_worker: 1}
serving:
  request_timeout_s: 45.5
  generator: {min_replicas: 2, max_replicas: 8, cpus: 2, gpus: 1}
"""

CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "training": {"training": {"enabled": True}},
    "training only": {"training": {"enabled": True, "run": "night-7"}, "serving": {"enabled": False}},
    "autoscaling off": {"serving": {"autoscaling": {"enabled": False}, "worker": {"minReplicas": 2}}},
    "gpu": {
        "config": GPU_CONFIG,
        "image": {"digest": "sha256:" + "a" * 64, "pullSecrets": [{"name": "registry"}]},
        "auth": {"secretName": "ray-token"},
        "data": {"claimName": "corvane"},
        "serving": {
            "overrides": ["serving.max_tokens=64"],
            "worker": {
                "minReplicas": 2,
                "gpus": 1,
                "nodeSelector": {"pool": "gpu"},
                "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
            },
        },
        "training": {
            "enabled": True,
            "worker": {
                "memory": "64Gi",
                "nodeSelector": {"pool": "gpu"},
                "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
            },
        },
    },
    "bare": {
        "milvus": {"secretName": ""},
        "objectStore": {"secretName": ""},
        "networkPolicy": {"enabled": False},
        "serviceAccount": {"create": False, "name": "cloud-identity"},
        "training": {"enabled": True},
    },
}

Documents = list[dict[str, Any]]


def helm(*arguments: str, values: dict[str, Any] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [HELM, *arguments, *(["--values", "-"] if values is not None else [])],
        input=json.dumps(values or {}),
        capture_output=True,
        text=True,
        cwd=REPO,
        check=False,
    )


def render(values: dict[str, Any], release: str = "metier") -> Documents:
    done = helm("template", release, str(CHART), values=values)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


@pytest.fixture(name="helm", scope="session")
def _helm() -> Callable[..., subprocess.CompletedProcess[str]]:
    return helm


@pytest.fixture(name="render", scope="session")
def _render() -> Callable[..., Documents]:
    return render


@pytest.fixture(scope="session")
def charts() -> dict[str, Documents]:
    """All documents of each case; the last case has the longest release name Helm takes."""
    rendered = {case: render(values) for case, values in CASES.items()}
    rendered["long name"] = render({"training": {"enabled": True, "run": "r" * 10}}, release="7." + "x-" * 25 + "x")
    return rendered


@pytest.fixture(scope="session")
def ray_objects(charts: dict[str, Documents]) -> list[tuple[str, dict[str, Any]]]:
    """Every RayService and RayJob of the matrix, with the name of its case."""
    return [(case, document) for case, documents in charts.items() for document in documents if ray_spec(document)]


def ray_spec(document: dict[str, Any]) -> dict[str, Any] | None:
    """The RayClusterSpec inside a RayService or RayJob."""
    spec = document.get("spec") or {}
    return spec.get("rayClusterConfig") or spec.get("rayClusterSpec")


def pods(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every pod template of a RayService or RayJob: head, workers, submitter."""
    cluster = ray_spec(document)
    if cluster:
        yield cluster["headGroupSpec"]["template"]
        yield from (group["template"] for group in cluster["workerGroupSpecs"])
    if "submitterPodTemplate" in document.get("spec", {}):
        yield document["spec"]["submitterPodTemplate"]


@pytest.fixture(scope="session")
def pod_templates(ray_objects: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    return [(f"{case}/{ray['kind']}", pod) for case, ray in ray_objects for pod in pods(ray)]
