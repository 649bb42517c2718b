"""The text towers of CLIP teachers against open_clip's own models, from files of every layout."""

import logging

import pytest
import safetensors.torch
import torch

from teachers.base import TeacherError
from teachers.clip_text import load_text_tower
from tests.teachers import tiny_clip

TEXTS = ["a cat", "a photo of a red dog above a blue square."]


def embedded(model, name):
    import open_clip

    with torch.no_grad():
        return model.encode_text(open_clip.get_tokenizer(name)(TEXTS), normalize=True)


@pytest.mark.parametrize("name", tiny_clip.NAMES)
def test_it_embeds_as_open_clip_does(name, tmp_path):
    model = tiny_clip.build(name)
    with torch.no_grad():
        model.logit_scale.fill_(3.0)
    torch.save(model.state_dict(), tmp_path / "both.pt")
    tower = load_text_tower(f"clip/{name}", str(tmp_path / "both.pt"))
    torch.testing.assert_close(tower.embed(TEXTS), embedded(model, name), atol=1e-5, rtol=0)
    assert tower.logit_scale == pytest.approx(torch.tensor(3.0).exp().item())
    assert (tower.sigmoid, tower.logit_bias) == ((True, -10) if name == tiny_clip.SIGMOID else (False, 0))
    assert tower.embed([]).shape == (0, tower.dim)


def test_authors_files_in_half_precision_and_other_keys_are_the_same_tower(tmp_path):
    model = tiny_clip.build()
    state = {key: value.half().contiguous() for key, value in model.state_dict().items()}
    model.load_state_dict({key: value.float() for key, value in state.items()})
    sizes = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(77)}  # OpenAI's archives have them
    safetensors.torch.save_file({**state, **sizes}, tmp_path / "openai.safetensors")
    kept = ("visual.", "logit_scale")
    custom = {key if key.startswith(kept) else f"text.{key}": value for key, value in state.items()}
    torch.save({"state_dict": custom}, tmp_path / "custom.pt")
    for file in ("openai.safetensors", "custom.pt"):
        tower = load_text_tower(f"clip/{tiny_clip.PLAIN}", str(tmp_path / file))
        torch.testing.assert_close(tower.embed(TEXTS), embedded(model, tiny_clip.PLAIN), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (lambda key: key.startswith("visual."), "lacks a text tower: name a file of the whole CLIP model"),
        (lambda key: key != "logit_scale", "lacks logit_scale"),
        (lambda key: not key.startswith("ln_final"), "the file lacks ln_final.bias"),
    ],
)
def test_a_file_without_a_part_is_refused(keep, message, tmp_path):
    state = tiny_clip.build().state_dict()
    torch.save({key: value for key, value in state.items() if keep(key)}, tmp_path / "part.pt")
    with pytest.raises(TeacherError, match=message):
        load_text_tower(f"clip/{tiny_clip.PLAIN}", str(tmp_path / "part.pt"))


def test_random_weights_are_those_of_their_seed_and_other_teachers_have_no_text_tower():
    tiny_clip.register()
    one, again, other = (
        load_text_tower(f"clip/{tiny_clip.PLAIN}", f"random:{seed}").embed(TEXTS) for seed in (1, 1, 2)
    )
    assert torch.equal(one, again)
    assert not torch.allclose(one, other)
    with pytest.raises(TeacherError, match="hog: has no text tower: it is not a CLIP teacher"):
        load_text_tower("hog")


def test_a_text_that_is_cut_is_told(caplog):
    tiny_clip.register()
    tower = load_text_tower(f"clip/{tiny_clip.PLAIN}", "random")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        tower.embed(["dog " * 75])
        assert not caplog.records
        tower.embed(["dog " * 76, "a dog"])
    assert "1 of 2 texts have more than the 75 tokens" in caplog.text
