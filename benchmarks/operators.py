"""Profile a model's inference form in ONNX Runtime on one thread: time by operator and by shape.

    python benchmarks/operators.py regla_m --size 512

Prints a table by operator, one by operator and shapes, and one line of JSON with the share of each operator.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # a script imports from its own checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import onnxruntime
import torch

from pipeline.benchmark.models import create_model
from pipeline.export.graphs import INPUT, export_onnx
from pipeline.student.folding import inference_form


def main(arguments: Sequence[str] | None = None) -> None:
    """Profile one model and print where its time goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a timm model")
    parser.add_argument("--size", type=int, default=512, help="side of the image in pixels")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--rows", type=int, default=15, help="rows of the table by shape")
    options = parser.parse_args(arguments)
    by_operator: Counter[str] = Counter()
    by_shape: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for event in profile(options.model, options.size, options.runs):
        operator, milliseconds = event["args"]["op_name"], event["dur"] / 1e3 / options.runs
        shapes = [next(iter(shape.values())) for shape in event["args"]["input_type_shape"][:2]]
        by_operator[operator] += milliseconds
        by_shape[f"{operator:<14} {' x '.join(map(str, shapes))}"] += milliseconds
        count[operator] += 1
    total = sum(by_operator.values())
    print(f"{options.model} at {options.size} px: {total:.1f} ms in operators, ONNX Runtime, one thread, profiled")
    for operator, milliseconds in by_operator.most_common():
        calls = count[operator] // options.runs
        print(f"  {operator:<16} {calls:>4} x {milliseconds:8.2f} ms {milliseconds / total:7.1%}")
    for row, milliseconds in by_shape.most_common(options.rows):
        print(f"  {milliseconds:8.2f} ms {milliseconds / total:6.1%}  {row}")
    shares = {operator: round(milliseconds / total, 4) for operator, milliseconds in by_operator.most_common()}
    print(json.dumps({"model": options.model, "size": options.size, "milliseconds": round(total, 2), "shares": shares}))


def profile(name: str, size: int, runs: int) -> list[dict[str, Any]]:
    """ONNX Runtime's profile of ``runs`` passes over one image, after two warm-up passes."""
    image = torch.randn(1, 3, size, size)
    model = inference_form(create_model(name), image)
    with tempfile.TemporaryDirectory() as folder:
        file = export_onnx(model, Path(folder) / "model.onnx", image, dynamic=())
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        for _ in range(runs + 2):
            session.run(None, {INPUT: image.numpy()})
        events = json.loads(Path(session.end_profiling()).read_text())
    kernels = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    return kernels[2 * len(kernels) // (runs + 2) :]


if __name__ == "__main__":
    main()
