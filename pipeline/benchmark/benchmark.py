"""Cost and latency of networks, all measured interleaved in one run."""

import copy
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from pipeline.benchmark.config import BenchmarkConfig
from pipeline.benchmark.models import create_model, parse
from pipeline.errors import UserError
from pipeline.export.graphs import INPUT, export_onnx
from pipeline.runtime.timing import interleave
from pipeline.student.cost import Cost, cost
from pipeline.student.folding import inference_form

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def benchmark(config: BenchmarkConfig) -> pd.DataFrame:
    """Measure every model in every form at every size, batch size and precision; `config` has passed :func:`check`.

    All models and forms of one size, batch size and precision are interleaved, so that drift affects all alike.

    Returns:
        A row for each, fastest first within a size, batch, precision and form. The cost is that of the measured form on one
        image, `milliseconds` those of one forward pass. `ratio` refers to the reference model in the same form. Columns in `_q1`
        and `_q3` are quartiles over the rounds.

    Raises:
        UserError: for a model that does not accept a size.
    """
    torch.set_num_threads(config.threads)
    models = {text: create_model(text) for text in config.models}
    counted = {
        (name, form, size): counts
        for size in config.sizes
        for name, model in models.items()
        for form, counts in _costs(name, model, config, size)
    }
    rows: list[dict[str, Any]] = []
    groups = [(s, b, p) for s in config.sizes for b in config.batch_sizes for p in config.precisions]
    for size, batch, precision in tqdm(groups, desc="benchmark", unit="group", disable=len(groups) == 1):
        images = torch.randn(batch, 3, size, size, device=config.device)
        calls = {
            (name, form): runner(model.to(config.device), form, images, precision, config.threads)
            for name, model in models.items()
            for form in config.forms
        }
        timings = interleave(calls, lambda key: (config.reference, key[1]), config.rounds)
        for (name, form), timing in timings.items():
            row = {
                "model": name,
                "form": form,
                "device": config.device,
                "precision": precision,
                "threads": config.threads,
                "batch": batch,
                "size": size,
                **dataclasses.asdict(counted[name, form, size]),
                "milliseconds": timing.median * 1e3,
                "milliseconds_q1": timing.quartiles[0] * 1e3,
                "milliseconds_q3": timing.quartiles[1] * 1e3,
                "images_per_second": batch / timing.median,
                "ratio": timing.ratio,
                "ratio_q1": timing.ratio_quartiles[0],
                "ratio_q3": timing.ratio_quartiles[1],
            }
            rows.append(row)
    keys = ["size", "batch", "precision", "form", "milliseconds"]
    return pd.DataFrame(rows).sort_values(keys, ignore_index=True)


def render(table: pd.DataFrame) -> str:
    """Text for people, with medians and quartiles."""
    shown = table[["model", "form", "device", "precision", "threads", "size", "batch"]].assign(
        params=table.parameters.map(lambda n: f"{n / 1e6:.2f} M"),
        GMACs=table.macs.map(lambda n: f"{n / 1e9:.3f}"),
        activations=table.activations.map(lambda n: f"{n / 1e6:.1f} M"),
        peak=table.peak_bytes.map(lambda n: f"{n / 2**20:.0f} MiB"),
        ms=_spread(table, "milliseconds", ".1f"),
        ratio=_spread(table, "ratio", ".2f"),
    )
    return shown.to_string(index=False)


def _spread(table: pd.DataFrame, column: str, form: str) -> list[str]:
    values = zip(table[column], table[f"{column}_q1"], table[f"{column}_q3"], strict=True)
    return [f"{median:{form}} [{low:{form}} {high:{form}}]" for median, low, high in values]


def check(config: BenchmarkConfig) -> None:
    """Refuse invalid settings before anything is measured.

    Raises:
        UserError: for an unknown model, a missing GPU, or ONNX Runtime other than on the CPU in float32.
    """
    if config.reference not in config.models:
        raise UserError(f"benchmark.reference: {config.reference} is not in benchmark.models")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("benchmark.device: there is no GPU that torch can use; set benchmark.device=cpu")
    if "onnx" in config.forms and (config.device != "cpu" or set(config.precisions) != {"float32"}):
        raise UserError("benchmark.forms: onnx is measured in float32 on the CPU; leave it out or change the others")
    for text in config.models:
        parse(text)


def _costs(name: str, model: nn.Module, config: BenchmarkConfig, size: int) -> Iterator[tuple[str, Cost]]:
    images = torch.zeros(1, 3, size, size)
    try:
        as_trained = cost(model, images)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"benchmark.models: {name} does not take {size} px images: {error}") from None
    folded = cost(inference_form(copy.deepcopy(model), images), images)
    for form in config.forms:
        yield form, as_trained if form == "eager" else folded


def runner(model: nn.Module, form: str, images: Tensor, precision: str, threads: int) -> Callable[[], object]:
    """Return a function that runs ``model`` once on ``images`` and returns when the work is done.

    Args:
        model: in eval mode and float32, on the device of ``images``; it is not modified.
        form: ``eager``: as trained; ``fused``: in its inference form; ``compiled``, ``onnx``: that form under ``torch.compile``
            and in ONNX Runtime (only on the CPU in float32).
        images: (B, C, H, W) float32.
        precision: of weights and images.
        threads: CPU threads of ONNX Runtime; the caller sets those of torch, which apply to the whole process.
    """
    if form != "eager":
        # Folded on the CPU: a GPU convolves in TF32, whose error is as large as the one that folding may have.
        model = inference_form(copy.deepcopy(model).cpu(), images[:1].cpu()).to(images.device)
    if form == "onnx":
        return _onnx_runner(model, images, threads)
    return torch_runner(model, form == "compiled", images, precision)


def torch_runner(model: nn.Module, compiled: bool, images: Tensor, precision: str) -> Callable[[], object]:
    """As :func:`runner`, for a model as it is."""
    model, images = copy.deepcopy(model).to(DTYPES[precision]), images.to(DTYPES[precision])
    if compiled:
        # On a GPU, kernel launches dominate the time of a small network; a CUDA graph is launched once.
        mode = "reduce-overhead" if images.is_cuda else None
        model = torch.compile(model, fullgraph=True, dynamic=False, mode=mode)  # type: ignore[assignment]

    @torch.inference_mode()
    def run() -> None:
        model(images)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)

    return run


def _onnx_runner(model: nn.Module, images: Tensor, threads: int) -> Callable[[], object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Threads of one session must not spin while another session is measured.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with tempfile.TemporaryDirectory() as folder:
        file = export_onnx(model, Path(folder) / "model.onnx", images, dynamic=())
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    feed = {INPUT: images.numpy()}
    return lambda: session.run(None, feed)
