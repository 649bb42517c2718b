"""Words against open_clip, with the teacher's own features in the student's place; the searches; what is refused."""

import json

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import regla
from jobs import predict
from pipeline.cache.read.scan import read_summaries
from pipeline.distill.standardise import make_standardisers
from pipeline.errors import UserError
from pipeline.predict.images import list_images
from pipeline.student.loading import load_student
from pipeline.student.model import save_encoder
from pipeline.voices.heads import Summaries
from pipeline.voices.words import Words, find_summaries, load_words
from teachers.clip_text import load_text_tower
from teachers.registry import create_teacher
from tests.fakes import write_photos
from tests.teachers import tiny_clip

CLASSES = ["a red wall", "the blue sea", "green grass"]


@pytest.fixture
def photos(tmp_path):
    write_photos(tmp_path / "found", 7, seed=5)
    return tmp_path / "found"


class TeacherEncoder(nn.Module):
    """The image tower of a CLIP teacher in the place of a student: [B, 3, H, W] in [0, 1] -> its summary."""

    def __init__(self, name, file):
        super().__init__()
        self.teacher = create_teacher(f"clip/{name}", weights=str(file))
        self.teacher.load()

    def forward(self, images):
        return self.teacher.encode((images * 255).round().to(torch.uint8)).summary


@pytest.mark.parametrize("templates", [["{}"], ["openai"], ["a photo of {}."]])
@pytest.mark.parametrize("name", tiny_clip.NAMES)
def test_the_teachers_own_features_give_the_logits_of_open_clip(name, templates, photos, tmp_path):
    model = tiny_clip.build(name)
    with torch.no_grad():
        model.logit_scale.fill_(
            4.6
        )  # the largest that OpenAI's training allows, where errors of embeddings are largest
    torch.save(model.state_dict(), tmp_path / "both.pt")
    whole = Summaries(TeacherEncoder(name, tmp_path / "both.pt"), nn.Identity(), neutral(), 24)
    words = Words(whole, lambda: load_text_tower(f"clip/{name}", str(tmp_path / "both.pt")), "the teacher", 32, "cpu")
    embedded = words.embed(photos)
    found = words.logits(embedded, words.embed_classes(CLASSES, templates))

    shipped = {"openai": open_clip.OPENAI_IMAGENET_TEMPLATES}
    sentences = [template for given in templates for template in shipped.get(given, [given])]
    weights = open_clip.build_zero_shot_classifier(model, open_clip.get_tokenizer(name), CLASSES, sentences)
    with torch.no_grad():
        images = F.normalize(model.encode_image(normalised(photos)), dim=1)
        expected = model.logit_scale.exp() * images @ weights + (
            model.logit_bias or 0 if name == tiny_clip.SIGMOID else 0
        )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    turned = expected.sigmoid() if name == tiny_clip.SIGMOID else expected.softmax(dim=1)
    best = words.classify(photos, CLASSES, templates, top=2)
    shares, order = turned.topk(2, dim=1)
    assert [[name for name, _ in row] for row in best] == [[CLASSES[n] for n in row] for row in order.tolist()]
    torch.testing.assert_close(torch.tensor([[share for _, share in row] for row in best]), shares, atol=1e-4, rtol=0)


def neutral():
    from pipeline.distill.standardise import neutral_standardiser

    return neutral_standardiser("mean_std", 24)


