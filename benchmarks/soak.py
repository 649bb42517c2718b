"""Extraction and training in a loop on two Ray nodes, with faults at random moments: is every row right, is memory flat?

    python benchmarks/soak.py --minutes 45 --seed 0

Each round is `jobs/distill.py` on an empty cache, in this one process, on a cluster of two nodes on loopback. While it runs,
one fault or two are drawn (`FAULTS`) and made, each at a random moment of the phase that it is drawn for; afterwards a file of
the cache is damaged in every third round, and `--verify --repair` has to mend it. Compared with the first round, which is
left alone, and with a cache that was filled without Ray: the rows of the cache, by SHA-256 of their values, and the loss
of every step in MLflow, each step once. A job that ends with an error is started again, as its user would; that is counted.
Prints a line a round, the memory over time, and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.memory import growth, report, watch_memory
from jobs import distill, precompute
from jobs._cli import DEFAULT_RECIPE
from pipeline.cache.fill.build import plan_cache
from pipeline.config.load import load_config
from pipeline.runtime.ray_session import connect
from pipeline.storage.store import Store
from tests.fakes import SMALL_JOB, colours_entry, fill_in_process
from tests.faults import content
from tests.nodes import Node, cluster, descendants, kill, running

SHARED_FOLDER = Path(__file__).resolve().parent.parent
LABELS = {"raylet/raylet": "raylets", "gcs_server": "GCS", "(Extract)": "extraction", "RayTrainWorker": "training"}
STARTS = 4
"""Most starts of a round."""


class Soak:
    """A cluster, a work folder, and what a round must give."""

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
        plan = plan_cache(load_config(DEFAULT_RECIPE, self.arguments), Store.at(folder / "alone"))
        fill_in_process(plan, batch_size=24)
        self.rows = content(folder / "alone")
        self.curve: dict[int, float] = {}

    def round(self, quiet: bool) -> None:
        """One job on an empty cache."""
        shutil.rmtree(self.cache, ignore_errors=True)
        shutil.rmtree(self.folder / "work" / "runs", ignore_errors=True)
        done, faults = threading.Event(), [] if quiet else self.draw.sample(list(FAULTS), self.draw.choice([1, 2]))
        moments = [(name, self.draw.uniform(0, 3)) for name in faults]
        threads = [threading.Thread(target=self._inject, args=(*moment, done), daemon=True) for moment in moments]
        for thread in threads:
            thread.start()
        started = time.monotonic()
        figures = self._until_done(lambda: distill.main(load_config(DEFAULT_RECIPE, self.arguments), False))
        done.set()
        for thread in threads:
            thread.join()
        self._check(figures, quiet)
        if self.rounds % 3 == 2:
            self._damage_and_repair()
        self.rounds += 1
        print(
            f"round {self.rounds}  {time.monotonic() - started:.0f} s  {', '.join(faults) or 'left alone'}  "
            f"wrong shards {self.wrong_shards}, wrong curves {self.wrong_curves}, started again {self.restarts}",
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

    def _check(self, figures: dict[str, Any], quiet: bool) -> None:
        self._check_rows()
        curve = _curve(self.folder / "work", figures["mlflow_run_id"])
        if quiet:
            self.curve = curve
        same = curve.keys() == self.curve.keys() and all(
            abs(curve[step] - loss) <= 1e-4 * abs(loss) for step, loss in self.curve.items()
        )
        self.wrong_curves += not same

    def _damage_and_repair(self) -> None:
        victim = self.draw.choice(sorted(self.cache.glob("*/views/full/**/shard-*.parquet")))
        data = bytearray(victim.read_bytes())
        data[self.draw.randrange(len(data))] ^= 0xFF
        victim.write_bytes(data)
        options = argparse.Namespace(repair=True)
        config = load_config(DEFAULT_RECIPE, self.arguments)
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


def _kill(what: str) -> Callable[[Soak], bool]:
    def fault(soak: Soak) -> bool:
        victims = running(what, *soak.nodes)
        if victims:
            kill(soak.draw.choice(victims))
        return bool(victims)

    return fault


def _lose_node(soak: Soak) -> bool:
    """The second node dies as a whole, and another comes."""
    soak.nodes[1].kill()
    soak.nodes[1] = Node(4, soak.nodes[0].address)
    return True


def _lose_raylet(soak: Soak) -> bool:
    """The raylet of the second node dies; what it ran ends with it, and another node comes."""
    victims = running("raylet/raylet", soak.nodes[1])
    for victim in victims:
        kill(victim)
    time.sleep(2)
    _lose_node(soak)
    return bool(victims)


def _stall_node(soak: Soak) -> bool:
    """The second node does nothing for five seconds."""
    below = [soak.nodes[1].process.pid, *descendants(soak.nodes[1].process.pid)]
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in below:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        time.sleep(5 if number == signal.SIGSTOP else 0)
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
"""By name, the phase that each is made in, and what makes it; it gives whether there was anything to harm."""


def main() -> None:
    """Run rounds until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=45)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, default=SHARED_FOLDER / "docs/figures/soak.png")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak"))
    started = time.monotonic()
    try:
        with cluster(4, 4) as nodes, watch_memory("driver", LABELS, interval=5.0) as curves:
            os.environ |= {"RAY_ADDRESS": nodes[0].address, "RAY_AUTH_MODE": "disabled"}
            soak = Soak(folder, nodes, options.seed)
            with connect():  # once for all rounds: what stays behind of one is there in the next
                while soak.rounds < 2 or time.monotonic() - started < options.minutes * 60:
                    soak.round(quiet=not soak.rounds)
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
        "started_again": soak.restarts,
        "memory_mib": means,
        "growth": growth(means),
    }
    print(json.dumps(figures))
    sys.exit(bool(soak.wrong_shards or soak.wrong_curves))


if __name__ == "__main__":
    main()
