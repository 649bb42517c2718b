"""Latency of students' inference forms, a group at a time: what is measured before a time limit is printed.

    python benchmarks/latency.py --device cuda
    python benchmarks/latency.py --device cpu --models regla_t mobilenetv3_small_050 --sizes 64 --batches 1 --forms fused

`jobs/benchmark.py` measures the same and more, and writes a table at its end. All models of a form, batch size and image size
are measured interleaved. Compiling takes longest: groups that are not compiled come first. Prints a line of JSON per group,
with milliseconds per forward pass and their ratio to the first model's by model.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path

if not __package__:  # a script imports from its own checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import timm
import torch

from pipeline.benchmark.benchmark import torch_runner
from pipeline.benchmark.models import create_model
from pipeline.errors import one_line
from pipeline.runtime.timing import interleave
from pipeline.student.folding import inference_form

MODELS = ("regla_m", "regla_s", "mobilenetv4_hybrid_medium", "repvit_m1_1", "iformer_m", "efficientvit_b1")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print group by group."""
    options = _parse(arguments)
    known = [name for name in options.models if timm.is_model(name)]
    if missing := sorted(set(options.models) - set(known)):
        print(json.dumps({"timm": timm.__version__, "lacks": missing}), flush=True)
    example = torch.randn(1, 3, min(options.sizes), min(options.sizes))
    models = {name: inference_form(create_model(name), example).to(options.device) for name in known}
    for form, batch, size in product(options.forms, options.batches, options.sizes):
        torch.compiler.reset()
        images = torch.randn(batch, 3, size, size, device=options.device)
        group = {"form": form, "batch": batch, "size": size, "precision": options.precision}
        calls: dict[str, Callable[[], object]] = {}
        for name, model in models.items():
            call = torch_runner(model, form == "compiled", images, options.precision)
            try:
                call()
            except RuntimeError as error:  # one that cannot be compiled stops no other
                print(json.dumps({**group, "model": name, "error": one_line(error)}), flush=True)
                continue
            calls[name] = call
        first = next(iter(calls))
        timings = interleave(calls, partial(_same, first), options.rounds)
        milliseconds = {name: round(1e3 * timing.median, 3) for name, timing in timings.items()}
        ratios = {name: round(timing.ratio, 3) for name, timing in timings.items()}
        print(json.dumps({**group, "milliseconds": milliseconds, "ratio": ratios}), flush=True)


def _same(name: str, _: object) -> str:
    return name


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="the first is what ratios refer to")
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 512], help="sides of the image in pixels")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64], help="images per forward pass")
    parser.add_argument(
        "--forms", nargs="+", choices=("fused", "compiled"), default=["fused", "compiled"], help="eager, or compiled"
    )
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
