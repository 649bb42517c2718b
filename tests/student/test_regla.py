"""The network: size table, shapes, options, training behaviour."""

import hashlib
import itertools
import math

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.student.layers import Residual
from pipeline.student.regla import SIZES

# regla_m was changed for latency, see docs/results.md.
TRAIN = {"regla_t": 2966520, "regla_s": 6495480, "regla_m": 8916344, "regla_l": 14745728, "regla_xl": 24931336}
DEPLOY = {"regla_t": 2949640, "regla_s": 6469256, "regla_m": 8886856, "regla_l": 14699160, "regla_xl": 24864360}
GMACS = {
    "regla_t": (0.438, 2.289),
    "regla_s": (0.812, 4.243),
    "regla_m": (0.928, 4.848),
    "regla_l": (2.064, 10.783),
    "regla_xl": (3.695, 19.304),
}


def width(residual: Residual) -> int:
    return next(m for m in residual.modules() if isinstance(m, nn.Conv2d)).in_channels


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def macs(model: nn.Module, size: int) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("name", SIZES)
def test_size_table(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert parameters(model) == TRAIN[name]
    model.eval().fuse()
    assert parameters(model) == DEPLOY[name] == deploy_formula(**SIZES[name])
    for size, expected in zip((224, 512), GMACS[name], strict=True):
        assert macs(model, size) / 1e9 == pytest.approx(expected, rel=5e-3)


KEYS = {
    "regla_t": "bc5e160012cb2920",
    "regla_s": "b50a73fbb118129d",
    "regla_m": "bd805260b08fc0b1",
    "regla_l": "c1a2270edae436ac",
    "regla_xl": "d2d5e57f891c0692",
}


@pytest.mark.parametrize("name", SIZES)
def test_the_state_dict_has_the_keys_and_shapes_of_earlier_checkpoints(name):
    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
    listed = "\n".join(f"{key} {tuple(value.shape)}" for key, value in state.items())
    assert hashlib.sha256(listed.encode()).hexdigest()[:16] == KEYS[name]


def test_cost_is_linear_in_pixels():
    with torch.device("meta"):
        model = timm.create_model("regla_m").eval().fuse()
    per_pixel = [macs(model, size) / size**2 for size in (224, 256, 1024)]
    assert max(per_pixel) < 1.01 * min(per_pixel)


def deploy_formula(dims, depths, heads, ffn_ratio=(3, 3, 3, 3), drop_path=0.0) -> int:
    """Parameters of the fused model counted by formula."""
    first = dims[0]
    stem = 27 * first // 2 + first // 2 + 9 * first // 2 * first + first
    down = sum(9 * a * b + b for a, b in itertools.pairwise(dims))
    elrf = sum(n * (4 * r * c**2 + (38 + 2 * r) * c) for c, n, r in zip(dims[:2], depths, ffn_ratio, strict=False))
    rgma = sum(
        n * ((4 + 2 * r) * c**2 + (25 + r) * c) for c, n, r in zip(dims[2:], depths[2:], ffn_ratio[2:], strict=True)
    )
    return stem + down + elrf + rgma + 1000 * dims[3] + 1000


@pytest.mark.parametrize("height_width", [(224, 224), (512, 512), (333, 500)])
def test_pyramid_shapes_of_a_shipped_size(height_width):
    with torch.device("meta"):
        model = timm.create_model("regla_m", num_classes=0).eval()
        maps = model.forward_intermediates(torch.empty(2, 3, *height_width), intermediates_only=True)
    assert [tuple(m.shape) for m in maps] == [
        (2, info["num_chs"], *(math.ceil(side / info["reduction"]) for side in height_width))
        for info in model.feature_info
    ]
    assert [info["reduction"] for info in model.feature_info] == [4, 8, 16, 32]


@pytest.mark.parametrize("height_width", [(1, 1), (1, 70), (33, 2), (31, 65), (333, 500), (512, 512)])
def test_any_size_runs(tiny, height_width):
    model = tiny().eval()
    with torch.no_grad():
        last, maps = model.forward_intermediates(torch.randn(1, 3, *height_width))
        assert torch.equal(model.forward_features(torch.zeros(1, 3, *height_width)).isfinite(), last.isfinite())
    sides = [tuple(math.ceil(side / stride) for side in height_width) for stride in (4, 8, 16, 32)]
    assert [tuple(m.shape[2:]) for m in maps] == sides
    assert all(torch.isfinite(m).all() for m in maps)


def test_regla_t_runs_at_224():
    model = timm.create_model("regla_t").eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 224, 224)).shape == (1, 1000)


def test_images_of_a_batch_do_not_mix(tiny, live):
    model, x = live(tiny()), torch.randn(3, 3, 64, 48)
    with torch.no_grad():
        together, apart = model(x), torch.cat([model(image[None]) for image in x])
    assert torch.allclose(together, apart, atol=1e-5)


def test_channels_last_gives_the_same_output_and_keeps_the_layout(tiny, live):
    model, x = live(tiny()), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model.forward_features(x)
        model = model.to(memory_format=torch.channels_last)
        out = model.forward_features(x.contiguous(memory_format=torch.channels_last))
    assert torch.allclose(out, expected, atol=1e-4)
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layer_scale": 0.5, "drop_path": 0.1, "distill_head": True},
        {"elrf_mode": "mid", "stem": "fused_ib"},
        {"elrf_mode": "pre", "reparam": False},
    ],
)
def test_every_parameter_gets_a_finite_gradient(tiny, live, options):
    model = live(tiny(**options)).train()
    model(torch.randn(4, 3, 64, 64)).square().sum().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert missing == []
    # Gradients of zero would mean a branch that reaches nothing.
    assert [name for name, p in model.named_parameters() if not p.grad.any()] == []


