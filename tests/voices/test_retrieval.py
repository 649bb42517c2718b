import json

import pytest
import torch
import torch.nn.functional as F

from pipeline.config.load import load_config
from pipeline.errors import UserError
from pipeline.voices.config import WordsJobConfig
from pipeline.voices.measured import compute_vectors, plan_words
from pipeline.voices.retrieval import match, read_captions, recalls, retrieval
from pipeline.voices.words import load_words
from tests.fakes import without_ray


def write_captions(file, names, each=2):
    """COCO's layout, with captions that differ."""
    images = [{"id": 10 * n, "file_name": name} for n, name in enumerate(names)]
    annotations = [
        {"id": n * each + k, "image_id": 10 * n, "caption": f"picture {n} told in way {k} "}
        for n in range(len(names))
        for k in range(each)
    ]
    file.write_text(json.dumps({"images": images, "annotations": annotations}))


def test_recall_is_that_of_a_loop_over_all_queries():
    generator = torch.Generator().manual_seed(0)
    images, texts = (F.normalize(torch.randn(n, 6, generator=generator), dim=1) for n in (15, 40))
    image = torch.cat([torch.arange(15), torch.randint(0, 15, (25,), generator=generator)])
    found = recalls(images, texts, image)
    for rank in (1, 5, 10):
        hits = [image[n] in (texts[n] @ images.T).topk(rank).indices for n in range(40)]
        assert found[f"text_to_image_r{rank}"] == pytest.approx(100 * sum(hits) / 40)
        hits = [n in image[(images[n] @ texts.T).topk(rank).indices] for n in range(15)]
        assert found[f"image_to_text_r{rank}"] == pytest.approx(100 * sum(hits) / 15)
    assert recalls(torch.eye(3), torch.eye(3), torch.arange(3))["image_to_text_r1"] == 100
    assert recalls(torch.ones(2, 1), torch.ones(2, 1), torch.arange(2))["image_to_text_r1"] == 0  # all alike: no recall


def test_images_and_captions_of_coco_are_joined_by_file_name(taught, tmp_path, monkeypatch):
    made = taught()
    names = [path.name for path in sorted((tmp_path / "photos/val").rglob("*.jpg"))]
    write_captions(tmp_path / "captions.json", [*names[:20], "absent.jpg"])
    captions = read_captions(str(tmp_path / "captions.json"))
    assert captions[names[1]] == ["picture 1 told in way 0", "picture 1 told in way 1"]
    without_ray(monkeypatch)
    paths = [f"data.val={tmp_path}/photos/val", f"work={tmp_path}/work", f"evaluate.student={made.folder}"]
    config = load_config(WordsJobConfig, None, [*paths, f"words.text_weights={made.file}"])
    figures = retrieval(compute_vectors(plan_words(config), config), captions)
    assert (figures["images"], figures["captions"]) == (20, 40)
    words = load_words(str(made.folder), text_weights=str(made.file), device="cpu")
    chosen = [path for path in sorted((tmp_path / "photos/val").rglob("*.jpg")) if path.name in names[:20]]
    texts = words.tower.embed([text for path in chosen for text in captions[path.name]])
    expected = recalls(words.embed(chosen), texts, torch.arange(20).repeat_interleave(2))
    assert {name: figures[name] for name in expected} == pytest.approx(expected)
    assert 0 <= figures["teacher_text_to_image_r1"] <= figures["teacher_text_to_image_r10"] <= 100


def test_files_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"words\.captions must be given"):
        read_captions(None)
    (tmp_path / "odd.json").write_text('{"images": []}')
    with pytest.raises(UserError, match=r"odd.json is not in COCO's layout of captions .*annotations"):
        read_captions(str(tmp_path / "odd.json"))
    with pytest.raises(UserError, match=r"they name 1 images, such as a\.jpg, but none of data.val, such as b\.jpg"):
        match(["b.jpg"], {"a.jpg": ["one"]})
    with pytest.raises(UserError, match=r"two images are called a\.jpg"):
        match(["x/a.jpg", "y/a.jpg"], {"a.jpg": ["one"]})
