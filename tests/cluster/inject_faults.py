"""Measure what each fault of a cluster costs: three Ray nodes on loopback, one fault at a time, several times each.

    python -m tests.cluster.inject_faults --times 3
    python -m tests.cluster.inject_faults --times 1 --only 'node lost'

Extraction is `jobs/precompute.py` on four shards of a slow teacher. The rows of every shard, by SHA-256, must equal those of a
cache that was filled without Ray. Training is Ray Train with two workers and a small task that logs every batch. The committed
loss of every step must equal that of an undisturbed run. `lost` counts images or steps that were computed more than once.
Recovery lasts from the fault until the next shard is committed, or until both workers are two steps ahead of where they were.
For a worker that is lost and regained it covers both, and the minute after which Ray Train looks for new nodes. A job that
ends is restarted by the same command. Lost nodes are replaced; after a clock jump all nodes are. A library that is preloaded
into the nodes and the job simulates clock jumps (`clock.c`, which needs a C compiler). Another job fills the object store.
Prints a table and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from pyarrow import fs

from jobs._cli import DEFAULT_RECIPE, grid
from pipeline.cache.fill.plan import plan_cache
from pipeline.config.load import load_config
from pipeline.distill.config import DistillJobConfig
from pipeline.storage.store import Store
from pipeline.training.config import TrainConfig
from tests.cluster.nodes import RAY, Node, cluster, running, start_nodes, start_precompute
from tests.conftest import REPOSITORY
from tests.fakes import SMALL_JOB, colours_entry, fill_in_process, images_seen
from tests.faults import FORK, content
from tests.processes import descendants, kill
from tests.storage.s3_endpoint import S3Endpoint
from tests.training.tiny_task import STEPS, lines, make_tiny_task

IMAGES, WORKERS, CPUS = 192, 2, (2, 3, 3)
PATIENCE_S = 600.0
PLAIN = {"dropout": 0.0, "batch_norm": False}
TRAINING = TrainConfig(epochs=4, batch_size=8, workers=WORKERS, checkpoint_steps=2, warmup_epochs=0)


@dataclass
class Bench:
    """A cluster and the folder of its jobs.

    Attributes:
        nodes: the head and two more.
        folder: of jobs, caches and the simulated clock.
        draw: chooses victims and moments.
        store: an S3 endpoint that can be made to fail.
    """

    nodes: list[Node]
    folder: Path
    draw: random.Random
    store: S3Endpoint | None = None

    @property
    def address(self) -> str:
        """Of the head."""
        return self.nodes[0].address

    def heal_store(self) -> None:
        """End a fault of the store."""
        if self.store:
            self.store.fault = lambda method, path: None
            self.store.released.set()

    def replace_dead(self) -> None:
        """Replace nodes that died, or all nodes after a clock jump.

        The clock is not set back under running nodes: Ray's timers would wait until it has caught up.
        """
        if _clock(self.folder):
            for node in self.nodes:
                node.kill()
            self.nodes.clear()
            _set_clock(self.folder, 0)
            start_nodes(self.nodes, *CPUS)
        for number in (1, 2):
            if self.nodes[number].process.poll() is not None or not running("raylet/raylet", self.nodes[number]):
                self.replace(number)

    def replace(self, number: int) -> None:
        """Kill a node, and start another in its place."""
        self.nodes[number].kill()
        self.nodes[number] = Node(CPUS[number], self.address)


class Extraction:
    """One `jobs/precompute.py` on an empty cache."""

    unit = "images"
    margin = 1

    def __init__(self, bench: Bench, number: int, uri: str = "") -> None:
        self.bench, self.folder = bench, bench.folder / f"extract-{number}"
        self.folder.mkdir()
        self.calls, self.cache = self.folder / "calls", self.folder / "cache"
        self.uri = uri
        self.arguments = [
            *extraction_arguments(bench.folder / "work", self.calls),
            f"cache.uri={uri or self.cache}",
            f"name=faults-{number}",
        ]
        self.start()

    def start(self) -> None:
        """Start or restart the job."""
        self.process = start_precompute(self.arguments, self.bench.address, self.folder / "log")

    def progress(self) -> int:
        """Committed shards of images and teachers, or requests to the store."""
        if self.uri and self.bench.store:
            return len(self.bench.store.requests)
        return len(list(self.cache.glob("parts/*/views/full/**/shard-*.json")))

    def begun(self) -> bool:
        """Whether the teacher is at work."""
        return images_seen(self.calls) > 0

    def lost(self) -> int:
        """Images that a teacher has seen more than once."""
        return images_seen(self.calls) - IMAGES

    def result(self) -> Any:
        """Rows of every shard, by hash."""
        if self.uri and self.bench.store:
            remote = fs.S3FileSystem(endpoint_override=self.bench.store.url.removeprefix("http://"), scheme="http")
            fs.copy_files(self.uri.removeprefix("s3://"), str(self.cache), source_filesystem=remote)
        return content(self.cache)


class Training:
    """One run of Ray Train with two workers."""

    unit = "steps"
    margin = 2
    config = TRAINING

    def __init__(self, bench: Bench, number: int) -> None:
        self.bench, self.folder = bench, bench.folder / f"train-{number}"
        self.folder.mkdir()
        self.start()

    def start(self) -> None:
        """Start or restart the job."""
        self.process = FORK.Process(
            target=_train, args=(self.bench.address, str(self.folder), self.config), daemon=True
        )
        self.process.start()

    def progress(self) -> int:
        """Steps that the slower worker has begun."""
        return min(len(set(self._batches(rank))) for rank in range(WORKERS))

    def _batches(self, rank: int) -> list[str]:
        return lines(self.folder, "batches", rank) if (self.folder / f"batches-{rank}").exists() else []

    def begun(self) -> bool:
        """Whether the second checkpoint is written."""
        return self.progress() > STEPS + 1

    def lost(self) -> int:
        """Steps that were computed more than once, averaged over the workers."""
        return round(sum(len(self._batches(rank)) for rank in range(WORKERS)) / WORKERS) - STEPS * self.config.epochs

    def result(self) -> Any:
        """Committed loss of every step."""
        points = [tuple(json.loads(line)) for line in (self.folder / "committed").read_text().splitlines()]
        return {step: round(loss, 4) for step, loss in points}


class Elastic(Training):
    """A longer training with one worker or two."""

    config = TRAINING.model_copy(update={"epochs": 16, "workers": (1, WORKERS)})


Job = Extraction | Training


def extraction_arguments(work: Path, calls: Path) -> list[str]:
    """A job of four shards of two seconds each."""
    teacher = colours_entry(calls, dim=16, delay=1.0)
    return [*SMALL_JOB, "cache.batch_size=24", "cache.codec=int8", f"work={work}", f"teachers=[{teacher}]"]


def _train(address: str, folder: str, config: TrainConfig) -> None:
    os.environ["RAY_ADDRESS"] = address
    with Path(folder, "log").open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from pipeline.runtime.ray_session import connect
    from pipeline.training.ray_train import fit
    from pipeline.training.worker import StoppedError

    def commit(history: list[tuple[int, dict[str, float]]], checkpoint: str | None) -> None:
        with Path(folder, "committed").open("a") as file:
            file.writelines(json.dumps([step, m["loss"]]) + "\n" for step, m in history if "loss" in m)

    payload = {"folder": folder, **PLAIN, "delay": 0.7}
    with connect():
        try:
            fit(make_tiny_task, payload, config, f"{folder}/train", commit)
        except StoppedError:
            sys.exit(130)


Fault = Callable[[Bench, Job], None]


def _kill(title: str) -> Fault:
    def fault(bench: Bench, job: Job) -> None:
        kill(bench.draw.choice(_until(lambda: running(title, *bench.nodes), job)))

    return fault


def _busy(bench: Bench) -> int:
    """Number of a node, other than the head, that runs an actor or worker."""
    busy = [n for n in (1, 2) if running("(Extract)", bench.nodes[n]) or running("RayTrainWorker", bench.nodes[n])]
    return bench.draw.choice(busy or [1, 2])


def _lose_node(bench: Bench, job: Job) -> None:
    bench.replace(_busy(bench))


def _lose_and_regain(bench: Bench, job: Job) -> None:
    """Lose all nodes but the head, and start new ones once a single worker has continued."""
    for number in (1, 2):
        bench.nodes[number].kill()
    alone = job.progress() + job.margin
    _until(lambda: job.progress() >= alone, job)
    for number in (1, 2):
        bench.nodes[number] = Node(CPUS[number], bench.address)
    _until(lambda: len(running("RayTrainWorker", *bench.nodes)) == WORKERS, job)


def _kill_raylet(bench: Bench, job: Job) -> None:
    number = _busy(bench)
    bench.nodes[number].kill_raylet()
    time.sleep(1)
    bench.replace(number)


def _stall(bench: Bench, job: Job) -> None:
    bench.nodes[_busy(bench)].stall(8)


def _preempt(bench: Bench, job: Job) -> None:
    """Give ten seconds' notice of a preemption, and then kill the node."""
    number = _busy(bench)
    node_id = _until(lambda: _node_id(bench.nodes[number]), job)
    reason = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", "--deadline-remaining-seconds=10"]
    command = [RAY, "drain-node", f"--address={bench.address}", f"--node-id={node_id}", *reason]
    subprocess.run(command, check=True, capture_output=True)
    time.sleep(10)
    bench.replace(number)


