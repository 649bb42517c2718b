"""An exported folder gives what eager gives, in every format, at two sizes, and without this project."""

import copy
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import onnxruntime
import pytest
import timm
import torch
import yaml

from pipeline.config.load import load_config
from pipeline.downstream.base import make_task
from pipeline.downstream.config import FinetuneJobConfig
from pipeline.downstream.saved import SavedModel, find_model
from pipeline.errors import UserError
from pipeline.export import folder as export_folder
from pipeline.export.bundle import make_bundle, make_task_bundle
from pipeline.export.card import hub_card, model_card
from pipeline.export.folder import export_bundle
from pipeline.runtime.timing import Timing
from pipeline.student.loading import LoadedStudent, load_student

SHAPES = [(1, 64, 64), (3, 97, 130)]
SHALLOW = {"depths": (1, 1, 1, 1)}
SMALL = "timm/mobilenetv4_conv_small_035"
ORIGIN = {
    "run_id": "0123",
    "teachers": [{"name": "sam", "architecture": "timm/samvit", "weights": "hub:sa1b", "licence": "apache-2.0"}],
    "data": [{"location": "photos", "fingerprint": "f" * 64, "view": "full", "images": 7, "classes": 3}],
    "training": {"epochs": 2, "samples_seen": 14},
    "knn": {"knn": 61.5, "sam": None},
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory, live):
    """A short ReGLA-T in every format that is checked here: its folder, description and eager form."""
    folder = tmp_path_factory.mktemp("exported")
    loaded = load_student("regla_t", weights="random", args=SHALLOW)._replace(provenance=ORIGIN)
    live(loaded.encoder)
    described = export_bundle(make_bundle(loaded, 64), ["safetensors", "torch_export", "onnx", "hf"], folder, rounds=1)
    return SimpleNamespace(folder=folder, described=described, eager=loaded.encoder)


