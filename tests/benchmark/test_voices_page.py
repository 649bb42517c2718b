"""The page of photographs: every voice has its pictures, in order, from models that run here."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.scene_sam import DIM, SIDE, TinySam
from benchmarks.voices_page import BOX, HEIGHT, main, prompts_section, words_section
from pipeline.errors import UserError
from pipeline.sources.sample_scenes import SampleScenes
from pipeline.voices.prompts import Prompts

MAPS = "{model: timm/test_resnet, weights: random}"


@pytest.fixture
def folder(tmp_path):
    """Five scenes as files, one of them wide."""
    scenes = SampleScenes("val", 5, 48)
    for number in range(5):
        size = (96, 48) if number == 2 else (48, 48)
        Image.fromarray(scenes.scene(number).image).resize(size).save(tmp_path / f"scene{number}.png")
    return tmp_path


def test_a_page_shows_each_photograph_in_every_section(folder, tmp_path, capsys):
    page = tmp_path / "page.html"
    main([str(folder), "--maps", MAPS, "--size", "64", "--parts", "3", "--to", str(page)])
    assert "5 photographs" in capsys.readouterr().out
    html = page.read_text()
    titles = re.findall("<h2>(.*?)</h2>", html)
    kinds = [title.partition(":")[0] for title in titles]
    assert kinds == ["Photographs", "Principal components", "Parts", "Matches"]
    sections = html.split("<section")[2 - 1 :]
    for kind, section in zip(kinds, sections, strict=True):
        captions = re.findall("<figcaption>(.*?)<small>", section)
        pairs = ["1 scene0 and 2 scene1", "3 scene2 and 4 scene3"]
        assert captions == (pairs if kind == "Matches" else [f"{number + 1} scene{number}" for number in range(5)])
        assert section.count("data:image/jpeg;base64,") == len(captions)
    assert "<script" not in html


def test_named_files_keep_their_order(folder, tmp_path):
    names = [str(folder / f"scene{number}.png") for number in (3, 1)]
    main([*names, "--to", str(tmp_path / "page.html")])
    assert re.findall("<figcaption>(.*?)<small>", (tmp_path / "page.html").read_text()) == ["1 scene3", "2 scene1"]


def test_an_unknown_field_of_a_model_is_named(folder, tmp_path):
    with pytest.raises(UserError, match=r"--maps: .* not \['weight'\]"):
        main([str(folder), "--maps", "{model: timm/test_resnet, weight: random}", "--to", str(tmp_path / "page.html")])


def test_masks_of_a_box_and_a_point_and_the_likeliest_words():
    photos = {"1 a": Image.fromarray(np.full((60, 120, 3), 200, np.uint8))}
    torch.manual_seed(0)
    embedding = torch.randn(1, DIM, 4, 4)
    prompts = Prompts(lambda pixels: embedding, TinySam().masks, "a", SIDE, torch.device("cpu"))
    given = []

    class Spied:
        def embed(self, photo):
            image = prompts.embed(photo)
            return type(
                "Image",
                (),
                {
                    "boxes": lambda _, boxes: given.append(boxes) or image.boxes(boxes),
                    "points": lambda _, points: given.append(points) or image.points(points),
                },
            )()

    found = prompts_section(Spied(), photos)
    assert given == [[[BOX[0] * 120, BOX[1] * 60, BOX[2] * 120, BOX[3] * 60]], [(60, 30)]]
    assert [picture.caption.partition(":")[0] for picture in found.pictures] == ["box", "point"]
    assert {(picture.width, picture.height) for picture in found.pictures} == {(4 * HEIGHT, 2 * HEIGHT)}

    class Told:
        def classify(self, images, classes, templates, top):
            assert (len(images), classes, templates, top) == (1, ["ring", "star"], ["a {}"], 2)
            return [[("star", 0.75), ("ring", 0.25)]]

    (picture,) = words_section(Told(), photos, ["ring", "star"], "a {}").pictures
    assert (picture.caption, picture.detail) == ("star 75%, ring 25%", "1 a")
