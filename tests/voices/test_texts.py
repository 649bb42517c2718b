import open_clip
import pytest
import torch

from pipeline.errors import UserError
from pipeline.voices.texts import embed_classes, make_templates, read_classes
from teachers.clip_text import load_text_tower
from tests.teachers import tiny_clip


def test_classes_are_separated_by_commas_or_lines_and_imagenet_has_its_own(tmp_path):
    assert read_classes("a cat,  a dog,") == ("a cat", "a dog")
    (tmp_path / "names.txt").write_text("maillot, tank suit\n\ntabby\n")
    assert read_classes(str(tmp_path / "names.txt")) == ("maillot, tank suit", "tabby")
    assert len(read_classes("imagenet")) == 1000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a cat", 'classes: 1 of at least 2: separate them with commas ("a cat, a dog")'),
        ("a cat, a dog, a cat", "classes: a cat occurs twice"),
        ("nowhere/names.txt", "nowhere/names.txt cannot be read"),
    ],
)
def test_classes_that_cannot_be_used_are_named(text, message):
    with pytest.raises(UserError) as refused:
        read_classes(text)
    assert message in str(refused.value)


def test_templates_are_open_clips_or_own():
    assert len(make_templates(["openai"])) == 80
    assert make_templates(["simple"])[0]("cat") == "itap of a cat."
    assert [template("{cat}") for template in make_templates(["a sketch of {}", "{}"])] == [
        "a sketch of {cat}",
        "{cat}",
    ]
    for bad in ("a photo", "{} and {}"):
        with pytest.raises(UserError, match="is neither openai nor simple"):
            make_templates([bad])


def test_classes_are_embedded_as_open_clip_builds_its_classifier(tmp_path):
    model = tiny_clip.build()
    torch.save(model.state_dict(), tmp_path / "both.pt")
    tower = load_text_tower(f"clip/{tiny_clip.PLAIN}", str(tmp_path / "both.pt"))
    classes = ["tench", "great white shark", "tabby"]
    tokenizer = open_clip.get_tokenizer(tiny_clip.PLAIN)
    expected = open_clip.build_zero_shot_classifier(model, tokenizer, classes, open_clip.OPENAI_IMAGENET_TEMPLATES)
    torch.testing.assert_close(embed_classes(tower, classes, make_templates(["openai"])), expected.T, atol=1e-5, rtol=0)
