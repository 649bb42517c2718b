"""Soak test: extraction and training in a loop on two Ray nodes, with faults at random moments.

    python -m tests.cluster.soak --minutes 45 --seed 0

Each round runs `jobs/distill.py` on an empty cache, all in this process, on two nodes on loopback. One or two faults of
`FAULTS` hit each round at random moments. In every third round a file of the cache is then damaged, and `--verify --repair`
must repair it. The rows of the cache, by SHA-256, must equal those of a cache that was filled without Ray. The loss of every
step in MLflow must equal that of the first round, which is undisturbed, with each step logged once. A job that ends with an
error is restarted and counted. Prints one line per round, memory over time, and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.memory import growth, report, watch_memory
from jobs import distill, precompute
from jobs._cli import DEFAULT_RECIPE
from pipeline.cache.fill.plan import plan_cache
from pipeline.config.load import load_config
from pipeline.distill.config import DistillJobConfig
from pipeline.runtime.ray_session import connect
from pipeline.storage.store import Store
from tests.cluster.nodes import Node, cluster, running
from tests.conftest import REPOSITORY
from tests.fakes import SMALL_JOB, colours_entry, fill_in_process
from tests.faults import content
from tests.processes import kill

LABELS = {"raylet/raylet": "raylets", "gcs_server": "GCS", "(Extract)": "extraction", "RayTrainWorker": "training"}
STARTS = 4
"""Starts of a round, at most."""


class Soak:
    """A cluster, a work folder, and the expected result of a round."""

    def __init__(self, folder: Path, nodes: list[Node], seed: int) -> None:
        self.folder, self.nodes, self.draw = folder, nodes, random.Random(seed)
        self.cache = folder / "cache"
        self.arguments = [
            *SMALL_JOB,
            "cache.batch_size=24",
            "cache.codec=int8",
            "train.epochs=3",
            "train.checkpoint_steps=3",
            f"work={folder}/work",
            f"cache.uri={self.cache}",
            f"teachers=[{colours_entry(folder / 'calls', dim=16, delay=0.1)}]",
        ]
        self.injected: Counter[str] = Counter()
        self.restarts = self.wrong_shards = self.wrong_curves = self.repaired = 0
        self.rounds = self.rows_checked = 0
        self.one_at_a_time = threading.Lock()
        plan = plan_cache(load_config(DistillJobConfig, DEFAULT_RECIPE, self.arguments), Store.at(folder / "alone"))
        fill_in_process(plan, batch_size=24)
        self.rows = content(folder / "alone")
        self.curve: dict[int, float] = {}

    def round(self, undisturbed: bool) -> None:
        """One job on an empty cache."""
        shutil.rmtree(self.cache, ignore_errors=True)
        shutil.rmtree(self.folder / "work" / "runs", ignore_errors=True)
        done, faults = (
            threading.Event(),
            [] if undisturbed else self.draw.sample(list(FAULTS), self.draw.choice([1, 2])),
        )
        moments = [(name, self.draw.uniform(0, 3)) for name in faults]
        threads = [threading.Thread(target=self._inject, args=(*moment, done), daemon=True) for moment in moments]
        for thread in threads:
            thread.start()
        started = time.monotonic()
        figures = self._until_done(
            lambda: distill.main(load_config(DistillJobConfig, DEFAULT_RECIPE, self.arguments), False)
        )
        done.set()
        for thread in threads:
            thread.join()
        self._check(figures, undisturbed)
        if self.rounds % 3 == 2:
            self._damage_and_repair()
        self.rounds += 1
        print(
            f"round {self.rounds}  {time.monotonic() - started:.0f} s  {', '.join(faults) or 'undisturbed'}  "
            f"wrong shards {self.wrong_shards}, wrong curves {self.wrong_curves}, restarts {self.restarts}",
            flush=True,
        )

    def _until_done(self, job: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        for start in range(STARTS):
            try:
                return job()
            except (Exception, KeyboardInterrupt) as error:
                print(f"the job ended with {type(error).__name__}: {str(error)[:300]}", flush=True)
                self.restarts += 1
                if start == STARTS - 1:
                    raise
        raise AssertionError

    def _inject(self, name: str, delay: float, done: threading.Event) -> None:
        phase, fault = FAULTS[name]
        begun = {
            "extract": lambda: bool(running("(Extract)", *self.nodes)),
            "train": lambda: bool(list(self.folder.glob("work/runs/*/train/checkpoint-0000-000003*"))),
        }[phase]
        while not begun():
            if done.wait(0.1):
                return
        if done.wait(delay):
            return
        with self.one_at_a_time:
            self.injected[name] += fault(self)

    def _check(self, figures: dict[str, Any], undisturbed: bool) -> None:
        self._check_rows()
        curve = _curve(self.folder / "work", figures["mlflow_run_id"])
        if undisturbed:
            self.curve = curve
        same = curve.keys() == self.curve.keys() and all(
            abs(curve[step] - loss) <= 1e-4 * abs(loss) for step, loss in self.curve.items()
        )
        self.wrong_curves += not same

    def _damage_and_repair(self) -> None:
        victim = self.draw.choice(sorted(self.cache.glob("parts/*/views/full/**/shard-*.parquet")))
        data = bytearray(victim.read_bytes())
        data[self.draw.randrange(len(data))] ^= 0xFF
        victim.write_bytes(data)
        options = argparse.Namespace(repair=True)
        config = load_config(DistillJobConfig, DEFAULT_RECIPE, self.arguments)
        figures = self._until_done(lambda: dict(precompute.verify(config, options)))
        assert figures["ok"], figures
        self._check_rows()
        self.repaired += 1

    def _check_rows(self) -> None:
        found = content(self.cache)
        self.wrong_shards += sum(found.get(path) != self.rows.get(path) for path in found.keys() | self.rows.keys())
        self.rows_checked += sum(json.loads((self.cache / path).read_text())["rows"] for path in found)


def _curve(work: Path, run_id: str) -> dict[int, float]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{work}/mlflow.db")
    experiment = client.get_run(run_id).info.experiment_id
    (run,) = client.search_runs(
        [experiment], f"tags.mlflow.parentRunId = '{run_id}' and attributes.run_name = 'distill'"
    )
    points = client.get_metric_history(run.info.run_id, "loss")
    assert len({point.step for point in points}) == len(points), "a step was logged twice"
    return {point.step: point.value for point in points}


def _kill(title: str) -> Callable[[Soak], bool]:
    def fault(soak: Soak) -> bool:
        victims = running(title, *soak.nodes)
        if victims:
            kill(soak.draw.choice(victims))
        return bool(victims)

    return fault


def _lose_node(soak: Soak) -> bool:
    """Kill the second node and replace it."""
    soak.nodes[1].kill()
    soak.nodes[1] = Node(4, soak.nodes[0].address)
    return True


def _lose_raylet(soak: Soak) -> bool:
    """Kill the raylet of the second node, which ends its workers, and replace the node."""
    killed = soak.nodes[1].kill_raylet()
    time.sleep(2)
    _lose_node(soak)
    return killed


def _stall_node(soak: Soak) -> bool:
    soak.nodes[1].stall(5)
    return True


FAULTS: dict[str, tuple[str, Callable[[Soak], bool]]] = {
    "extraction actor killed": ("extract", _kill("(Extract)")),
    "node lost while extracting": ("extract", _lose_node),
    "raylet killed while extracting": ("extract", _lose_raylet),
    "node stalls while extracting": ("extract", _stall_node),
    "training worker killed": ("train", _kill("RayTrainWorker")),
    "node lost while training": ("train", _lose_node),
    "node stalls while training": ("train", _stall_node),
}
"""By name, the phase of a fault, and the function that injects it, which returns whether there was a victim."""


def main() -> None:
    """Run rounds until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=45)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, default=REPOSITORY / "docs/figures/soak.png")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak"))
    started = time.monotonic()
    try:
        with cluster(4, 4) as nodes, watch_memory("driver", LABELS, interval=5.0) as curves:
            os.environ |= {"RAY_ADDRESS": nodes[0].address, "RAY_AUTH_MODE": "disabled"}
            soak = Soak(folder, nodes, options.seed)
            with connect():  # one session for all rounds, so that leaks add up
                while soak.rounds < 2 or time.monotonic() - started < options.minutes * 60:
                    soak.round(undisturbed=not soak.rounds)
        means = report(curves, options.figure, f"{soak.rounds} rounds of extraction and training with faults")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    figures = {
        "minutes": round((time.monotonic() - started) / 60, 1),
        "seed": options.seed,
        "rounds": soak.rounds,
        "faults": dict(soak.injected),
        "files_damaged_and_repaired": soak.repaired,
        "rows_checked": soak.rows_checked,
        "shards_with_wrong_rows": soak.wrong_shards,
        "wrong_curves": soak.wrong_curves,
        "restarts": soak.restarts,
        "memory_mib": means,
        "growth": growth(means),
    }
    print(json.dumps(figures))
    sys.exit(bool(soak.wrong_shards or soak.wrong_curves))


if __name__ == "__main__":
    main()
