"""Every way to name a backbone, and what is said where it is none."""

import hashlib
import json
from functools import partial

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import DropPath

from pipeline.errors import UserError
from pipeline.runs.addresses import fetch_student
from pipeline.student.loading import load_initial_student, load_student
from pipeline.student.model import Encoder, create_backbone

NAME = "mobilenetv4_conv_small_035"


@pytest.fixture
def exported(tmp_path):
    """A folder as a distillation exports it, and its encoder."""
    encoder = Encoder(create_backbone(f"timm/{NAME}")).eval()
    folder = tmp_path / "student"
    folder.mkdir()
    save_file(encoder.backbone.state_dict(), folder / "student.safetensors")
    described = {"model": NAME, "args": {"num_classes": 0}, "input_size": 64}
    (folder / "student.json").write_text(json.dumps(described))
    return folder, encoder


def test_an_exported_folder_brings_its_size(exported):
    folder, encoder = exported
    loaded = load_student(str(folder))
    images = torch.rand(2, 3, 64, 64)
    assert (loaded.name, loaded.input_size) == (NAME, 64)
    assert torch.equal(loaded.encoder(images), encoder(images))


def test_arguments_join_those_that_an_exported_student_was_built_with(exported):
    folder, encoder = exported
    loaded = load_student(str(folder), args={"drop_path_rate": 0.5})
    assert loaded.args == {"num_classes": 0, "drop_path_rate": 0.5}
    drops = [module.drop_prob for module in loaded.encoder.modules() if isinstance(module, DropPath)]
    assert max(drops) == pytest.approx(0.5, abs=0.1)
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(loaded.encoder(images), encoder(images))


def test_a_student_starts_from_an_exported_one_or_from_a_file_of_its_network(exported):
    folder, encoder = exported
    images = torch.rand(2, 3, 64, 64)
    for weights in (folder, folder / "student.safetensors"):
        for name in (NAME, f"timm/{NAME}"):
            assert torch.equal(load_initial_student(name, str(weights), {}).encoder(images), encoder(images))
    assert load_initial_student(NAME, str(folder), {"drop_path_rate": 0.5}).args["drop_path_rate"] == 0.5


def test_a_file_is_taken_where_a_folder_has_the_networks_name_too(exported, tmp_path, monkeypatch):
    folder, _ = exported
    other = Encoder(create_backbone(NAME)).eval()
    save_file(other.backbone.state_dict(), tmp_path / "other.safetensors")
    folder.rename(tmp_path / NAME)
    monkeypatch.chdir(tmp_path)
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(load_initial_student(NAME, "other.safetensors", {}).encoder(images), other(images))


@pytest.mark.parametrize("name", [NAME, "regla_t"])
def test_weights_of_a_file_are_known_by_their_digest_and_nobody_knows_their_licence(name, tmp_path):
    file = tmp_path / "weights.safetensors"
    save_file(create_backbone(name).state_dict(), file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert load_initial_student(name, str(file), {}).provenance == {"weights": f"file:{digest}", "licence": "unknown"}


def test_weights_of_the_hub_are_known_by_their_tag_and_licence(monkeypatch):
    monkeypatch.setattr("pipeline.student.loading._pretrained", lambda name, args: create_backbone(name, args))
    found = load_initial_student("timm/convnextv2_atto", "pretrained", {}).provenance
    assert found == {"weights": "hub:convnextv2_atto.fcmae_ft_in1k", "licence": "cc-by-nc-4.0"}


@pytest.mark.parametrize(
    ("name", "weights", "expected"),
    [
        ("regla_t", "FOLDER", rf"student\.weights: FOLDER belongs to {NAME}; set student\.name={NAME}$"),
        (
            "regla_t",
            "FOLDER/student.safetensors",
            r"student\.weights=FOLDER/student\.safetensors: regla_t: weights: the file lacks stages",
        ),
        (NAME, "nothing", rf"student\.weights=nothing: {NAME}: weights: there is no file .*/nothing; put"),
        (NAME, "models:/nothing/1", r"student\.weights=models:/nothing/1: "),
        (
            NAME,
            "random:3",
            r"student\.weights=random:3: random weights are drawn from `seed`; set student\.weights=random$",
        ),
        ("regla_mm", "FOLDER", r"student\.name: timm has no model regla_mm; did you mean"),
    ],
)
def test_weights_of_another_network_are_refused(exported, tmp_path, name, weights, expected):
    folder, uri = str(exported[0]), f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(UserError, match=expected.replace("FOLDER", folder)):
        load_initial_student(name, weights.replace("FOLDER", folder), {}, partial(fetch_student, tracking_uri=uri))


def test_arguments_that_an_exported_student_was_built_with_are_asked_for(exported):
    folder, _ = exported
    described = json.loads((folder / "student.json").read_text()) | {"args": {"num_classes": 0, "drop_path_rate": 0.1}}
    (folder / "student.json").write_text(json.dumps(described))
    with pytest.raises(
        UserError, match=r'student was built with other arguments; set student\.args=\{"drop_path_rate": 0\.1\}$'
    ):
        load_initial_student(NAME, str(folder), {})
    load_initial_student(NAME, str(folder), {"drop_path_rate": 0.1})


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({"in_chans": 4}, r"student\.args: the weights of .*student do not fit .*size mismatch"),
        ({"sharpness": 1}, r"student\.args: .* refuses .*sharpness"),
        ({"pretrained": True}, "args must not contain pretrained"),
    ],
)
def test_arguments_that_the_weights_of_an_exported_student_do_not_fit_are_named(exported, args, expected):
    with pytest.raises(UserError, match=expected):
        load_student(str(exported[0]), args=args)


