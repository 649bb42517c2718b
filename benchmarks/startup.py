"""Measure what starting a distillation costs: processor seconds until the first training step, and peak memory.

    python benchmarks/startup.py
    python benchmarks/startup.py --images photos/train

Distils from generated scenes, or from a folder of photographs, twice: with an empty cache, which is filled first, and again, as
another run, with the full one. Counts the processor seconds of the job and of all processes below it, from /proc (Linux), and
every second their memory: what they share, such as torch's libraries, counts once (PSS). A table names the processes.

Its last line is JSON: `empty_cache_first_step_cpu_s` and `full_cache_first_step_cpu_s`, until the first step is done; and with
the full cache `after_last_step_cpu_s`, from the last step until the job has ended, and `peak_gib`.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

if not __package__:  # a script imports from its own checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

TICKS = os.sysconf("SC_CLK_TCK")
RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "quickstart.yaml"
SMALL = ("train.epochs=1", "data.samples.train=256", "data.samples.val=64")
SECONDS_BETWEEN_SAMPLES = 0.2
SAMPLES_PER_MEMORY = 5
"""Reading the memory of a process takes its kernel a millisecond."""
SHOWN = 12

Process = tuple[int, str]
"""Id of a process, and when it started: ids are used again."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both, print where the processor seconds went, and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="folder of photographs; default: generated scenes")
    parser.add_argument("--steps", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields of recipes/quickstart.yaml")
    options = parser.parse_args(arguments)
    chosen = [f"data.train={options.images}"] if options.images else []
    if options.steps:
        _distil(options.steps, [*SMALL, *chosen, *options.overrides])
        return
    found = {}
    with TemporaryDirectory() as folder:
        for name in ("empty", "full"):
            steps = Path(folder, f"{name}.steps")
            fields = [*chosen, *options.overrides, f"work={folder}/{name}", f"cache.uri={folder}/cache"]
            found[name] = _watched([sys.executable, __file__, "--steps", str(steps), *fields], steps)
            print(f"{name} cache\n{_table(found[name])}", flush=True)
    full = found["full"]
    figures = {
        "empty_cache_first_step_cpu_s": found["empty"]["first"],
        "full_cache_first_step_cpu_s": full["first"],
        "after_last_step_cpu_s": full["all"] - full["last"],
        "peak_gib": full["peak"] / 2**30,
    }
    print(json.dumps({name: round(value, 2) for name, value in figures.items()}))


def _distil(steps: Path, fields: Sequence[str]) -> None:
    """Run the job itself, whose training workers write a character into a file after every step."""
    from jobs._cli import run
    from pipeline.runtime.openmp import wait_shortly

    wait_shortly()  # as `run` does, before torch is imported
    from jobs.distill import main as distil
    from pipeline.distill import job
    from pipeline.distill.config import DistillJobConfig

    job.make_distill_task = partial(_counting, steps)
    run(DistillJobConfig, distil, "", [str(RECIPE), *fields])


def _counting(steps: Path, payload: dict[str, Any], rank: int, world: int) -> Any:
    from pipeline.distill.task import make_distill_task

    task = make_distill_task(payload, rank, world)
    after_step = task.after_step

    def count(batches: Sequence[Any]) -> None:
        after_step(batches)
        with open(steps, "a") as file:
            file.write(".")

    task.after_step = count  # type: ignore[method-assign]
    return task


def _watched(command: Sequence[str], steps: Path) -> dict[str, Any]:
    """Run a job; its processor seconds at the first and the last step and at its end, its memory, and who took them."""
    names: dict[Process, str] = {}
    seconds: dict[Process, float] = {}
    first: dict[Process, float] = {}
    memory: dict[Process, int] = {}
    last, done, sampled = 0.0, 0, 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as job:
        while job.poll() is None:
            present = _tree(job.pid, seconds.keys())
            for process, (name, spent) in present.items():
                names[process], seconds[process] = (
                    name or names.get(process, "?"),
                    spent,
                )  # one that has ended has no name
            if steps.exists() and (size := steps.stat().st_size) > done:
                done, last, first = size, sum(seconds.values()), first or dict(seconds)
            if sampled % SAMPLES_PER_MEMORY == 0:
                memory = max(
                    memory, {process: _memory(process) for process in present}, key=lambda by: sum(by.values())
                )
            sampled += 1
            time.sleep(SECONDS_BETWEEN_SAMPLES)
    if job.returncode or not first:
        sys.exit(f"error: the job ended with {job.returncode} after {done} steps")
    who = {name: [process for process in names if names[process] == name] for name in names.values()}
    rows = {
        f"{len(some)} x {name}": [sum(by.get(process, 0) for process in some) for by in (first, seconds, memory)]
        for name, some in who.items()
    }
    total = [sum(column) for column in zip(*rows.values(), strict=True)]
    return {"first": total[0], "last": last, "all": total[1], "peak": total[2], "rows": {**rows, "all": total}}


def _tree(root: int, seen: Collection[Process]) -> dict[Process, tuple[str, float]]:
    """Name and processor seconds of the processes that exist, and are at or below these."""
    facts: dict[int, tuple[Process, int, float]] = {}
    for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))):
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:  # it has ended
            continue
        fields = stat[stat.rindex(")") + 2 :].split()
        facts[pid] = (pid, fields[19]), int(fields[1]), (int(fields[11]) + int(fields[12])) / TICKS

    def is_below(pid: int) -> bool:
        while pid in facts:
            process, parent, *_ = facts[pid]
            if pid == root or process in seen:
                return True
            pid = parent
        return False

    below = (pid for pid in facts if is_below(pid))
    return {facts[pid][0]: (_title(pid), facts[pid][2]) for pid in below}


def _title(pid: int) -> str:
    """The title of a Ray worker, or the script of another Python process."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    title, scripts = words[0].decode(errors="replace"), [word for word in words[1:] if word.endswith(b".py")]
    return title if title.startswith("ray::") or not scripts else Path(os.fsdecode(scripts[0])).name


def _memory(process: Process) -> int:
    """Its bytes, with its share of the pages that others have too."""
    try:
        lines = Path(f"/proc/{process[0]}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:")), 0)


def _table(found: dict[str, Any]) -> str:
    lines = [f"  {'process':<44}{'first step':>12}{'end':>10}{'at the peak':>14}"]
    for name, (first, end, memory) in sorted(found["rows"].items(), key=lambda row: row[1][1])[: -SHOWN - 1 : -1]:
        lines.append(f"  {name[:43]:<44}{first:>10.1f} s{end:>8.1f} s{memory / 2**30:>10.2f} GiB")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
