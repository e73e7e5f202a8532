"""A training run as a KubeRay RayJob, from the configuration it will run with.

Pure functions from values to plain dictionaries: nothing here talks to a cluster or starts Ray. :func:`ray_job` gives
the same object as ``templates/rayjob.yaml`` of the chart (a test compares them), and :func:`capacity` says what the
worker pods of a RayJob or RayService offer, for ``cluster.resources.check``.

    python -m k8s.render job --config FILE --name run-7 --image IMAGE --config-map run-7 | kubectl apply -f -
    helm template metier k8s/chart | python -m k8s.render check --config k8s/chart/files/metier.yaml

Not covered: submitting and watching the job (kubectl does), RayService (the chart does), autoscaled training,
queueing (Kueue, Volcano), and validating a manifest beyond its capacity.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from cluster.config import MILVUS_TOKEN_VARIABLE, Config, load
from cluster.errors import BadInput, MetierError
from cluster.resources import Amount, Role, check, demand

Manifest = dict[str, Any]

RAY_VERSION = "2.60.0"
"""Ray inside the image; the pin of requirements.lock. KubeRay decides by it how it starts and probes Ray."""
CONFIG_FILE = "/etc/metier/metier.yaml"
MODELS_CACHE = "/var/cache/metier"
USER = 10001
"""Of the image, see Dockerfile."""
MAX_NAME = 47
"""KubeRay appends to a RayJob's name what makes its cluster and pods; longer names are refused by its operator."""

_NAME = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")
_QUANTITY = re.compile(r"(?P<number>\d+(?:\.\d+)?)(?P<unit>m|k|[KMGT]i|[MGT])?")
_UNITS: dict[str | None, float] = {None: 1, "m": 1e-3, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12} | {
    f"{prefix}i": 1024**power for power, prefix in enumerate("KMGT", start=1)
}


@dataclass(frozen=True)
class Site:
    """What the namespace offers to a run; the defaults are those of the chart installed as ``metier``."""

    instance: str = "metier"
    """Full name of the chart's release: its NetworkPolicy for training selects by it."""
    service_account: str = "metier"
    auth_secret: str | None = None
    """Secret whose key `auth_token` guards Ray's dashboard and jobs; without one KubeRay makes it."""
    milvus_secret: str | None = "metier-milvus"
    milvus_token_key: str = "token"
    object_store_secret: str | None = "metier-object-store"
    object_store_keys: tuple[str, ...] = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    """Keys of that Secret; each becomes an environment variable of the same name."""
    data_claim: str | None = None
    """PersistentVolumeClaim mounted read-only under /data."""
    cache_size: str = "20Gi"
    """Disk per pod for model files."""
    pull_policy: str = "IfNotPresent"
    pull_secrets: tuple[str, ...] = ()
    head_cpu: str = "2"
    head_memory: str = "8Gi"
    worker_memory: str = "8Gi"
    node_selector: Mapping[str, str] = field(default_factory=dict)
    """Nodes for the worker pods."""
    tolerations: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Limits:
    """How long a run may take and how often it is begun again; seconds."""

    active_s: int = 86400
    """All in all."""
    pre_running_s: int = 1800
    """Waiting for its pods."""
    ttl_s: int = 3600
    """After the end, until the cluster and its logs are deleted."""
    retries: int = 0
    """Each on a new Ray cluster; the run resumes from its last checkpoint in storage."""


