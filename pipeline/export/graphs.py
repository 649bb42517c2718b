"""A student in the formats of other runtimes: torch.export, ONNX and Core ML.

The model is in evaluation mode, best in its inference form; it maps one image tensor to a tensor or a tuple of them.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.runtime.logs import only_errors

OPSET = 18
INPUT, OUTPUT = "image", "output"


def export_onnx(
    model: nn.Module,
    path: Path | str,
    example: Tensor,
    dynamic: Sequence[int] = (0, 2, 3),
    outputs: Sequence[str] = (OUTPUT,),
) -> Path:
    """Write one ONNX file (opset 18, weights inside) whose input is named ``image``; returns its path.

    Args:
        example: images [B, C, H, W]; with B >= 2 and H unlike W, the exporter does not take two dynamic dimensions for one.
        dynamic: dimensions that stay open; with none, a runtime can fold more of the graph.
        outputs: names.

    Raises:
        UserError: if the model is in training mode.
    """
    _check_eval(model)
    # The exporter warns of operators of packages that are not installed.
    with torch.no_grad(), only_errors("torch.onnx"):
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=(dict.fromkeys(dynamic, torch.export.Dim.DYNAMIC),) if dynamic else None,
            input_names=[INPUT],
            output_names=list(outputs),
            verbose=False,
        )
        assert program is not None
        program.save(path, external_data=False)
    return Path(path)


def export_torch(model: nn.Module, path: Path | str, example: Tensor, dynamic: Sequence[int] = (0, 2, 3)) -> Path:
    """Write a torch.export program (``.pt2``), which torch loads without the model's code; returns its path.

    Arguments are those of :func:`export_onnx`; dynamic heights and widths start at 33 pixels.
    """
    _check_eval(model)
    # torch.export treats a height or width of one cell at stride 32 as a constant.
    least = {0: ("batch", 1), 2: ("height", 33), 3: ("width", 33)}
    shapes = {side: torch.export.Dim(name, min=low) for side, (name, low) in least.items() if side in dynamic}
    with torch.no_grad():
        program = torch.export.export(model, (example,), dynamic_shapes=(shapes,) if shapes else None)
        torch.export.save(program, path)
    return Path(path)


def export_coreml(model: nn.Module, path: Path | str, example: Tensor, outputs: Sequence[str] = (OUTPUT,)) -> Path:
    """Write a Core ML package (``.mlpackage``: ML program, float16, iOS 17 and later); returns its path.

    It takes only the shape of ``example``: phones plan their neural engine for a fixed one.

    Raises:
        UserError: if ``coremltools`` is not installed, or the model is in training mode.
    """
    _check_eval(model)
    try:
        import coremltools as ct
    except ImportError:
        raise UserError(
            "Core ML export needs coremltools: `make env` installs it if it has a wheel for this system and Python version"
        ) from None
    program = torch.export.export(model, (example,)).run_decompositions({})
    package = ct.convert(
        program,
        inputs=[ct.TensorType(name=INPUT, shape=tuple(example.shape))],
        outputs=[ct.TensorType(name=name) for name in outputs],
        minimum_deployment_target=ct.target.iOS17,
    )
    package.save(str(path))
    return Path(path)


def _check_eval(model: nn.Module) -> None:
    if model.training:
        raise UserError("the model is in training mode: call eval() before the export")