def normalised(photos):
    """The images as open_clip's model takes them, resized as everywhere in this project."""
    import numpy as np

    from pipeline.imaging.crop import crop_and_resize
    from pipeline.imaging.decode import decode_image
    from pipeline.imaging.geometry import FULL

    pixels = [
        crop_and_resize(decode_image(path.read_bytes()), FULL, (32, 32), "bicubic") for path in list_images(photos)
    ]
    mean, std = (
        torch.tensor(v).view(1, 3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    return (torch.from_numpy(np.stack(pixels)) / 255 - mean) / std


@pytest.mark.parametrize("standardise", ["mean_std", "phi_s"])
def test_the_standardisation_is_undone(standardise, taught):
    made = taught(standardise=standardise)
    model, kept = find_summaries(load_student(str(made.folder)))
    dataset, clip = made.plan.split("train").dataset, made.plan.teachers[0]
    vectors, _ = read_summaries(dataset, clip)
    target = make_standardisers(dataset, clip, standardise)["summary"](vectors)
    torch.testing.assert_close(model.standardiser.inverse(target), vectors, atol=1e-4, rtol=1e-4)
    assert (kept.name, kept.cached.id, model.dim) == (f"clip/{tiny_clip.PLAIN}", clip.id, 24)
    assert kept.cached.shapes == clip.shapes


@pytest.mark.parametrize("student", ["timm/test_resnet", "timm/regla_t"])
def test_a_student_classifies_and_searches_at_any_size(student, taught, photos):
    made = taught(f"student.name={student}")
    for size in (None, 64):
        words = load_words(str(made.folder), text_weights=str(made.file), input_size=size, device="cpu", batch_size=3)
        embedded = words.embed(photos)
        single = torch.cat([words.embed(path) for path in list_images(photos)])
        torch.testing.assert_close(embedded, single, atol=1e-5, rtol=0)
        first = words.classify(photos, CLASSES)[0]
        assert sum(share for _, share in first) == pytest.approx(1, abs=1e-5)
        expected = (embedded @ words.tower.embed(["red"])[0]).topk(2)
        found = words.find(photos, "red", top=2)
        assert [hit.image for hit in found] == [list_images(photos)[n] for n in expected.indices]
        assert [hit.cosine for hit in found] == pytest.approx(expected.values.tolist(), abs=1e-5)
        query = list_images(photos)[4]
        best, *_ = words.similar(photos, query, top=100)
        assert (best.image, best.cosine) == (query, pytest.approx(1, abs=1e-5))


def test_a_search_passes_over_what_is_broken_also_beside_arrays(taught, photos, tmp_path):
    import numpy as np

    made = taught()
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    words = regla.load_words(made.folder, text_weights=str(made.file), device="cpu")
    words.predictor.unreadable = {}
    array = np.full((40, 40, 3), 200, np.uint8)
    found = words.similar([tmp_path / "broken.jpg", photos, array], array, top=1)
    assert found[0].image is array
    assert len(words.find([tmp_path / "broken.jpg", array], "grey")) == 1


def test_predict_writes_classes_and_searches_and_passes_over_what_is_broken(taught, photos, tmp_path, capsys):
    made = taught()
    broken = photos / "class0/broken.jpg"
    broken.write_bytes(b"no image")
    common = [str(made.folder), str(photos), "--to", str(tmp_path / "words.json")]
    text = ["--text-weights", str(made.file)]

    def run(*flags):
        with pytest.raises(SystemExit) as ended:
            predict.main([*common, *flags])
        assert ended.value.code == 1  # one image is unreadable
        figures = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (figures["images"], figures["unreadable"]) == (7, [str(broken)])
        return json.loads((tmp_path / "words.json").read_text())

    rows = run("--classes", ", ".join(CLASSES), "--templates", "a photo of {}.", "--top", "2", *text)
    words = load_words(str(made.folder), text_weights=str(made.file), device="cpu")
    paths = [path for path in list_images(photos) if path != broken]
    expected = words.classify(paths, CLASSES, ["a photo of {}."], top=2)
    assert [row["path"] for row in rows] == [str(path) for path in paths]
    assert [[best["class"] for best in row["top"]] for row in rows] == [[name for name, _ in row] for row in expected]
    assert len(run("--find", "the sea", *text)) == 7
    assert run("--like", str(paths[2]), "--top", "1")[0]["path"] == str(paths[2])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--classes", "a cat"], "classes: 1 of at least 2"),
        (["--classes", "a, b", "--find", "c"], "--classes and --find: give one of them"),
        (["--templates", "openai"], "--templates: needs --classes"),
        (["--top", "3"], "--top: needs --classes"),
        (["--classes", "a, b", "--task", "classify"], "--task=classify: cannot be asked for with --classes"),
        (["--classes", "a, b", "--to", "words.parquet"], "the name must end in .json"),
        (
            ["--classes", "a, b"],
            "text_weights must be given: the image tower of clip/tiny-clip had its weights from: file",
        ),
        (["--classes", "a, b", "--teacher", "colours4"], "teacher colours4: is not a CLIP teacher"),
        (
            ["--classes", "a, b", "--teacher", "sam"],
            "teacher sam: .* keeps no head of it; it keeps those of clip/tiny-clip",
        ),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_line(flags, message, taught, photos, capsys):
    made = taught()
    with pytest.raises(SystemExit) as ended:
        predict.main([str(made.folder), str(photos), *flags])
    assert ended.value.code == 2
    assert __import__("re").search(message, capsys.readouterr().err)


def test_a_student_without_the_head_is_refused_with_the_remedy(taught, tmp_path):
    made = taught()
    remedy = r"distil it with a CLIP \(clip/ViT-B-16@openai\) teacher and student.keep_heads=true"
    loaded = load_student("timm/test_resnet", weights="random")
    with pytest.raises(UserError, match=f"not a distilled student.*{remedy}"):
        find_summaries(loaded)
    save_encoder(loaded.encoder, loaded.name, {}, 32, tmp_path / "bare")
    with pytest.raises(UserError, match=f"bare keeps no heads of its teachers: {remedy}"):
        load_words(str(tmp_path / "bare"))
    heads = json.loads((made.folder / "heads.json").read_text())
    heads["teachers"][0]["spec"]["name"] = "timm/vit_base_patch16_clip_224"  # tokens before the projection
    (made.folder / "heads.json").write_text(json.dumps(heads))
    with pytest.raises(UserError, match=f"keeps no head of CLIP.*, only of clip/tiny-clip, colours4: {remedy}"):
        load_words(str(made.folder))


def test_another_file_for_the_text_tower_is_told(taught, tmp_path, caplog):
    made = taught()
    torch.save(tiny_clip.build(seed=1).state_dict(), tmp_path / "other.pt")
    load_words(str(made.folder), text_weights=str(made.file)).embed_classes(CLASSES)
    assert "are both of one model?" not in caplog.text
    load_words(str(made.folder), text_weights=str(tmp_path / "other.pt")).embed_classes(CLASSES)
    assert "other.pt is not the file that the image tower of clip/tiny-clip was read from" in caplog.text
