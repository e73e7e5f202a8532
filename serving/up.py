"""Bring the pipeline up on this machine or on a running Ray cluster, and take it down again."""

from __future__ import annotations

import contextlib
import logging
import re
import socket
from collections.abc import Callable, Iterator

from cluster import errors, runtime
from cluster.config import Config
from cluster.errors import BadInput, MetierError, ResourcesShort, Unavailable
from cluster.resources import check, demand
from retrieval.embedded import EMBEDDED, serve

Say = Callable[[str], None]
OURS = re.compile(r".*\bcluster\.errors\.(\w+): (.+)", re.DOTALL)
"""The last error of ours in a traceback, which is all that Serve passes on of it."""


@contextlib.contextmanager
def running(config: Config, say: Say) -> Iterator[None]:
    """The pipeline of `config` for the length of a ``with``: store, Ray, replicas; all of it is gone afterwards.

    Raises:
        ResourcesShort: the port is taken, or the machine has too few CPUs or GPUs.
        Unavailable: Milvus or Ray does not start, or a replica fails to.
    """
    check_port(config)
    with serve(config.store) as uri:
        config = config.model_copy(update={"store": config.store.model_copy(update={"uri": uri})})
        say(f"Milvus at {uri}")
        with runtime.connect(config):
            say("Ray is up; starting ingress, retriever and generator")
            try:
                deploy(config)
                yield
            finally:
                _shutdown()


def deploy(config: Config) -> None:
    """Start the application on the connected Ray and wait until it is healthy.

    Raises:
        ResourcesShort: the cluster cannot hold the first replicas.
        MetierError: a replica failed to start.
    """
    from ray import serve as ray_serve
    from ray.serve.config import HTTPOptions
    from ray.serve.schema import LoggingConfig

    from serving.app import application

    check(demand(config, "serve"), runtime.capacity())
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    ray_serve.start(
        http_options=HTTPOptions(
            host=config.serving.host, port=config.serving.port, request_timeout_s=config.serving.request_timeout_s
        ),
        logging_config=quiet,
    )
    try:
        ray_serve.run(application(config), name=config.name, route_prefix="/", logging_config=quiet)
    except RuntimeError as error:
        raise _why(config, error) from error


def undeploy(config: Config) -> None:
    """Remove the application from the cluster at ``ray.address``; nothing happens if it is not there."""
    from ray import serve as ray_serve

    with runtime.connect(config):
        ray_serve.delete(config.name)


def stays_in_foreground(config: Config) -> bool:
    """Whether the pipeline lives in the process that starts it, rather than on a cluster of its own.

    Raises:
        BadInput: the store is the embedded one although Ray runs elsewhere.
    """
    if config.ray.address == "local":
        return True
    if config.store.uri == EMBEDDED:
        raise BadInput(
            f"store.uri is 'embedded', which only this process can reach, but ray.address is '{config.ray.address}'; "
            "give the address of a Milvus that all nodes reach",
            param="store.uri",
        )
    return False


def check_port(config: Config) -> None:
    """Raise :class:`ResourcesShort` if something else listens where we are to."""
    serving = config.serving
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((serving.host, serving.port))
        except OSError as error:
            raise ResourcesShort(
                f"port {serving.port} on {serving.host} is in use ({error.strerror}); stop what listens there "
                "(`metier down` if it is ours) or choose another with --set serving.port=PORT",
                param="serving.port",
            ) from None


def _shutdown() -> None:
    from ray import serve as ray_serve

    with contextlib.suppress(Exception):  # Ray may be gone already; what follows ends its processes
        ray_serve.shutdown()


def _why(config: Config, error: Exception) -> MetierError:
    """Why the application did not get healthy, from what Serve says of its deployments."""
    from ray import serve as ray_serve

    application = ray_serve.status().applications.get(config.name)
    if application is None:
        return Unavailable(f"Serve did not start the application: {error}")
    failed = {
        name: deployment.message.strip()
        for name, deployment in application.deployments.items()
        if deployment.status != "HEALTHY" and deployment.message
    }
    for name, message in failed.items():
        if (ours := OURS.fullmatch(message)) and isinstance(kind := getattr(errors, ours[1], None), type):
            return kind(f"{name}: {ours[2]}")  # type: ignore[no-any-return]
    messages = [f"{name}: {_last_line(message)}" for name, message in failed.items()]
    return Unavailable(
        "\n".join(messages) or f"the application is {application.status}: {_last_line(application.message)}"
    )


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no message"