def ray_job(
    config: Config,
    *,
    image: str,
    name: str,
    config_map: str,
    ray_version: str = RAY_VERSION,
    site: Site = Site(),
    limits: Limits = Limits(),
) -> Manifest:
    """A RayJob that runs ``metier train`` with `config`: one worker pod for each training worker.

    `config_map` names a ConfigMap whose key ``metier.yaml`` is the file `config` was loaded from.

    Raises:
        BadInput: `name` is not one KubeRay takes.
    """
    if len(name) > MAX_NAME or not _NAME.fullmatch(name):
        raise BadInput(
            f"name '{name}' must be at most {MAX_NAME} lower-case letters, digits and '-', the first a letter",
            param="name",
        )
    asks = demand(config, "train")
    workers = sum(ask.count for ask in asks)
    labels = {
        "app.kubernetes.io/name": "metier",
        "app.kubernetes.io/instance": site.instance,
        "app.kubernetes.io/component": "training",
    }
    worker_resources = _resources(
        str(math.ceil(max(ask.each.cpus for ask in asks))),
        site.worker_memory,
        math.ceil(max(ask.each.gpus for ask in asks)),
    )
    head_ports = {"gcs-server": 6379, "dashboard": 8265, "metrics": 8080}
    head = _container("ray-head", image, site) | {
        "ports": [{"name": port, "containerPort": number} for port, number in head_ports.items()],
        "resources": _resources(site.head_cpu, site.head_memory),
    }
    worker = _container("ray-worker", image, site) | {
        "lifecycle": {"preStop": {"exec": {"command": ["/bin/sh", "-c", "ray stop"]}}},
        "resources": worker_resources,
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name, "labels": labels | {"app.kubernetes.io/managed-by": "metier"}},
        "spec": {
            "entrypoint": f"metier train --config {CONFIG_FILE}",
            "submissionMode": "K8sJobMode",
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": limits.ttl_s,
            "activeDeadlineSeconds": limits.active_s,
            "preRunningDeadlineSeconds": limits.pre_running_s,
            "backoffLimit": limits.retries,
            "submitterPodTemplate": {"metadata": {"labels": labels}, "spec": _submitter(image, site)},
            "rayClusterSpec": {
                "rayVersion": ray_version,
                "authOptions": {"mode": "token"} | ({"secretName": site.auth_secret} if site.auth_secret else {}),
                "enableInTreeAutoscaling": False,
                "headGroupSpec": {
                    "rayStartParams": {"num-cpus": "0"},
                    "template": {"metadata": {"labels": labels}, "spec": _pod(head, config_map, site)},
                },
                "workerGroupSpecs": [
                    {
                        "groupName": "workers",
                        "replicas": workers,
                        "minReplicas": workers,
                        "maxReplicas": workers,
                        "rayStartParams": {},
                        "template": {
                            "metadata": {"labels": labels},
                            "spec": _pod(worker, config_map, site) | _placement(site),
                        },
                    }
                ],
            },
        },
    }


def to_yaml(manifest: Manifest) -> str:
    """`manifest` as a YAML document, keys in their order, no anchors."""
    return yaml.dump(manifest, Dumper=_PlainDumper, sort_keys=False, allow_unicode=True, width=120)


def capacity(manifest: Manifest) -> Amount:
    """CPUs, GPUs and memory that the worker groups of a RayService or RayJob offer with `minReplicas` pods.

    Counted as KubeRay starts Ray: ``num-cpus``/``num-gpus`` of ``rayStartParams``, else the limits of the first
    container, CPUs rounded up. The head pod is not counted.

    Raises:
        BadInput: `manifest` is of another kind, or a quantity cannot be read.
    """
    spec = manifest.get("spec", {})
    cluster = spec.get("rayClusterConfig" if manifest.get("kind") == "RayService" else "rayClusterSpec")
    if manifest.get("kind") not in ("RayService", "RayJob") or cluster is None:
        raise BadInput(f"{manifest.get('kind')} has no worker groups; give a RayService or a RayJob")
    return sum((_offer(group) for group in cluster.get("workerGroupSpecs", [])), Amount())


def quantity(value: str | int | float) -> float:
    """A Kubernetes quantity (``500m``, ``8Gi``) as a number.

    Raises:
        BadInput: it is none.
    """
    match = _QUANTITY.fullmatch(str(value))
    if match is None:
        raise BadInput(f"'{value}' is not a Kubernetes quantity; write it like 500m, 2 or 8Gi")
    return float(match["number"]) * _UNITS[match["unit"]]


def _offer(group: Mapping[str, Any]) -> Amount:
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    start = group.get("rayStartParams", {})
    pod = Amount(
        cpus=float(start.get("num-cpus", math.ceil(quantity(limits["cpu"])))),
        gpus=float(start.get("num-gpus", quantity(limits.get("nvidia.com/gpu", 0)))),
        memory=int(quantity(limits["memory"])),
    )
    return pod.times(group["minReplicas"] * group.get("numOfHosts", 1))


def _container(name: str, image: str, site: Site) -> Manifest:
    """A Ray container without ports and resources. Probes are left to KubeRay."""
    env = []
    if site.milvus_secret:
        env.append(_secret_env(MILVUS_TOKEN_VARIABLE, site.milvus_secret, site.milvus_token_key))
    if site.object_store_secret:
        env += [_secret_env(key, site.object_store_secret, key) for key in site.object_store_keys]
    mounts: list[Manifest] = [
        {"name": "config", "mountPath": "/etc/metier", "readOnly": True},
        {"name": "cache", "mountPath": MODELS_CACHE},
    ]
    if site.data_claim:
        mounts.append({"name": "data", "mountPath": "/data", "readOnly": True})
    return {
        "name": name,
        "image": image,
        "imagePullPolicy": site.pull_policy,
        **({"env": env} if env else {}),
        "securityContext": _container_security(),
        "volumeMounts": mounts,
    }


