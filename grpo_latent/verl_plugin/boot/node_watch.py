"""Which nodes of a cluster are lost: Ray has given them up, or they answer nobody.

Ray declares a node dead after several health checks in vain, with its own defaults after more than
a minute where the machine is cut off without a word. A run that waits for such a node waits all
the while. So whoever watches a run also knocks at the port of each node's raylet.
"""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from typing import Any

import ray

from grpo_latent.errors import NodeLostError
from grpo_latent.verl_plugin.boot.cluster_resources import alive_nodes

SILENT_S = 20.0  # of a node in a run that goes on; cables and switches recover within seconds
KNOCK_S = (
    2.0  # a handshake takes milliseconds, and one that is repeated for a lost packet a second
)


@dataclass(frozen=True)
class LostNode:
    """A node that was there when the watch began.

    Attributes:
        detail: how it is known to be lost.
        held: what of the run was on it, in words.
    """

    address: str
    detail: str
    held: tuple[str, ...] = ()

    def error(self, position: str) -> NodeLostError:
        """The error to raise; `position` says how far the run has come, in words."""
        held = f", which held: {', '.join(self.held)}" if self.held else ""
        return NodeLostError(
            "a node of the run is lost",
            where=f"node {self.address}, {position}",
            got=f"{self.detail}{held}",
            expected="every node reachable until the run ends",
            fix="The same command again goes on from the last checkpoint, on the nodes that are "
            "left: choose trainer.nnodes and trainer.n_gpus_per_node for them.",
        )


class NodeWatch:
    """The nodes of the cluster since the watch began, but for the one that this runs on."""

    def __init__(self):
        here = ray.get_runtime_context().get_node_id()
        self._nodes = [node for node in alive_nodes() if node["NodeID"] != here]
        self._silent_since: dict[str, float] = {}

    def first_lost(self, has_failed: bool) -> tuple[str, str] | None:
        """Address of a lost node, and how it is known; None where there is none.

        Args:
            has_failed: the run has failed, and a node that does not answer at once is why.
        """
        if not self._nodes:
            return None
        alive = {node["NodeID"] for node in alive_nodes()}
        for node in self._nodes:
            name, address = node["NodeID"], node["NodeManagerAddress"]
            if name not in alive:
                return address, "Ray has declared it dead"
            reason = _knock(node)
            if reason is None:
                self._silent_since.pop(name, None)
                continue
            silent_s = time.monotonic() - self._silent_since.setdefault(name, time.monotonic())
            if has_failed or silent_s >= SILENT_S:
                return address, f"its raylet does not answer ({reason})"
        return None


def _knock(node: dict[str, Any]) -> str | None:
    """Why no connection to a node's raylet can be had; None where one can."""
    try:
        where = (node["NodeManagerAddress"], node["NodeManagerPort"])
        socket.create_connection(where, timeout=KNOCK_S).close()
    except OSError as error:
        return str(error)
    return None
