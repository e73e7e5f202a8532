"""Logging: one set-up for every process, human lines or one JSON object a line, on standard error.

Prompts, answers, documents and secrets are not logged at any level; code that wants to say something about a text
logs its length or its digest.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from typing import Any

from cluster.config import LoggingConfig

STANDARD = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
LOUD = ("matplotlib", "httpx", "httpcore", "urllib3", "filelock", "sentence_transformers", "fsspec", "botocore", "s3fs")
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Environment of our processes and those they start: nobody is told that we run, and libraries draw no bars of theirs."""


class JsonFormatter(logging.Formatter):
    """``{"ts", "level", "logger", "msg", ...}`` with whatever was passed as ``extra=``."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "ts": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "msg": record.getMessage(),
        }
        entry |= _extras(record)
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str, ensure_ascii=False)


class HumanFormatter(logging.Formatter):
    """``12:03:55 info  retrieval.ingest: 48 documents read  collection=corvane``."""

    def format(self, record: logging.LogRecord) -> str:
        extra = " ".join(f"{key}={value}" for key, value in _extras(record).items())
        line = f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {record.levelname.lower():7} {record.name}: {record.getMessage()}"
        if extra:
            line += f"  {extra}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def _extras(record: logging.LogRecord) -> dict[str, Any]:
    """What was passed as ``extra=``; what a library marks records with (Ray: ``_ray_timestamp_ns``) is not."""
    return {key: value for key, value in vars(record).items() if key not in STANDARD and not key.startswith("_")}


def setup(config: LoggingConfig) -> None:
    """Install the one handler; a second call replaces it. Call it before a heavy library is imported."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if config.format == "json" else HumanFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(config.level.upper())
    logging.getLogger("DeepSpeed").addFilter(_not_to_stdout)
    for name in LOUD:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    # That it would rather fetch a faster kernel from a hub is nothing a user can or should act on.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def _not_to_stdout(record: logging.LogRecord) -> bool:
    """DeepSpeed logs to stdout, where results and ``--json`` go; its errors take our way instead."""
    if record.levelno >= logging.ERROR:
        logging.getLogger().handle(record)
    return False