def _pod(container: Manifest, config_map: str, site: Site) -> Manifest:
    volumes: list[Manifest] = [
        {"name": "config", "configMap": {"name": config_map}},
        {"name": "cache", "emptyDir": {"sizeLimit": site.cache_size}},
    ]
    if site.data_claim:
        volumes.append({"name": "data", "persistentVolumeClaim": {"claimName": site.data_claim, "readOnly": True}})
    return {
        "serviceAccountName": site.service_account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": _pod_security() | {"fsGroup": USER},
        **_pull_secrets(site),
        "containers": [container],
        "volumes": volumes,
    }


def _submitter(image: str, site: Site) -> Manifest:
    """The pod that hands the entrypoint to Ray's job server and follows its log."""
    container = {
        "name": "ray-job-submitter",
        "image": image,
        "imagePullPolicy": site.pull_policy,
        "resources": _resources("500m", "1Gi"),
        "securityContext": _container_security(),
    }
    return {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": _pod_security(),
        **_pull_secrets(site),
        "containers": [container],
    }


def _placement(site: Site) -> Manifest:
    selector = {"nodeSelector": dict(site.node_selector)} if site.node_selector else {}
    tolerations = {"tolerations": [dict(toleration) for toleration in site.tolerations]} if site.tolerations else {}
    return {**selector, **tolerations}


def _pull_secrets(site: Site) -> Manifest:
    return {"imagePullSecrets": [{"name": name} for name in site.pull_secrets]} if site.pull_secrets else {}


def _secret_env(name: str, secret: str, key: str) -> Manifest:
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}


def _resources(cpu: str, memory: str, gpus: int = 0) -> Manifest:
    amounts: Manifest = {"cpu": cpu, "memory": memory} | ({"nvidia.com/gpu": gpus} if gpus else {})
    return {"requests": amounts, "limits": amounts}


def _container_security() -> Manifest:
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "runAsNonRoot": True,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _pod_security() -> Manifest:
    return {
        "runAsGroup": USER,
        "runAsNonRoot": True,
        "runAsUser": USER,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


class _PlainDumper(yaml.SafeDumper):
    """Writes shared parts out each time: anchors are valid YAML that nobody wants to review."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m k8s.render", description=(__doc__ or "").partition("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    job = verbs.add_parser("job", help="print the RayJob of a training run")
    job.add_argument("--name", required=True, help="of the run; at most 47 characters")
    job.add_argument("--image", required=True)
    job.add_argument("--config-map", required=True, help="ConfigMap with the same file under the key metier.yaml")
    job.add_argument("--instance", default="metier", help="full name of the chart's release (default: %(default)s)")
    job.add_argument("--data-claim", help="PersistentVolumeClaim with documents and rows, mounted under /data")
    job.add_argument("--worker-memory", default=Site.worker_memory, help="per worker pod (default: %(default)s)")
    verbs.add_parser("check", help="read manifests from standard input and compare worker pods with the demand")
    for verb in verbs.choices.values():
        verb.add_argument("--config", required=True, metavar="FILE")
    options = parser.parse_args(arguments)
    try:
        config = load(options.config)
        if options.verb == "check":
            for document in yaml.safe_load_all(sys.stdin):
                _check(document, config)
        else:
            site = Site(
                instance=options.instance,
                service_account=options.instance,
                data_claim=options.data_claim,
                worker_memory=options.worker_memory,
            )
            manifest = ray_job(config, image=options.image, name=options.name, config_map=options.config_map, site=site)
            sys.stdout.write(to_yaml(manifest))
    except MetierError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


def _check(manifest: Manifest | None, config: Config) -> None:
    roles: dict[str, Role] = {"RayService": "serve", "RayJob": "train"}
    role = roles.get((manifest or {}).get("kind", ""))
    if manifest and role:
        offered = capacity(manifest)
        check(demand(config, role), offered)
        name = f"{manifest['kind']} {manifest['metadata']['name']}"
        sys.stdout.write(f"{name}: {offered.cpus:g} CPU, {offered.gpus:g} GPU are enough\n")


if __name__ == "__main__":
    raise SystemExit(main())
