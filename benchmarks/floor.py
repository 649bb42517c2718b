"""The least time of a training step, of extraction and of inference on a card, by counting; needs no GPU.

    python benchmarks/floor.py
    python benchmarks/floor.py --compiled        # also counts the kernels of a compiled step: minutes

Operators are recorded on the CPU in bfloat16 with 2 and with 4 images; operations and bytes are linear in the number of images.
The least time is the sum over the operators of max(operations / rate, bytes / bandwidth) at the rates that the vendor states:
`eager` of all operators, `fused` without those that a compiler fuses into products, norms and the optimiser. Each operator
launches a kernel or more; `compiled` counts the kernels into which Inductor fuses forward and backward, and the operators of
the rest of a step. Prints a table and one line of JSON.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

if not __package__:  # a script imports from its own checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.exc import InductorError
from torch._inductor.ir import MultiOutput
from torch._inductor.scheduler import NopKernelSchedulerNode
from torch.fx import GraphModule

from benchmarks import train_step
from benchmarks.card import CARDS
from benchmarks.latency import MODELS
from benchmarks.roofline import Operator, floor, operators
from benchmarks.train_step import Bench
from pipeline.benchmark.models import create_model
from pipeline.cache.config import CacheConfig, TeacherConfig
from pipeline.cache.layout.cached_teacher import CachedTeacher, make_teacher
from pipeline.cache.layout.stats import Moments
from pipeline.student.folding import inference_form
from pipeline.training.meter import StepTimer

FEW, MORE = 2, 4
"""Images of the two records."""
INFERENCE_BATCH = 64
"""Images of a forward pass of a network for inference."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Count and print."""
    options = _parse(arguments)
    records = {**steps(options), **extraction(options), **inference(options)}
    counts = {name: len(found) for name, found in records.items()}
    least: dict[str, dict[str, Any]] = {}
    print(
        f"{'':<36}{'operators':>10}{'TFLOP':>10}{'GB':>10}" + "".join(f"{f'{c}, ms':>14}{'fused':>10}" for c in CARDS)
    )
    for name, found in records.items():
        times = {
            card: [round(1e3 * floor(found, rates, fused), 3) for fused in (False, True)]
            for card, rates in CARDS.items()
        }
        flops, moved = sum(one.flops for one in found) / 1e12, sum(one.bytes for one in found) / 1e9
        columns = "".join(f"{eager:>14.3f}{fused:>10.3f}" for eager, fused in times.values())
        print(f"{name:<36}{counts[name]:>10}{flops:>10.3f}{moved:>10.3f}{columns}", flush=True)
        least[name] = {"operators": counts[name], "tflop": round(flops, 4), "gb": round(moved, 3), "ms": times}
    figures = {"student": options.student, "image_size": options.image_size, "teacher": options.teacher, "least": least}
    print(json.dumps(figures | ({"compiled": compiled_kernels(options)} if options.compiled else {})))


def steps(options: argparse.Namespace) -> dict[str, list[Operator]]:
    """Operators of a step of the student alone, and with cached teachers, for `--batch-size` images."""
    few, more = ({name: _record(bench, name) for name in bench.steppers} for bench in _benches(options, FEW, MORE))
    return {f"step: {name}": _extrapolate(few[name], more[name], options.batch_size) for name in few}


def extraction(options: argparse.Namespace) -> dict[str, list[Operator]]:
    """Operators of a batch of images: the teacher's, and those of codec and statistics."""
    config = TeacherConfig(model=options.teacher, weights="random")
    teacher = make_teacher(config)
    teacher.load("cpu", torch.bfloat16)
    codecs = CachedTeacher(config, teacher.spec, "", CacheConfig().codec, "bfloat16").codecs()
    records: dict[str, list[list[Operator]]] = {"batch: teacher": [], "batch: codec": []}
    for images in (FEW, MORE):
        pixels = torch.randint(0, 256, (images, 3, *teacher.spec.input_size), dtype=torch.uint8)
        with torch.inference_mode():
            teacher.encode(pixels)  # some constants are computed once
            with operators() as found:
                output = teacher.encode(pixels)
            records["batch: teacher"].append(found)
            with operators() as found:
                for kind, codec in codecs.items():
                    codec.encode(getattr(output, kind))
                    Moments.of(getattr(output, kind))
            records["batch: codec"].append(found)
    return {name: _extrapolate(few, more, options.batch_size) for name, (few, more) in records.items()}


