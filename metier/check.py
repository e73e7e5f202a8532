"""``metier check``: will it work here? Every prerequisite tried, each with what to do if it fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import typer

from cluster.config import Config
from cluster.errors import MetierError, NotFound, ResourcesShort
from metier.console import print_json, table
from metier.options import ConfigOption, JsonOption, SetOption, open_config, open_registry

MIN_FREE_BYTES = 2 * 10**9
"""Room for the default models, the index and a training run."""


def check(config: ConfigOption = None, set_: SetOption = None, json: JsonOption = False) -> None:
    """Try models, data, storage, Milvus, port, disk and resources, and say what is missing."""
    settings = open_config(config, set_)
    findings = []
    for name, probe in PROBES.items():
        try:
            findings.append((name, "ok", probe(settings)))
        except MetierError as error:
            findings.append((name, "FAILED", error.message))
    if json:
        print_json([{"check": name, "ok": state == "ok", "detail": detail} for name, state, detail in findings])
    else:
        table(("check", "", "detail"), findings)
    if any(state != "ok" for _, state, _ in findings):
        raise typer.Exit(5)


def _base(config: Config) -> str:
    from cluster.models import identity, resolve

    directory = resolve(config.base, config.models_cache)
    return f"{directory} (architecture {identity(directory).architecture})"


def _embedder(config: Config) -> str:
    from cluster.models import resolve

    return str(resolve(config.embedder, config.models_cache))


def _data(config: Config) -> str:
    from training.data.load import load_rows
    from training.data.rows import read_rows

    if config.knowledge.documents is None or not Path(config.knowledge.documents).is_dir():
        raise NotFound(f"knowledge.documents: '{config.knowledge.documents}' is not a directory")
    sources = config.data.train
    train = load_rows(config.data, sources, config.training.objective).rows if sources else []
    return f"{len(train)} training rows, {len(read_rows(config.data.heldout))} held-out questions"


def _storage(config: Config) -> str:
    registry = open_registry(config)
    return f"{config.storage.url}: {len(registry.adapters())} adapters, {len(registry.releases())} releases"


def _milvus(config: Config) -> str:
    from retrieval.embedded import serve
    from retrieval.store import Store

    name = config.knowledge.name
    latest = open_registry(config).knowledge_latest(name)
    with serve(config.store) as uri:
        store = Store(config.store, uri)
        there = latest is not None and store.exists(latest.collection)
        store.close()
    if latest is not None and not there:
        raise NotFound(
            f"{config.store.uri} answers, but lacks {latest.collection}, where knowledge '{name}' v{latest.number} is; check store.uri, or drop it and run `metier index`"
        )
    return f"{config.store.uri} answers; knowledge '{name}' {f'v{latest.number} is there' if latest else 'is not there yet'}"


def _port(config: Config) -> str:
    from metier import process
    from serving.up import check_port

    if running := process.read(config):
        return f"our own server is up at {running.url}"
    check_port(config)
    return f"{config.serving.host}:{config.serving.port} is free"


def _disk(config: Config) -> str:
    import psutil

    there = next(path for path in (Path(config.models_cache), *Path(config.models_cache).parents) if path.exists())
    free = psutil.disk_usage(str(there)).free
    if free < MIN_FREE_BYTES:
        raise ResourcesShort(f"{free / 1e9:.1f} GB free under {there}, {MIN_FREE_BYTES / 1e9:.0f} GB wanted; free some")
    return f"{free / 1e9:.0f} GB free under {there}"


def _resources(config: Config) -> str:
    import os

    from cluster.resources import Amount, check, demand, total

    if config.ray.address != "local":
        return f"Ray runs at {config.ray.address}; checked when something is launched there"
    capacity = Amount(cpus=config.ray.num_cpus or os.cpu_count() or 1, gpus=_gpus())
    for role in ("train", "serve"):
        check(demand(config, role), capacity)
    needs = ", ".join(f"{role} {total(demand(config, role)).cpus:g}" for role in ("train", "serve"))
    return f"{capacity.cpus:g} CPUs, {capacity.gpus:g} GPUs here; wanted: {needs} CPUs"


def _gpus() -> int:
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


PROBES: dict[str, Callable[[Config], str]] = {
    "disk": _disk,
    "resources": _resources,
    "data": _data,
    "storage": _storage,
    "base model": _base,
    "embedder": _embedder,
    "Milvus": _milvus,
    "port": _port,
}
