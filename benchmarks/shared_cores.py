"""Measure training, evaluation and extraction beside other processes that want the same cores.

    python benchmarks/shared_cores.py
    python benchmarks/shared_cores.py --work extract --busy 0 4 --seconds 20

The student of the quickstart trains on random images, or is evaluated on them (a forward pass), or a small DINOv2 teacher encodes
them, with the niceness that a Ray worker gets and a way to wait for OpenMP's threads, beside 0, 1, 2 and 4 processes that only
count: all settings in turn beside each number. Prints a table and one line of JSON: steps per second, and processor seconds per
step; null where no result came within the limit.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

if not __package__:  # a script imports from its own checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SETTINGS: dict[str, tuple[int, dict[str, str]]] = {
    "nice 15": (15, {}),  # Ray's default
    "nice 0": (0, {}),
    "nice 15, passive": (15, {"OMP_WAIT_POLICY": "PASSIVE"}),
    "nice 0, passive": (0, {"OMP_WAIT_POLICY": "PASSIVE"}),
    "nice 0, short waits": (
        0,
        {"GOMP_SPINCOUNT": "1000"},
    ),  # what an embedded session sets (pipeline/runtime/openmp.py)
}
BATCH, SIDE = 32, 96


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every setting beside every number of busy processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2, 4], help="processes beside the training")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement, after a warm-up")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds after which a measurement is given up")
    parser.add_argument("--work", choices=WORK, default="train", help="what is measured; default: train")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="default: all")
    parser.add_argument("--nice", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.nice is not None:
        print(json.dumps(_work(WORK[options.work], options.seconds, options.nice)))
        return
    found = []
    for busy in options.busy:
        for name in options.settings:
            niceness, variables = SETTINGS[name]
            command = [sys.executable, __file__, "--work", options.work, "--seconds", str(options.seconds)]
            command += ["--nice", str(niceness)]
            with ExitStack() as stack:
                for _ in range(busy):
                    process = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
                    stack.callback(process.kill)
                figures = _measured(command, variables, options.limit)
            found.append({"busy": busy, "setting": name, **figures})
            shown = f"no result in {options.limit:g} s"
            if figures["steps_s"] is not None:
                shown = f"{figures['steps_s']:7.2f} steps/s{figures['cpu_s']:7.2f} s of processor per step"
            print(f"beside {busy}  {name:<20}{shown}", flush=True)
    print(json.dumps({"work": options.work, "seconds": options.seconds, "measured": found}))


def _measured(command: Sequence[str], variables: Mapping[str, str], limit: float) -> dict[str, Any]:
    environment = {**os.environ, **variables}
    try:
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"steps_s": None, "cpu_s": None}
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def _train() -> Callable[[], object]:
    import torch

    from pipeline.student.model import create_backbone

    model, images = create_backbone("regla_t", {}), torch.randn(BATCH, 3, SIDE, SIDE)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()

    return step


def _evaluate() -> Callable[[], object]:
    import torch

    from pipeline.student.model import create_backbone

    model, images = create_backbone("regla_t", {}).eval(), torch.randn(BATCH, 3, SIDE, SIDE)
    return torch.inference_mode()(lambda: model(images))


def _extract() -> Callable[[], object]:
    import torch

    from teachers.registry import create_teacher

    small = {"embed_dim": 192, "depth": 6, "num_heads": 3}
    teacher = create_teacher("dinov2/vits14", weights="random", input_size=84, args=small)
    teacher.load()
    pixels = torch.randint(0, 256, (BATCH, 3, 84, 84), dtype=torch.uint8)
    return lambda: teacher.encode(pixels)


WORK = {"train": _train, "evaluate": _evaluate, "extract": _extract}


def _work(make: Callable[[], Callable[[], object]], seconds: float, niceness: int) -> dict[str, Any]:
    import torch

    os.nice(niceness)  # of this thread, and of those that it starts
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    step = make()
    step()
    steps, started, spent = 0, time.perf_counter(), time.process_time()
    while (elapsed := time.perf_counter() - started) < seconds:
        step()
        steps += 1
    return {"steps_s": round(steps / elapsed, 3), "cpu_s": round((time.process_time() - spent) / steps, 3)}


if __name__ == "__main__":
    main()
