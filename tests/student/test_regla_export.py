"""torch.compile and torch.export: no graph break, and the same numbers as eager at more than one size.

The "eager" backend runs the captured graph as it is: what these tests check is the capture.
"""

import pytest
import torch

SIZES = [(2, 64, 64), (3, 97, 130)]


@pytest.fixture(params=["train form", "fused"])
def model(request, tiny, live):
    net = live(tiny(depths=(1, 1, 1, 1)))
    return net.fuse() if request.param == "fused" else net


def images(batch: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(batch, 3, height, width)


def test_compile_without_graph_breaks(tiny, live):
    torch.compiler.reset()
    model = live(tiny(depths=(1, 1, 1, 1))).fuse()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for size in SIZES:
            x = images(*size)
            assert torch.allclose(compiled(x), model(x), atol=1e-5)


def test_compiled_training_step_on_the_pyramid_has_the_gradients_of_eager(tiny):
    torch.compiler.reset()
    model, x = tiny(depths=(1, 1, 1, 1), num_classes=0).train(), images(4, 64, 64)
    compiled = torch.compile(model.forward_intermediates, fullgraph=True, backend="eager")
    grads = []
    for pyramid in (model.forward_intermediates, compiled):
        model.zero_grad()
        sum(m.square().mean() for m in pyramid(x, intermediates_only=True)).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(*grads, strict=True))


def test_export_with_dynamic_batch_and_size(model):
    batch, height, width = (torch.export.Dim(name, min=low) for name, low in (("b", 1), ("h", 33), ("w", 33)))
    dynamic_shapes = {"x": {0: batch, 2: height, 3: width}}
    with torch.no_grad():
        program = torch.export.export(model, (images(2, 64, 96),), dynamic_shapes=dynamic_shapes).module()
        for size in [*SIZES, (1, 333, 50)]:
            x = images(*size)
            assert torch.allclose(program(x), model(x), atol=1e-5)
