"""The RayJob from Python: sized by the demand, equal to the chart's, printable, refusing bad names."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import yaml

from cluster.config import load
from cluster.errors import BadInput
from cluster.resources import Amount, check, demand, total
from k8s.render import Site, capacity, main, quantity, ray_job, to_yaml

REPO = Path(__file__).parents[2]
CONFIG = REPO / "k8s" / "chart" / "files" / "metier.yaml"


def job(config=None, **options):
    defaults = {"image": "metier:0.1.0", "name": "metier-training", "config_map": "metier-config"}
    return ray_job(config or load(CONFIG), **(defaults | options))


def without_packaging(manifest):
    """The chart's object less the two labels that say Helm made it."""
    labels = manifest["metadata"]["labels"]
    kept = {k: v for k, v in labels.items() if k not in ("helm.sh/chart", "app.kubernetes.io/managed-by")}
    return manifest | {"metadata": manifest["metadata"] | {"labels": kept}}


GPU_SITE = Site(
    auth_secret="ray-token",
    data_claim="corvane",
    pull_secrets=("registry",),
    worker_memory="64Gi",
    node_selector={"pool": "gpu"},
    tolerations=({"key": "nvidia.com/gpu", "operator": "Exists"},),
)


@pytest.mark.parametrize(
    ("case", "site", "image"),
    [
        ("training", Site(), "metier:0.1.0"),
        ("gpu", GPU_SITE, "metier@sha256:" + "a" * 64),
        (
            "bare",
            Site(service_account="cloud-identity", milvus_secret=None, object_store_secret=None),
            "metier:0.1.0",
        ),
    ],
)
def test_chart_and_python_write_the_same_job(charts, tmp_path, case, site, image):
    [chart_job] = [document for document in charts[case] if document["kind"] == "RayJob"]
    [config_map] = [document for document in charts[case] if document["kind"] == "ConfigMap"]
    file = tmp_path / "metier.yaml"
    file.write_text(config_map["data"]["metier.yaml"])
    assert without_packaging(chart_job) == without_packaging(job(load(file), site=site, image=image))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["training.workers=5", "training.cpus_per_worker=0.5"],
        ["training.workers=16", "training.gpus_per_worker=1", "training.cpus_per_worker=7.5"],
    ],
)
def test_worker_pods_hold_the_demand(overrides):
    config = load(CONFIG, overrides)
    offered, asked = capacity(job(config)), demand(config, "train")
    check(asked, offered)
    assert offered.gpus == total(asked).gpus
    [group] = job(config)["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["minReplicas"] == group["maxReplicas"] == config.training.workers


def test_cpu_training_asks_for_no_gpu():
    assert "nvidia.com/gpu" not in to_yaml(job())


@pytest.mark.parametrize("name", ["x" * 48, "Run", "7-run", "run_7", "run-", ""])
def test_names_that_kuberay_refuses(name):
    with pytest.raises(BadInput, match="at most 47"):
        job(name=name)


def test_yaml_reads_back_and_has_no_anchors():
    text = to_yaml(job())
    assert yaml.safe_load(text) == job()
    assert "&id" not in text and "*id" not in text


def test_capacity_counts_like_kuberay():
    def group(limits, **rest):
        template = {"spec": {"containers": [{"resources": {"limits": limits}}]}}
        return {"minReplicas": 2, "template": template} | rest

    def service(*groups):
        return {"kind": "RayService", "spec": {"rayClusterConfig": {"workerGroupSpecs": list(groups)}}}

    two = service(
        group({"cpu": "1500m", "memory": "1Gi"}),
        group({"cpu": 8, "memory": "2G", "nvidia.com/gpu": "1"}, minReplicas=3, rayStartParams={"num-cpus": "4"}),
    )
    assert capacity(two) == Amount(cpus=2 * 2 + 3 * 4, gpus=3, memory=2 * 2**30 + 3 * 2 * 10**9)
    assert capacity(service(group({"cpu": "1", "memory": "1Gi"}, numOfHosts=4))).cpus == 8


def test_capacity_of_something_else():
    with pytest.raises(BadInput, match="Deployment has no worker groups"):
        capacity({"kind": "Deployment", "spec": {}})


def test_quantities():
    assert [quantity(value) for value in ("250m", 2, "1.5", "1Ki", "3M")] == [0.25, 2, 1.5, 1024, 3e6]
    with pytest.raises(BadInput, match="'8 GB' is not a Kubernetes quantity"):
        quantity("8 GB")


def test_command_line_prints_the_job(capsys):
    arguments = [
        "--name",
        "run-7",
        "--image",
        "metier:0.1.0",
        "--config-map",
        "run-7-config",
        "--data-claim",
        "corvane",
    ]
    assert main(["job", "--config", str(CONFIG), *arguments]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed == job(name="run-7", config_map="run-7-config", site=Site(data_claim="corvane"))


def test_command_line_checks_manifests(capsys, monkeypatch, helm, tmp_path):
    rendered = helm("template", "metier", str(REPO / "k8s" / "chart")).stdout
    monkeypatch.setattr("sys.stdin", io.StringIO(rendered))
    assert main(["check", "--config", str(CONFIG)]) == 0
    assert "RayService metier: 4 CPU" in capsys.readouterr().out
    large = tmp_path / "large.yaml"
    large.write_text("serving: {generator: {min_replicas: 3, max_replicas: 3, cpus: 2}}")
    monkeypatch.setattr("sys.stdin", io.StringIO(rendered))
    assert main(["check", "--config", str(large)]) == 6
    assert "serving.generator.min_replicas" in capsys.readouterr().err
