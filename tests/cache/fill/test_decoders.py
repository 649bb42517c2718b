import pytest

from jobs import _plan
from pipeline.cache.fill import decoders
from pipeline.cache.fill.decoders import check_decoder
from pipeline.cache.fill.plan import plan_cache
from pipeline.errors import UserError
from pipeline.storage.store import Store


def test_the_reference_asks_nothing(monkeypatch):
    monkeypatch.setattr(decoders, "_on_every_node", None)
    check_decoder("cache.decoder", "cpu")


def test_a_session_without_a_gpu_is_refused(ray_session):
    with pytest.raises(
        UserError, match=r"^train\.decoder: nvjpeg decodes on a GPU, and there is none here: set it to cpu$"
    ):
        check_decoder("train.decoder", "nvjpeg")


def test_gpus_that_decode_differently_are_refused_and_equal_ones_are_not(monkeypatch):
    found = ["H200, torchvision 0.29.2"] * 3
    monkeypatch.setattr(decoders, "_on_every_node", lambda: found)
    check_decoder("cache.decoder", "nvjpeg")
    found[1] = "A100, torchvision 0.29.2"
    with pytest.raises(
        UserError, match=r"^cache\.decoder: .* have A100, .*; H200, .*: use nodes of one kind, or set it to cpu"
    ):
        check_decoder("cache.decoder", "nvjpeg")


def test_what_a_node_says_against_it_is_the_error(monkeypatch):
    def refuse():
        raise UserError("decodes no JPEG")

    monkeypatch.setattr(decoders, "check_nvjpeg", refuse)
    assert decoders._checked() == ("", "decodes no JPEG")
    monkeypatch.setattr(decoders, "check_nvjpeg", lambda: "H200")
    assert decoders._checked() == ("H200", "")


def test_every_phase_is_asked_before_the_first_is_computed_but_only_if_it_lacks_features(
    photo_config, tmp_path, filled, monkeypatch
):
    asked = []
    monkeypatch.setattr(_plan, "check_decoder", lambda field, decoder: asked.append((field, decoder)) or 1 / 0)
    config = photo_config("cache.decoder=nvjpeg")
    plan = plan_cache(config, Store.at(tmp_path / "cache"))
    with pytest.raises(ZeroDivisionError):
        _plan.fill(None, [(filled.config, filled.plan), (config, plan)])
    assert asked == [("cache.decoder", "nvjpeg")]