def _node_id(node: Node) -> str:
    """Id of a node, from the command lines of its processes; "" if there is none yet."""
    titles = descendants(node.process.pid).values()
    found = (re.search(r"--node[_-]id=([0-9a-f]{56})", title) for title in titles)
    return next((match[1] for match in found if match), "")


def _terminate(bench: Bench, job: Job) -> None:
    os.kill(job.process.pid, signal.SIGTERM)


def _kill_driver(bench: Bench, job: Job) -> None:
    os.kill(job.process.pid, signal.SIGKILL)


def _fill_object_store(bench: Bench, job: Job) -> None:
    """Another job puts more into the object store of the head than it can hold, for ten seconds."""
    filler = FORK.Process(target=_hold_objects, args=(bench.address,), daemon=True)
    filler.start()
    filler.join()


def _hold_objects(address: str) -> None:
    import numpy as np
    import ray

    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    held = [ray.put(np.ones(20 << 20, np.uint8)) for _ in range(8)]
    time.sleep(10)
    del held


def _set_clock(folder: Path, seconds: int) -> None:
    with (folder / "clock").open("r+b") as file:  # which the processes have mapped
        file.write(struct.pack("q", seconds))


def _clock(folder: Path) -> int:
    seconds: int = struct.unpack("q", (folder / "clock").read_bytes())[0]
    return seconds