def inference(options: argparse.Namespace) -> dict[str, list[Operator]]:
    """Operators of a forward pass of networks in their inference form, for `INFERENCE_BATCH` images."""
    found = {}
    images = torch.randn(MORE, 3, options.inference_size, options.inference_size)
    for name in options.models:
        model = inference_form(create_model(name), images[:1]).bfloat16()
        with torch.inference_mode(), operators() as few:
            model(images[:FEW].bfloat16())
        with torch.inference_mode(), operators() as more:
            model(images.bfloat16())
        found[f"forward: {name}"] = _extrapolate(few, more, INFERENCE_BATCH)
    return found


def compiled_kernels(options: argparse.Namespace) -> dict[str, dict[str, int]]:
    """Kernels of forward and backward after fusion, and operators of the rest of a step, by kind of step."""
    (bench,) = _benches(options, FEW)
    found = {}
    for name, stepper in bench.steppers.items():
        stepper.wrapped.train()
        with operators() as inside:
            stepper._accumulate([bench.batch], 0, StepTimer(bench.device))
        rest, kernels = len(_record(bench, name)) - len(inside), list[int]()
        stepper.module.compile(backend=_counting(kernels))
        bench.step(name)
        found[name] = {"forward": kernels[0], "backward": kernels[1], "rest": rest, "all": sum(kernels) + rest}
        print(f"compiled step: {name}: {found[name]}", flush=True)
    return found


class _CountedError(Exception):
    """Ends a compilation before code is generated."""


def _counting(kernels: list[int]) -> Any:
    """A backend of torch.compile that fuses as Inductor does, appends the number of kernels, and runs the graph as it is."""

    def count(nodes: list[Any]) -> list[Any]:
        launched = [node for node in nodes if not isinstance(node, NopKernelSchedulerNode)]
        # a MultiOutput is one of several results of a kernel
        kernels.append(sum(not isinstance(node.node, MultiOutput) for node in launched))
        raise _CountedError

    def lower(graph: GraphModule, inputs: list[Any], is_backward: bool) -> Any:
        try:
            with inductor_config.patch(_post_fusion_custom_pass=count):
                compile_fx_inner(graph, inputs, is_backward=is_backward)
        except InductorError as error:
            if not isinstance(error.inner_exception, _CountedError):
                raise
        return make_boxed_func(graph.forward)

    return aot_autograd(
        fw_compiler=partial(lower, is_backward=False),
        bw_compiler=partial(lower, is_backward=True),
        decompositions=select_decomp_table,
        partition_fn=partial(min_cut_rematerialization_partition, compiler="inductor"),
    )


def _benches(options: argparse.Namespace, *sizes: int) -> Iterator[Bench]:
    chosen = {name: getattr(options, name) for name in ("student", "image_size", "head_dim")}
    for size in sizes:
        named = {**chosen, "batch_size": size, "images": size, "precision": "bfloat16"}
        with TemporaryDirectory() as folder:
            yield Bench(argparse.Namespace(**{**vars(train_step._parse([])), **named}), folder)


def _record(bench: Bench, name: str) -> list[Operator]:
    bench.steppers[name].wrapped.train()
    bench.step(name)  # in which the optimiser's state is made
    # On a GPU, and here only if told to, gradients are clipped together.
    with patch("torch.nn.utils.clip_grad._has_foreach_support", return_value=True), operators() as found:
        bench.step(name)
    return found


def _extrapolate(few: Sequence[Operator], more: Sequence[Operator], images: int) -> list[Operator]:
    """The operators for a number of images, from those for `FEW` and for `MORE`."""
    share = (images - FEW) / (MORE - FEW)
    line: Callable[[float, float], float] = lambda low, high: low + share * (high - low)  # noqa: E731
    return [
        replace(low, flops=line(low.flops, high.flops), bytes=line(low.bytes, high.bytes))
        for low, high in zip(few, more, strict=True)
    ]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="regla_m")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--head-dim", type=int, default=1024, help="hidden channels of the heads")
    parser.add_argument("--teacher", default="dinov2/vitb14", help="whose extraction is counted")
    parser.add_argument(
        "--batch-size", type=int, default=256, help="images of a step, and of a forward pass of the teacher"
    )
    parser.add_argument("--models", nargs="*", default=list(MODELS), help="whose forward passes are counted")
    parser.add_argument("--inference-size", type=int, default=224, help="side of their images in pixels")
    parser.add_argument("--compiled", action="store_true", help="count the kernels of a compiled step")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
