"""The timm side: registry, features, classifier, checkpoints, parameter groups."""

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import param_groups_weight_decay
from torch import nn

import pipeline.student.regla  # noqa: F401  registers the models
from pipeline.student.regla import SIZES


def test_sizes_are_registered_with_a_pretrained_cfg():
    assert sorted(timm.list_models("regla*")) == sorted(SIZES)
    for name in SIZES:
        assert timm.get_pretrained_cfg(name).architecture == name
        assert timm.get_pretrained_cfg(name).input_size == (3, 224, 224)
    with torch.device("meta"):
        model = timm.create_model("regla_t")
    assert model.default_cfg == model.pretrained_cfg
    assert isinstance(model.get_submodule(model.pretrained_cfg["first_conv"]), nn.Conv2d)
    assert isinstance(model.get_submodule(model.pretrained_cfg["classifier"][0]), nn.Linear)


def test_classifier_names_cover_the_distillation_head(tiny):
    names = timm.get_pretrained_cfg("regla_m").classifier
    linears = [name for name, m in tiny(distill_head=True).named_modules() if isinstance(m, nn.Linear)]
    assert list(names) == linears


def test_pretrained_weights_do_not_exist_yet():
    with pytest.raises(RuntimeError, match="pretrained"):
        timm.create_model("regla_t", pretrained=True)


