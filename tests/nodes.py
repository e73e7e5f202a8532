"""A Ray cluster of several nodes on this machine, every process of which is ours to start and to end.

Two kinds. On loopback, nodes share 127.0.0.1 and differ in ports: enough to see where a worker runs and what follows
from a killed node. In network namespaces, each node has an address of its own behind a switch, so that Ray, gloo and
DeepSpeed meet over a network whose cables can be pulled; that needs root and ``ip``. Token authentication is on in
both, and nothing outside the namespaces changes. Not covered: storage that nodes do not share, clocks that differ.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests import trade

HEALTH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "8",
}
"""How the head tells that a node is lost: eight checks in a row without an answer within three seconds each. Shorter than
Ray's own, and long enough for a node on a busy machine."""
DEVICE = "eth0"
"""The network device of every node that has a namespace."""
CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class Node:
    """One raylet with its daemons and workers, below one ``ray start --block``."""

    name: str
    address: str
    process: subprocess.Popen[bytes]
    namespace: str | None
    switch: str | None

    def members(self) -> list[psutil.Process]:
        """What runs on this node now, the ``ray start`` first; nothing once it has ended."""
        if self.process.poll() is not None:
            return []
        return [psutil.Process(self.process.pid), *trade.family(self.process.pid)]

    def workers(self) -> list[psutil.Process]:
        """The training workers on this node now."""
        return [member for member in self.members() if "RayTrainWorker" in trade.command_line(member)]

    def kill(self) -> list[psutil.Process]:
        """The power goes: all of it at once, by SIGKILL. Returns what was killed."""
        members = self.members()
        for member in members:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        self.process.wait()
        return members

    def unplug(self) -> None:
        """Pull the cable at the switch: what is under way is lost, and nobody is told."""
        assert self.switch is not None, "only a node in a namespace has a cable"
        _ip("-n", self.switch, "link", "set", self.name, "down")

    @contextmanager
    def inside(self) -> Iterator[None]:
        """What this thread starts in here sees this node's network (at once, without a namespace, what it saw)."""
        if self.namespace is None:
            yield
            return
        libc = ctypes.CDLL(None, use_errno=True)
        with open("/proc/thread-self/ns/net") as before, open(f"/run/netns/{self.namespace}") as there:
            _enter(libc, there.fileno())
            try:
                yield
            finally:
                _enter(libc, before.fileno())


@dataclass
class Cluster:
    """A head and its workers; a worker may be added at any time."""

    port: int
    environment: dict[str, str]
    network: str | None
    directory: Path
    mark: str
    nodes: list[Node] = field(default_factory=list)

    @property
    def head(self) -> Node:
        return self.nodes[0]

    @property
    def address(self) -> str:
        """``ray.address`` of this cluster."""
        return f"{self.head.address}:{self.port}"

    def add(self, cpus: int = 1) -> Node:
        """Start the next node (the first is the head) with `cpus` CPUs and wait until it has joined."""
        number = len(self.nodes)
        name = f"node{number}"
        namespace = switch = None
        address = "127.0.0.1"
        if self.network:
            namespace, switch, address = f"{self.network}-{number}", f"{self.network}-s", f"10.77.0.{number + 1}"
            _plug(namespace, switch, name, address)
        log = self.directory / f"{name}.log"
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", f"--num-cpus={cpus}"]
        command += [f"--node-ip-address={address}", "--object-store-memory=100000000"]
        command += [f"--resources={json.dumps({name: 1})}", "--include-log-monitor=false"]
        ports = ["dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port"]
        command += [f"--{port}={trade.free_port()}" for port in ports]
        if number == 0:
            command += ["--head", f"--port={self.port}", "--include-dashboard=false"]
            command += [f"--temp-dir={self.directory}", f"--ray-client-server-port={trade.free_port()}"]
        else:
            command += [f"--address={self.address}"]
        entry = ["ip", "netns", "exec", namespace] if namespace else []
        with log.open("w") as sink:
            process = subprocess.Popen(
                [*entry, *command],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )
        node = Node(name, address, process, namespace, switch)
        self.nodes.append(node)
        trade.wait_for(
            f"{name} to join", lambda: "Ray runtime started" in log.read_text() or process.poll() is not None, 300
        )
        assert process.poll() is None, log.read_text()
        return node


@contextmanager
def cluster(cpus: Sequence[int] = (1, 1), *, namespaces: bool = False, **environment: str) -> Iterator[Cluster]:
    """A cluster with a node for each of `cpus`, gone afterwards with all that ran on it.

    Its daemons and workers run in this process's environment and `environment`.

    Verbs of metier reach it with :attr:`Cluster.environment` and ``ray.address``, started ``inside`` the head.
    """
    directory = Path(tempfile.mkdtemp(prefix="mn-"))  # short: it holds Unix sockets
    mark = secrets.token_hex(16)
    binaries = str(Path(sys.executable).parent)
    environment = {
        **os.environ,
        **HEALTH,
        **environment,
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_USAGE_STATS_ENABLED": "0",
        "METIER_TEST_MARK": mark,
    }
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        network = stack.enter_context(_network()) if namespaces else None
        made = Cluster(trade.free_port(), environment, network, directory, mark)
        stack.callback(_end, made)
        for number in cpus:
            made.add(number)
        yield made


def _end(made: Cluster) -> None:
    """Kill what is there, the head last, so that no node outlives it and waits for another."""
    for node in reversed(made.nodes):
        if node.process.poll() is None:
            node.kill()
    left = trade.Desk(Path(), mark=made.mark).left()
    for process in left:  # workers whose raylet was killed before them
        with suppress(psutil.NoSuchProcess):
            process.kill()
    trade.assert_gone(left)


@contextmanager
def _network() -> Iterator[str]:
    """Namespaces whose names begin with the one yielded, and a switch in one of their own."""
    name = f"mn{secrets.token_hex(3)}"
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the program ip")
    tried = subprocess.run(["ip", "netns", "add", f"{name}-s"], capture_output=True, text=True)
    if tried.returncode != 0:
        pytest.skip(f"no network namespaces here: {tried.stderr.strip()}")
    try:
        bridged = subprocess.run(
            ["ip", "-n", f"{name}-s", "link", "add", "switch", "type", "bridge"], capture_output=True, text=True
        )
        if bridged.returncode != 0:
            pytest.skip(f"no bridges here: {bridged.stderr.strip()}")
        _ip("-n", f"{name}-s", "link", "set", "switch", "up")
        yield name
    finally:
        for made in Path("/run/netns").glob(f"{name}-*"):
            _ip("netns", "delete", made.name)


def _plug(namespace: str, switch: str, port: str, address: str) -> None:
    """A namespace with `address` on :data:`DEVICE`, whose cable ends in `port` of the switch."""
    _ip("netns", "add", namespace)
    _ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", DEVICE, "netns", namespace)
    _ip("-n", switch, "link", "set", port, "master", "switch", "up")
    _ip("-n", namespace, "address", "add", f"{address}/24", "dev", DEVICE)
    _ip("-n", namespace, "link", "set", DEVICE, "up")
    _ip("-n", namespace, "link", "set", "lo", "up")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _enter(libc: ctypes.CDLL, descriptor: int) -> None:
    """``setns(2)``, which Python has from 3.12 on."""
    if libc.setns(descriptor, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
