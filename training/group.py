"""How training workers meet over the network: gloo listens at the address under which Ray knows the node.

Not covered: NCCL, which passes over loopback by itself and has settings of its own.
"""

from __future__ import annotations

import os
from typing import Any

import psutil
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend
from ray.util import get_node_ip_address

GLOO = "GLOO_SOCKET_IFNAME"


class GroupConfig(TorchConfig):
    """Ray's; before the process group is set up, every worker names the network device it listens on."""

    @property
    def backend_cls(self) -> Any:
        return _GroupBackend


class _GroupBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(choose_device)
        super().on_start(worker_group, backend_config)


def choose_device() -> None:
    """Name the device that holds this node's address to gloo, unless whoever started Ray has named one.

    Left alone, gloo listens where the host name resolves to, which on many machines is loopback: workers of other
    nodes then do not reach it.
    """
    if GLOO in os.environ:
        return
    address = get_node_ip_address()
    for device, held in psutil.net_if_addrs().items():
        if any(one.address == address for one in held):
            os.environ[GLOO] = device
            return