def test_a_timm_name_takes_a_file_with_a_classifier(tmp_path):
    model = timm.create_model(NAME).eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    encoder = load_student(f"timm/{NAME}", weights=str(tmp_path / "weights.safetensors")).encoder
    images = torch.rand(2, 3, 64, 64)
    (expected,) = model.forward_intermediates((images - encoder.mean) / encoder.std, indices=1, intermediates_only=True)
    assert torch.allclose(encoder(images), expected.mean(dim=(2, 3)), atol=1e-5)


def test_random_weights_follow_their_seed():
    first, again, other = (
        load_student(NAME, weights=weights).encoder for weights in ("random", "random:0", "random:1")
    )
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(first(images), again(images))
    assert not torch.equal(first(images), other(images))


@pytest.mark.parametrize(
    ("student", "weights", "expected"),
    [
        ("no/such/folder", "random", "neither an exported student folder, nor an MLflow URI"),
        ("timm/mobilenetv5", "random", "timm has no model mobilenetv5"),
        (
            NAME,
            "no/such/file.safetensors",
            f"^{NAME}: weights: there is no file .*/no/such/file.safetensors; put",
        ),
        (NAME, "random:many", "the seed of random:many must be a whole number"),
        (
            "regla_t",
            "pretrained",
            "^regla_t: no weights of it are published; set weights=<path of a file>, or weights=random",
        ),
    ],
)
def test_what_is_no_backbone_is_named(student, weights, expected):
    with pytest.raises(UserError, match=expected):
        load_student(student, weights=weights)


def test_a_file_of_another_architecture_and_an_unreachable_hub_are_named(tmp_path, monkeypatch):
    save_file({"odd": torch.zeros(1)}, tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match=r"weights: the file lacks .*: does it have this architecture"):
        load_student(NAME, weights=str(tmp_path / "odd.safetensors"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    expected = (
        r"^timm/mobilenetv2_100: its pretrained weights are neither .* \(HF_HUB_OFFLINE is set\): put model\.safetensors or "
        r"pytorch_model\.bin of \S+/timm/mobilenetv2_100\.ra_in1k on this machine and set weights=<path of the file>, or "
        "weights=random for an untrained network$"
    )
    with pytest.raises(UserError, match=expected):
        load_student("timm/mobilenetv2_100", weights="pretrained")


def test_weights_of_the_hub_are_asked_for_with_what_the_user_gave(monkeypatch):
    asked, create = [], timm.create_model

    def stub(name, pretrained=False, **args):
        asked.append((name, pretrained, args))
        return create(name, pretrained=False, **args)

    monkeypatch.setattr("timm.create_model", stub)
    loaded = load_student("timm/resnet10t", args={"drop_path_rate": 0.1})
    assert asked[-1] == ("resnet10t", True, {"num_classes": 0, "drop_path_rate": 0.1})
    assert loaded.input_size == 176
    assert load_student("timm/resnet10t", weights="random").input_size is None
    with pytest.raises(UserError, match=r"resnet10t refuses {'colour': 'red'}"):
        load_student("timm/resnet10t", args={"colour": "red"})