def _jump(seconds: int) -> Fault:
    def fault(bench: Bench, job: Job) -> None:
        _set_clock(bench.folder, seconds)

    return fault


def _fail_store(bench: Bench, job: Job) -> None:
    """One request in six fails from now on (5xx, reset, truncated body), and one stalls until its timeout."""
    rng, stalls = random.Random(0), iter(["stall"])

    def fault(method: str, path: str) -> str | None:
        if method == "GET" and (stall := next(stalls, None)):
            return stall
        return rng.choice(["SlowDown", "InternalError", "reset", "truncate"]) if rng.random() < 1 / 6 else None

    assert bench.store is not None
    bench.store.released.clear()
    bench.store.fault = fault


FAULTS: dict[str, tuple[type[Job], Fault]] = {
    "extract: worker killed": (Extraction, _kill("(Ingest)")),
    "extract: actor killed": (Extraction, _kill("(Extract)")),
    "extract: raylet killed": (Extraction, _kill_raylet),
    "extract: node lost": (Extraction, _lose_node),
    "extract: node stalls 8 s": (Extraction, _stall),
    "extract: object store full": (Extraction, _fill_object_store),
    "extract: store fails and stalls": (Extraction, _fail_store),
    "extract: clock jumps back 1 h": (Extraction, _jump(-3600)),
    "extract: preemption notice": (Extraction, _preempt),
    "extract: driver killed": (Extraction, _kill_driver),
    "train: worker killed": (Training, _kill("RayTrainWorker")),
    "train: raylet killed": (Training, _kill_raylet),
    "train: node lost": (Training, _lose_node),
    "train: a worker lost, regained": (Elastic, _lose_and_regain),
    "train: node stalls 8 s": (Training, _stall),
    "train: object store full": (Training, _fill_object_store),
    "train: clock jumps ahead 1 h": (Training, _jump(3600)),
    "train: clock jumps back 1 h": (Training, _jump(-3600)),
    "train: preemption notice": (Training, _preempt),
    "train: SIGTERM to the job": (Training, _terminate),
    "train: driver killed": (Training, _kill_driver),
}


def _until(reached: Callable[[], Any], job: Job) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (found := reached()):
        if time.monotonic() > deadline or job.process.exitcode not in (None, 0):
            raise AssertionError(f"{(job.folder / 'log').read_text()[-3000:]}")
        time.sleep(0.05)
    return found