@pytest.mark.parametrize("feature_cls", ["list", "getter", "hook"])
def test_features_only(feature_cls):
    net = timm.create_model("regla_t", features_only=True, out_indices=(2, 3), feature_cls=feature_cls).eval()
    assert net.feature_info.channels() == [128, 256]
    assert net.feature_info.reduction() == [16, 32]
    with torch.no_grad():
        maps = net(torch.randn(1, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [(1, 128, 4, 6), (1, 256, 2, 3)]


def test_features_only_returns_all_four_stages_by_default():
    with torch.device("meta"):
        net = timm.create_model("regla_m", features_only=True)
        maps = net(torch.empty(2, 3, 64, 64))
    assert net.feature_info.channels() == [m.shape[1] for m in maps] == [32, 64, 192, 384]


def test_features_equal_forward_intermediates():
    torch.manual_seed(0)
    net = timm.create_model("regla_t", features_only=True).eval()
    torch.manual_seed(0)
    model = timm.create_model("regla_t").eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for a, b in zip(net(x), model.forward_intermediates(x, intermediates_only=True), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(("num_classes", "shape"), [(10, (2, 10)), (0, (2, 256))])
def test_num_classes(num_classes, shape):
    model = timm.create_model("regla_t", num_classes=num_classes).eval()
    assert model.num_classes == num_classes
    with torch.no_grad():
        assert model(torch.randn(2, 3, 32, 32)).shape == shape


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_checkpoint_path(tmp_path, suffix):
    from safetensors.torch import save_file

    model = timm.create_model("regla_t", num_classes=3).eval()
    path = tmp_path / f"regla.{suffix}"
    save_file(model.state_dict(), path) if suffix == "safetensors" else torch.save(model.state_dict(), path)
    loaded = timm.create_model("regla_t", num_classes=3, checkpoint_path=path).eval()
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("distill_head", [False, True])
def test_pretrained_file_adapts_to_other_classes_and_channels(tmp_path, distill_head):
    model = timm.create_model("regla_t", distill_head=distill_head)
    path = tmp_path / "regla.pth"
    torch.save(model.state_dict(), path)
    adapted = timm.create_model(
        "regla_t",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(path)},
        num_classes=5,
        in_chans=1,
        distill_head=distill_head,
    )
    weight = model.stem.conv1.conv.weight
    assert torch.allclose(adapted.stem.conv1.conv.weight, weight.sum(1, keepdim=True))
    assert torch.equal(adapted.stages[3].downsample.conv.weight, model.stages[3].downsample.conv.weight)
    assert adapted(torch.randn(2, 1, 64, 64)).shape == (2, 5)


def test_unknown_argument_raises():
    with pytest.raises(TypeError, match="elrf_moed"):
        timm.create_model("regla_t", elrf_moed="mid")


def test_timm_training_arguments():
    model = timm.create_model("regla_l", drop_rate=0.1, drop_path_rate=0.3, depths=(1, 1, 1, 1))
    assert model.head_drop.p == 0.1
    assert model.stages[3].blocks[0].ffn.drop_path.drop_prob == pytest.approx(0.3)
    default = timm.create_model("regla_l", depths=(1, 1, 1, 1))
    assert default.stages[3].blocks[0].ffn.drop_path.drop_prob == pytest.approx(0.1)


def test_forward_intermediates(tiny, live):
    model, x = live(tiny()), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        last, maps = model.forward_intermediates(x)
        assert torch.equal(last, maps[3])
        assert torch.equal(last, model.forward_features(x))
        assert torch.equal(model.forward_head(last), model(x))
        assert [m.shape[1] for m in model.forward_intermediates(x, indices=2, intermediates_only=True)] == [24, 32]
        (third,) = model.forward_intermediates(x, indices=[-2], intermediates_only=True)
        assert torch.equal(third, maps[2])
        stopped, (first,) = model.forward_intermediates(x, indices=[0], stop_early=True)
        assert torch.equal(stopped, first)
    with pytest.raises(ValueError, match="NCHW"):
        model.forward_intermediates(x, output_fmt="NLC")
    with pytest.raises(AssertionError, match="range"):
        model.forward_intermediates(x, indices=[4])


def test_prune_intermediate_layers(tiny, live):
    model, x = live(tiny()), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model.forward_intermediates(x, intermediates_only=True)
        assert model.prune_intermediate_layers([0, -2]) == [0, 2]
        assert len(model.stages) == 3
        assert model.num_features == 24
        assert isinstance(model.get_classifier(), nn.Identity)
        assert torch.equal(model(x), expected[2])
    kept = tiny()
    kept.prune_intermediate_layers(1, prune_head=False)
    assert kept.num_classes == 10


def test_reset_classifier(tiny, live):
    model, x = live(tiny()), torch.randn(2, 3, 64, 64)
    model.reset_classifier(3)
    assert model.num_classes == 3
    assert not model.get_classifier().training
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    assert model(x).shape == (2, 32)
    assert torch.equal(model(x), model.forward_head(model.forward_features(x), pre_logits=True))
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 32, 2, 2)
    model.reset_classifier(4, "avg")
    assert model(x).shape == (2, 4)
    model.double().reset_classifier(4)
    assert model(x.double()).dtype == torch.float64


def test_distilled_training(tiny):
    model, x = tiny(distill_head=True), torch.randn(2, 3, 64, 64)
    assert model(x).shape == (2, 10)
    model.set_distilled_training()
    model.reset_classifier(4)
    main, distill = model(x)
    assert main.shape == distill.shape == (2, 4)
    assert model.eval()(x).shape == (2, 4)


def test_weight_decay_skips_norms_biases_and_layer_scale(tiny):
    model = tiny(layer_scale=1e-6)
    exempt, decayed = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    weights = {id(m.weight) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert exempt["weight_decay"] == 0
    assert {id(p) for p in decayed["params"]} == weights
    assert len(model.no_weight_decay()) == 10


@pytest.mark.parametrize("coarse", [False, True])
def test_layer_groups_follow_the_depth(tiny, coarse):
    model = tiny()
    group = group_parameters(model, model.group_matcher(coarse), reverse=True)
    assert group.keys() == {name for name, _ in model.named_parameters()}
    groups = [group[name] for name, _ in model.named_parameters()]
    assert groups[0] == 0
    assert groups == sorted(groups)
    assert group["head.main.linear.weight"] == max(groups)
