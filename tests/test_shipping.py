"""An exported folder gives what eager gives, in every format, at two sizes, and without this project."""

import json
import subprocess
import sys
from types import SimpleNamespace

import onnxruntime
import pytest
import timm
import torch

from pipeline import shipping
from pipeline.errors import UserError
from pipeline.shipping import ship
from pipeline.student.loading import Loaded, load_any

SHAPES = [(1, 64, 64), (3, 97, 130)]
ORIGIN = {
    "run_id": "0123",
    "teachers": [{"name": "sam", "architecture": "timm/samvit", "weights": "hub:sa1b", "licence": "apache-2.0"}],
    "data": [{"location": "photos", "fingerprint": "f" * 64, "view": "full", "images": 7, "classes": 3}],
    "training": {"epochs": 2, "samples_seen": 14},
    "knn": {"knn": 61.5, "sam": None},
}


@pytest.fixture(scope="module")
def shipped(tmp_path_factory, live):
    """A short ReGLA-T in every format that is checked here: its folder, description and eager form."""
    folder, args = tmp_path_factory.mktemp("shipped"), {"depths": (1, 1, 1, 1)}
    loaded = load_any("regla_t", weights="random", args=args)._replace(provenance=ORIGIN)
    live(loaded.encoder)
    described = ship(loaded, ["safetensors", "torch_export", "onnx"], folder, 64)
    return SimpleNamespace(folder=folder, described=described, eager=loaded.encoder)


@pytest.fixture(params=["safetensors", "torch_export", "onnx"])
def reloaded(request, shipped):
    """An exported file, loaded as its users do."""
    if request.param == "safetensors":
        return load_any(str(shipped.folder)).encoder
    if request.param == "torch_export":
        return torch.export.load(shipped.folder / "student.pt2").module()
    session = onnxruntime.InferenceSession(shipped.folder / "student.onnx", providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"image": images.numpy()})[0])


@torch.no_grad()
def test_every_format_gives_what_eager_gives_at_two_sizes(shipped, reloaded):
    for batch, height, width in SHAPES:
        images = torch.rand(batch, 3, height, width)
        expected = shipped.eager(images)
        assert (reloaded(images) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_graphs_load_where_this_project_is_not(shipped, tmp_path):
    card = (shipped.folder / "README.md").read_text()
    snippets = [part.split("```")[0] for part in card.split("```python\n")[1:]]
    graphs = [snippet for snippet in snippets if "timm" not in snippet]
    assert [len(snippet.splitlines()) for snippet in graphs] == [4, 4]
    check = "import sys; assert 'pipeline' not in sys.modules; assert features.shape == (2, 256); print('loaded')"
    command = [sys.executable, "-I", "-c", "\n".join(line for graph in graphs for line in [*graph.splitlines(), check])]
    ended = subprocess.run(command, cwd=shipped.folder, capture_output=True, text=True, check=False)
    assert ended.stdout == "loaded\nloaded\n", ended.stderr


def test_the_description_and_the_card_say_where_it_comes_from(shipped):
    written = json.loads((shipped.folder / "export.json").read_text())
    assert written == shipped.described
    assert written["input"]["shape"] == ["batch", 3, "height", "width"]
    assert written["output"]["shape"] == ["batch", 256]
    for entry in written["formats"].values():
        assert (shipped.folder / entry["file"]).is_file()
        assert entry["parity"]["relative_error"] <= 1e-4
        assert entry["parity"]["shapes"] == [[1, 3, 64, 64], [3, 3, 96, 128]]
    card = (shipped.folder / "README.md").read_text()
    for expected in ("| sam | timm/samvit | hub:sa1b | apache-2.0 |", "7 of `photos`", "knn 61.5 %", "MLflow run 0123"):
        assert expected in card


def test_weights_load_with_plain_timm(tmp_path):
    loaded = load_any("timm/mobilenetv4_conv_small_035", weights="random")
    ship(loaded, ["safetensors"], tmp_path, 64)
    model = timm.create_model(
        "mobilenetv4_conv_small_035", num_classes=0, checkpoint_path=str(tmp_path / "student.safetensors")
    )
    assert all(
        torch.equal(value, loaded.encoder.backbone.state_dict()[key]) for key, value in model.state_dict().items()
    )
    assert "Weights: random." in (tmp_path / "README.md").read_text()


def test_what_differs_from_eager_is_not_shipped(tmp_path, monkeypatch):
    loaded = load_any("timm/mobilenetv4_conv_small_035", weights="random")
    monkeypatch.setitem(shipping._WRITERS, "onnx", lambda *_: lambda images: loaded.encoder(images) * 1.01)
    with pytest.raises(UserError, match=r"onnx: differs from eager by 1.0e-02"):
        ship(loaded, ["onnx"], tmp_path, 64)
    assert not (tmp_path / "export.json").exists()


def test_a_graph_from_elsewhere_is_not_exported_again(tmp_path):
    with pytest.raises(UserError, match="m-1: is a graph already"):
        ship(Loaded(torch.nn.Flatten(), "m-1", None, {}, {}), ["onnx"], tmp_path, 64)