def by_timm(folder, encoder):
    """What plain timm makes of a hub folder, on images in [0, 1]."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return lambda images: model((images - encoder.mean) / encoder.std)


@pytest.fixture(params=["safetensors", "torch_export", "onnx", "hf"])
def reloaded(request, exported):
    """An exported file, loaded as its users do."""
    if request.param == "safetensors":
        return load_student(str(exported.folder)).encoder
    if request.param == "torch_export":
        return torch.export.load(exported.folder / "student.pt2").module()
    if request.param == "hf":
        return by_timm(exported.folder / "hf", exported.eager)
    session = onnxruntime.InferenceSession(exported.folder / "student.onnx", providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"image": images.numpy()})[0])


@torch.no_grad()
def test_every_format_gives_what_eager_gives_at_two_sizes(exported, reloaded):
    for batch, height, width in SHAPES:
        images = torch.rand(batch, 3, height, width)
        expected = exported.eager(images)
        assert (reloaded(images) - expected).abs().max() <= 1e-4 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("name", ["regla_s", "regla_m", "regla_l", "regla_xl"])
def test_every_size_reloads_with_plain_timm(name, tmp_path, live):
    loaded = load_student(name, weights="random", args=SHALLOW)
    live(loaded.encoder)
    described = export_bundle(make_bundle(loaded, 64), ["safetensors", "hf"], tmp_path)
    assert {form: entry["parity"]["relative_error"] < 1e-4 for form, entry in described["formats"].items()} == {
        "safetensors": True,
        "hf": True,
    }
    images = torch.rand(2, 3, 64, 96)
    expected = loaded.encoder(images)
    assert (by_timm(tmp_path / "hf", loaded.encoder)(images) - expected).abs().max() <= 1e-4 * expected.abs().max()


def snippets(card):
    """The Python blocks of a model card."""
    return re.findall(r"```python\n(.*?)```", card.read_text(), flags=re.DOTALL)


def test_the_four_lines_of_the_card_run_where_this_project_is_not(exported):
    """Clean: a process of its own in the exported folder, no PYTHONPATH, no user packages, and no `pipeline` to be found."""
    torch_export, onnx, timm_ = snippets(exported.folder / "README.md")
    assert snippets(exported.folder / "hf/README.md") == [timm_]
    assert [len(snippet.splitlines()) for snippet in (torch_export, onnx, timm_)] == [4, 4, 4]
    check = "assert features.shape[1:] == (256,); print('loaded')"
    clean = "import importlib.util; assert importlib.util.find_spec('pipeline') is None"
    (maps,) = re.findall(r"`(model\.forward_intermediates.*?)`", (exported.folder / "hf/README.md").read_text())
    pyramid = f"assert [m.shape[-1] for m in {maps}] == [16, 8, 4, 2]"
    code = [clean, torch_export, check, onnx, check, "import os; os.chdir('hf')", timm_, check, pyramid]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(
        [sys.executable, "-s", "-c", "\n".join(code)],
        cwd=exported.folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.stdout == "loaded\nloaded\nloaded\n", ended.stderr


def test_the_description_and_the_card_say_where_it_comes_from(exported):
    written = json.loads((exported.folder / "export.json").read_text())
    assert written == exported.described
    assert written["input"]["shape"] == ["batch", 3, "height", "width"]
    assert [output["shape"] for output in written["outputs"]] == [["batch", 256]]
    assert written["formats"].keys() == {"safetensors", "torch_export", "onnx", "hf"}
    for entry in written["formats"].values():
        assert (exported.folder / entry["file"]).exists()
        assert entry["parity"]["relative_error"] <= 1e-4
        assert entry["parity"]["shapes"] == [[1, 3, 64, 64], [3, 3, 96, 128]]
    card = (exported.folder / "README.md").read_text()
    for expected in ("| sam | timm/samvit | hub:sa1b | apache-2.0 |", "7 of `photos`", "knn 61.5 %", "MLflow run 0123"):
        assert expected in card
        assert expected in (exported.folder / "hf/README.md").read_text()


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (ORIGIN | {"run_id": "89ab"}, ["went on from the student `first`, distilled on 7 of `photos`", "run 89ab"]),
        (
            {"weights": "hub:x.y", "licence": "cc-by-nc-4.0"},
            ["started from the weights `hub:x.y`, licence cc-by-nc-4.0"],
        ),
    ],
)
def test_the_card_says_what_a_student_started_from_with_its_teachers_and_licences(exported, start, expected):
    earlier = {"name": "dinov3", "architecture": "x", "weights": "y", "licence": "dinov3-licence"}
    start = start | {"named": "first", **({"teachers": [earlier]} if "teachers" in start else {})}
    card = hub_card(exported.described | {"provenance": ORIGIN | {"start": start}})
    for words in (*expected, "| sam |", "license: other"):
        assert words in card
    assert ("| dinov3 | x | y | dinov3-licence |" in card) == ("teachers" in start)


def test_the_card_has_the_evaluations_of_the_student_beside_its_teachers(exported):
    place = {"images": "coco/val2017", "set": "val-7", "features": "the head of sam/vit_b", "run_id": "45"}
    entry = {"evaluation": "promptable", "figures": {"mask_iou": 51.26, "objects": 1234.0}, **place}
    described = exported.described | {"provenance": ORIGIN | {"evaluations": [entry]}}
    row = "| promptable | the head of sam/vit_b | `coco/val2017` (val-7) | mask_iou 51.3 %, objects 1234 |"
    for card in (model_card(described), hub_card(described)):
        assert row in card.splitlines()
        assert "it was not measured on others" not in card
    assert "| evaluation |" not in model_card(exported.described)


@pytest.mark.parametrize(
    ("output", "flag"),
    [("clip/x.summary", "--classes"), ("dinov2/x.patches", "--pca"), ("sam/vit_b.patches", "--boxes")],
)
def test_the_card_names_what_each_head_can_do(exported, output, flag):
    outputs = [*exported.described["outputs"], {"name": output, "shape": ["batch", 4], "meaning": "x"}]
    assert flag in model_card(exported.described | {"outputs": outputs})
    assert flag not in model_card(exported.described)


def test_graphs_are_timed_beside_eager(exported):
    formats = exported.described["formats"]
    assert exported.described["latency"]["of_eager"] == 1
    for form in ("torch_export", "onnx"):
        assert formats[form]["latency"]["milliseconds"] > 0
        assert "one image of 64 px, median of 1 rounds" in formats[form]["latency"]["measured"]
    assert "latency" not in formats["hf"]


@pytest.mark.parametrize(("spreads", "measured"), [([0.1], 1), ([0.5, 0.1], 2), ([0.5, 0.5, 0.5], 0)])
def test_a_time_that_other_programs_disturb_is_measured_again_or_left_out(
    monkeypatch, caplog, exported, spreads, measured
):
    results = iter(spreads)

    def interleave(calls, reference, rounds):
        spread = next(results)
        return {name: Timing(1.0, (1 - spread / 2, 1 + spread / 2), 1.0, (1.0, 1.0)) for name in calls}

    monkeypatch.setattr(export_folder, "interleave", interleave)
    found = export_folder._latency(
        SimpleNamespace(size=8, model=lambda images: images), {"onnx": lambda images: images}, 1
    )
    assert set(found) == ({"eager", "onnx"} if measured else set())
    assert next(results, None) is None
    assert ("other programs use this machine" in caplog.text) == (not measured)
    described = copy.deepcopy(exported.described)
    for form in ("torch_export", "onnx"):
        del described["formats"][form]["latency"]
    card = model_card({**described, "latency": None})
    assert card.count("left out: the machine was busy") == 2
    assert "Eager takes" not in card


def test_the_hub_folder_has_the_hubs_front_matter_and_timms_preprocessing(exported):
    _, front, _ = (exported.folder / "hf/README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "timm",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["timm", "image-feature-extraction", "distillation"],
        "license": "apache-2.0",
    }
    model = timm.create_model(f"local-dir:{exported.folder}/hf", pretrained=True)
    data = timm.data.resolve_model_data_config(model)
    assert (data["input_size"], data["crop_mode"], data["crop_pct"]) == ((3, 64, 64), "squash", 1.0)
    assert data["mean"] == pytest.approx((0.485, 0.456, 0.406))


@torch.no_grad()
def test_a_timm_student_whose_head_does_more_says_how_its_features_are_had(tmp_path):
    loaded = load_student(SMALL, weights="random")
    export_bundle(make_bundle(loaded, 64), ["hf"], tmp_path)
    (snippet,) = snippets(tmp_path / "hf/README.md")
    assert "forward_intermediates" in snippet
    assert "regla" not in snippet
    assert not (tmp_path / "hf/regla.py").exists()
    names: dict = {}
    exec(snippet.replace("local-dir:.", f"local-dir:{tmp_path}/hf"), names)
    expected = loaded.encoder(torch.zeros(1, 3, 64, 64))
    torch.testing.assert_close(names["features"], expected, rtol=1e-4, atol=1e-5)


def classifier(name, live, args):
    encoder = load_student(name, weights="random", args=args).encoder
    classes = ("ant", "bee", "cow")
    task = make_task(load_config(FinetuneJobConfig, None, ["student.input_size=64", "classify.crop_share=0.9"]))
    model = live(task.build(encoder, classes))
    return SavedModel(task, model, classes, {"model": name.removeprefix("timm/"), "args": args})


@torch.no_grad()
@pytest.mark.parametrize(("name", "args"), [("regla_t", SHALLOW), ("timm/test_resnet", {})])
def test_a_fine_tuned_classifier_keeps_its_classes_and_its_way_with_images(name, args, tmp_path, live):
    saved = classifier(name, live, args)
    described = export_bundle(make_task_bundle(saved), ["safetensors", "hf"], tmp_path)
    assert described["classes"] == ["ant", "bee", "cow"]
    assert described["outputs"][0]["shape"] == ["batch", 3]
    images = torch.rand(2, 3, 64, 64)
    expected = saved.model(images)
    again = find_model(str(tmp_path), "")
    assert again.classes == saved.classes
    torch.testing.assert_close(again.model(images), expected)
    torch.testing.assert_close(by_timm(tmp_path / "hf", saved.encoder)(images), expected, rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config["label_names"], config["num_classes"]) == (["ant", "bee", "cow"], 3)
    assert (config["pretrained_cfg"]["crop_pct"], config["pretrained_cfg"]["crop_mode"]) == (0.9, "center")
    assert "Classes, by number: ant, bee, cow." in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "args"), [(SMALL, {}), ("timm/test_convnext", {}), ("timm/test_vit", {"img_size": 64})]
)
def test_a_classifier_that_timm_has_no_place_for_is_named(name, args, tmp_path, live):
    expected = rf"hf: timm's {name} has other layers between its last map .*: --format safetensors torch_export onnx"
    with pytest.raises(UserError, match=expected.replace("timm/", "")):
        export_bundle(make_task_bundle(classifier(name, live, args)), ["hf"], tmp_path)


def test_what_differs_from_eager_is_not_exported(tmp_path, monkeypatch):
    loaded = load_student(SMALL, weights="random")
    monkeypatch.setitem(
        export_folder._WRITERS,
        "onnx",
        lambda *_: export_folder.Written(tmp_path, lambda images: loaded.encoder(images) * 1.01),
    )
    with pytest.raises(UserError, match=r"onnx: differs from eager by 1.0e-02"):
        export_bundle(make_bundle(loaded, 64), ["onnx"], tmp_path)
    assert not (tmp_path / "export.json").exists()


def test_a_graph_from_elsewhere_is_not_exported_again():
    with pytest.raises(UserError, match="m-1: is already a graph"):
        make_bundle(LoadedStudent(torch.nn.Flatten(), "m-1", None, {}, {}), 64)