def test_autocast_training_is_finite_and_learns(tiny):
    model = tiny().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    x, y = torch.randn(8, 3, 64, 64), torch.arange(8)
    losses = []
    for _ in range(8):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x).float(), y)
        optimizer.zero_grad()
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-2), (torch.bfloat16, 5e-2)])
def test_pure_half_precision_is_close_to_float32(tiny, live, dtype, tolerance):
    model, x = live(tiny()), torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        expected = model(x)
        out = model.to(dtype)(x.to(dtype))
    assert (out.float() - expected).abs().max() <= tolerance * expected.abs().max()


def test_gradient_checkpointing_changes_nothing(tiny):
    x = torch.randn(4, 3, 64, 64)
    model = tiny(drop_path=0.3).train()
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(1)
        out = model(x)
        out.square().sum().backward()
        results.append((out.detach(), [p.grad.clone() for p in model.parameters()]))
    (plain, plain_grads), (recomputed, recomputed_grads) = results
    assert torch.equal(plain, recomputed)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain_grads, recomputed_grads, strict=True))


def test_gradient_checkpointing_recomputes_each_block(tiny):
    model = tiny().train()
    model.set_grad_checkpointing()
    calls = []
    model.stages[2].blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert len(calls) == 2


def test_drop_path_is_active_in_training_only(tiny, live):
    model, x = live(tiny(drop_path=0.9)), torch.randn(2, 3, 64, 64)
    model.train()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_drop_path_rises_linearly_over_the_blocks(tiny):
    model = tiny(drop_path=0.4)
    rates = [(block.ffn2 if i < 2 else block.ffn).drop_path for i, s in enumerate(model.stages) for block in s.blocks]
    assert [getattr(rate, "drop_prob", 0.0) for rate in rates] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_initialisation(tiny):
    model = tiny(dims=(32, 32, 48, 64), layer_scale=1e-6)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert module.weight.abs().max() <= 2
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.25)
        if isinstance(module, nn.Linear):
            assert not module.bias.any()
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert not module.bias.any()
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 3, 64, 64)).abs().max() < 1


@pytest.mark.parametrize("training", [True, False])
def test_blocks_can_start_as_the_identity(tiny, training):
    branches = [m for m in tiny(branch_scale=0.0).train(training).modules() if isinstance(m, Residual)]
    assert len(branches) == 2 * 2 + 3 * 2
    for residual in branches:
        x = torch.randn(2, width(residual), 8, 8)
        assert torch.equal(residual(x), x)


@pytest.mark.parametrize(
    "options",
    [
        {"dims": (16, 16, 16, 32)},
        {"depths": (2, 1, 1, 2)},
        {"heads": 1},
        {"heads": (3, 8)},
        {"ffn_ratio": (2, 4, 1.5, 2)},
        {"qk_dim": (4, 16)},
        {"elrf_mode": "mid"},
        {"elrf_mode": "pre"},
        {"elrf_kernels": (7, 7)},
        {"reparam": False},
        {"cpe_kernel": 5},
        {"cpe_kernel": 0},
        {"local_kernel": 0},
        {"local_kernel": 5},
        {"gate_act": "silu"},
        {"gate_act": "hardsigmoid"},
        {"gate_act": "none"},
        {"act": "gelu"},
        {"stem": "fused_ib"},
        {"drop_path": 0.2},
        {"drop_rate": 0.2},
        {"layer_scale": 1e-6},
        {"num_classes": 3},
        {"in_chans": 5},
        {"distill_head": True},
    ],
    ids=str,
)
def test_option_changes_the_model(tiny, options):
    model = tiny(**options)
    assert repr(model) != repr(tiny()) or parameters(model) != parameters(tiny())
    out = model(torch.randn(2, options.get("in_chans", 3), 32, 32))
    assert out.shape == (2, options.get("num_classes", 10))


@pytest.mark.parametrize(
    ("field", "value", "hint"),
    [
        ("dims", (8, 16, 24), "four"),
        ("dims", (7, 16, 24, 32), "even"),
        ("depths", (1, 1, 0, 1), "four integers >= 1"),
        ("heads", (5, 4), "24 and 32"),
        ("heads", (2, 4, 4), "one or two"),
        ("ffn_ratio", (3, 3, 3), "four"),
        ("ffn_ratio", (3, 3, 3, 0), "hidden"),
        ("qk_dim", 0, "one or two integers >= 1"),
        ("elrf_mode", "post", "'in', 'mid', 'pre'"),
        ("elrf_kernels", (3, 4), "odd"),
        ("cpe_kernel", 2, "0 or odd"),
        ("local_kernel", 7, "0, 3, 5"),
        ("gate_act", "relu", "'sigmoid', 'silu', 'hardsigmoid', 'none'"),
        ("act", "relu", "'hardswish', 'gelu'"),
        ("stem", "patch", "'conv', 'fused_ib'"),
        ("drop_path", 1.0, "[0, 1)"),
        ("drop_rate", -0.1, "[0, 1)"),
        ("branch_scale", -1.0, "a number >= 0"),
        ("layer_scale", 0.0, "None"),
        ("num_classes", -1, ">= 0"),
        ("in_chans", 0, ">= 1"),
        ("global_pool", "max", "'avg', ''"),
        ("global_pool", "", "num_classes=0"),
    ],
)
def test_invalid_option_names_the_field_and_what_is_valid(tiny, field, value, hint):
    with pytest.raises(ValueError, match=field) as error:
        tiny(**{field: value})
    assert hint in str(error.value)
