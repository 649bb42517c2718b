"""One network, ready to run in one of its forms."""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.export.graphs import INPUT, export_onnx
from pipeline.student.folding import inference_form

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    model = copy.deepcopy(model)
    if form != "eager":
        model = inference_form(model, images[:1])
    if form == "onnx":
        return _onnx_runner(model, images, threads)
    model, images = model.to(DTYPES[precision]), images.to(DTYPES[precision])
    if form == "compiled":
        # On a GPU, kernel launches dominate the time of a small network; a CUDA graph is launched once.
        mode = "reduce-overhead" if images.is_cuda else None
        model = torch.compile(model, fullgraph=True, mode=mode)  # type: ignore[assignment]

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
