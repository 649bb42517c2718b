"""Ray nodes on loopback that a test may kill or stop, and jobs in processes of their own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jobs import precompute
from jobs._cli import run
from pipeline.cache.config import PrecomputeJobConfig
from tests.faults import FORK
from tests.processes import descendants, free_port, kill

FORK.set_forkserver_preload(
    ["pandas", "PIL.JpegImagePlugin", "pipeline.cache.read.reader", "ray.data", "tests.cluster.nodes"]
)

RAY = Path(sys.executable).parent / "ray"
PATIENCE = 400.0


class Node:
    """One `ray start`, and all processes below it.

    Args:
        cpus: logical ones.
        address: of the head to join, or "" to be one.
        gpus: pretended ones.
        object_store: bytes.
        environment: further variables of its processes.
    """

    def __init__(
        self,
        cpus: int,
        address: str = "",
        gpus: int = 0,
        object_store: int = 100_000_000,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = tempfile.TemporaryDirectory(
            prefix="rn", ignore_cleanup_errors=True
        )  # short: Ray puts sockets there
        self.address = address or f"127.0.0.1:{free_port()}"
        head = ["--head", f"--port={self.address.rpartition(':')[2]}", f"--temp-dir={self.folder.name}"]
        place = [f"--address={address}"] if address else [*head, "--include-dashboard=false", "--disable-usage-stats"]
        size = [f"--num-cpus={cpus}", f"--num-gpus={gpus}", f"--object-store-memory={object_store}"]
        command = [RAY, "start", "--block", "--node-ip-address=127.0.0.1", *place, *size]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
        )

    def kill(self) -> None:
        """SIGKILL all processes of the node, as a power cut would."""
        for pid in [self.process.pid, *descendants(self.process.pid)]:
            kill(pid)
        self.process.wait()
        self.folder.cleanup()

    def kill_raylet(self) -> bool:
        """SIGKILL the raylet alone; returns whether there was one."""
        raylets = running("raylet/raylet", self)
        for pid in raylets:
            kill(pid)
        return bool(raylets)

    def stall(self, seconds: float) -> None:
        """Stop all processes of the node, and let them continue after so many seconds."""
        pids = [self.process.pid, *descendants(self.process.pid)]
        for pid in pids:
            kill(pid, signal.SIGSTOP)
        time.sleep(seconds)
        for pid in pids:
            kill(pid, signal.SIGCONT)


@contextmanager
def cluster(*cpus: int, environment: Mapping[str, str] | None = None) -> Iterator[list[Node]]:
    """A head and further nodes of so many logical CPUs each; those that are in the list at the end are killed."""
    nodes: list[Node] = []
    try:
        start_nodes(nodes, *cpus, environment=environment)
        yield nodes
    finally:
        for node in nodes:
            node.kill()


def start_nodes(nodes: list[Node], *cpus: int, environment: Mapping[str, str] | None = None) -> None:
    """Append a head, with further variables, and further nodes of so many logical CPUs each."""
    head = Node(cpus[0], environment=environment)
    nodes.append(head)
    wait_until(lambda: _listens(head.address))
    for count in cpus[1:]:
        nodes.append(Node(count, head.address))
        # A job would give up after a minute, which nodes take on a busy machine; and of two that start at once on one
        # machine Ray may give both the same socket.
        wait_until(lambda: _alive(head.address) == len(nodes))


def _alive(address: str) -> int:
    """Nodes that the head at this address counts as alive."""
    from ray._raylet import GcsClient
    from ray.core.generated.gcs_pb2 import GcsNodeInfo

    known = GcsClient(address=address).get_all_node_info(timeout=60)
    return sum(node.state == GcsNodeInfo.ALIVE for node in known.values())


def start_precompute(arguments: Sequence[str], address: str, log: Path) -> Any:
    """`jobs/precompute.py` with these arguments on the Ray at `address`, in a process whose output goes to `log`."""
    process = FORK.Process(target=_job, args=(list(arguments), address, log), daemon=True)
    process.start()
    return process


def _job(arguments: list[str], address: str, log: Path) -> None:
    os.environ["RAY_ADDRESS"] = address
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    run(PrecomputeJobConfig, precompute.main, "", arguments)


def running(what: str, *nodes: Node) -> list[int]:
    """Processes of Ray on these nodes whose title says what they do."""
    return [pid for node in nodes for pid, title in descendants(node.process.pid).items() if what in title]


def wait_until(reached: Callable[[], Any]) -> Any:
    """Wait until `reached()` is true, and return its value."""
    deadline = time.monotonic() + PATIENCE
    while not (found := reached()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError:
        return False
    return True