def inject(bench: Bench, name: str, number: int) -> dict[str, Any]:
    """Run a job, inject a fault into it, and return what was lost, seconds to recovery, restarts and the result."""
    kind, fault = FAULTS[name]
    if name == "extract: store fails and stalls":
        job: Job = Extraction(bench, number, f"s3://regla/faults-{number}")
    else:
        job = kind(bench, number)
    if name != "extract: worker killed":
        _until(job.begun, job)
        time.sleep(bench.draw.uniform(0, 1))
    started, restarts = time.monotonic(), 0
    fault(bench, job)
    stopped = time.monotonic()
    if fault in (_terminate, _kill_driver):
        job.process.join(PATIENCE_S)
        job.start()
        restarts += 1
    before = job.progress()
    while job.progress() < before + job.margin and job.process.is_alive():
        time.sleep(0.05)
    recovered = time.monotonic()
    job.process.join(PATIENCE_S)
    while job.process.exitcode != 0 and restarts < 3:
        job.start()
        job.process.join(PATIENCE_S)
        restarts += 1
    bench.heal_store()
    if job.process.exitcode != 0:
        raise AssertionError((job.folder / "log").read_text()[-3000:])
    # The duration of the fault itself, such as the ten seconds of a notice, is not recovery.
    busy = stopped - started if fault in (_stall, _preempt, _fill_object_store) else 0.0
    return {
        "lost": job.lost(),
        "recovered": max(0.0, recovered - started - busy),
        "restarts": restarts,
        "result": job.result(),
    }


@contextmanager
def bench(seed: int) -> Iterator[Bench]:
    """Three nodes, a store, and a folder."""
    folder, store = Path(tempfile.mkdtemp(prefix="faults")), S3Endpoint()
    (folder / "clock").write_bytes(struct.pack("q", 0))
    library = folder / "clock.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-O2", "-o", library, Path(__file__).with_name("clock.c"), "-ldl"], check=True
    )
    os.environ |= {
        "LD_PRELOAD": str(library),
        "RAY_AUTH_MODE": "disabled",
        "PYTHONPATH": str(REPOSITORY),
        "REGLA_CLOCK": str(folder / "clock"),
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
        "AWS_ENDPOINT_URL": store.url,
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    address = {"endpoint_override": store.url.removeprefix("http://"), "scheme": "http"}
    fs.S3FileSystem(**address, allow_bucket_creation=True).create_dir("regla")
    try:
        with cluster(*CPUS) as nodes:
            yield Bench(nodes, folder, random.Random(seed), store)
    finally:
        store.close()
        shutil.rmtree(folder, ignore_errors=True)


def undisturbed(bench: Bench, kind: type[Job]) -> Any:
    """Result of an undisturbed job; extraction runs without Ray."""
    if issubclass(kind, Training):
        training = kind(bench, 0)
        training.process.join(PATIENCE_S)
        if training.lost() or training.process.exitcode:
            raise AssertionError((training.folder / "log").read_text()[-3000:])
        result = training.result()
        shutil.rmtree(training.folder)
        return result
    alone = bench.folder / "alone"
    arguments = extraction_arguments(alone / "work", alone / "calls")
    alone.mkdir()
    fill_in_process(
        plan_cache(load_config(DistillJobConfig, DEFAULT_RECIPE, arguments), Store.at(alone / "cache")), batch_size=24
    )
    return content(alone / "cache")


def main() -> None:
    """Inject every fault several times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="faults whose name this regular expression finds")
    options = parser.parse_args()
    names = [name for name in FAULTS if re.search(options.only, name)]
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with bench(options.seed) as made:
        kinds = {FAULTS[name][0] for name in names}
        expected = {kind: undisturbed(made, kind) for kind in kinds}
        for number, name in enumerate(names * options.times, 1):
            made.replace_dead()
            found = inject(made, name, number)
            found["equal"] = found.pop("result") == expected[FAULTS[name][0]]
            measured[name].append(found)
            print(f"{name}: {found}", flush=True)
    print(grid([_row(name, found) for name, found in measured.items()]))
    figures = {name: {"times": len(found), **_figures(found)} for name, found in measured.items()}
    print(json.dumps(figures))
    sys.exit(not all(one["equal"] for found in measured.values() for one in found))


def _figures(found: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "lost": [one["lost"] for one in found],
        "recovery_s": [round(one["recovered"], 1) for one in found],
        "restarts": [one["restarts"] for one in found],
        "equal": all(one["equal"] for one in found),
    }


def _row(name: str, found: list[dict[str, Any]]) -> dict[str, str]:
    lost, seconds = [one["lost"] for one in found], [one["recovered"] for one in found]
    return {
        "fault": name,
        "times": str(len(found)),
        "lost": f"{median(lost):g} (most {max(lost)}) {FAULTS[name][0].unit}",
        "recovery": f"{median(seconds):.1f} s (most {max(seconds):.1f})",
        "restarts": str(sum(one["restarts"] for one in found)),
        "result": "equal" if all(one["equal"] for one in found) else "DIFFERS",
    }


if __name__ == "__main__":
    main()
