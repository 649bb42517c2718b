"""RGMA's attention against a float64 quadratic reference, and in half precision."""

import pytest
import torch
from torch import Tensor

from pipeline.student.blocks import RGMA, attend


def qkv(tokens: int, *, batch: int = 2, heads: int = 2, d: int = 32, e: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Float64 q and k as after BatchNorm and ReLU, v signed."""
    q, k = torch.randn(2, batch, heads, d, tokens, dtype=torch.float64).relu()
    return q, k, torch.randn(batch, heads, e, tokens, dtype=torch.float64)


def quadratic(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the plain formula with the N x N matrix of weights; tokens whose weights are all zero get zero."""
    weights = torch.einsum("bhdn,bhdm->bhnm", q, k)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    return torch.einsum("bhnm,bhem->bhen", weights, v)


@pytest.mark.parametrize("tokens", [1, 7, 49, 1024])
def test_equals_the_quadratic_reference(tokens):
    q, k, v = qkv(tokens)
    q[..., 0] += 1  # with one token, no query may be zero by chance
    assert torch.allclose(attend(q, k, v, eps=0.0), quadratic(q, k, v), rtol=0, atol=1e-12)
    # The default eps is a pull towards zero of eps / sum(q), relative; sum(q) is about 13 here.
    assert (attend(q, k, v) - quadratic(q, k, v)).abs().max() < 1e-3 * v.abs().max()


def test_float32_is_exact_to_rounding():
    q, k, v = qkv(1024)
    assert (attend(q.float(), k.float(), v.float()) - quadratic(q, k, v)).abs().max() < 5e-5 * v.abs().max()


def test_weights_are_convex_up_to_eps():
    q, k, _ = qkv(64)
    ones = torch.ones(2, 2, 1, 64, dtype=torch.float64)
    mass = attend(q, k, ones)
    assert mass.max() < 1
    assert mass.min() > 0.99


HARD = {
    "plain": lambda q, k, v: (q, k, v),
    "q x100": lambda q, k, v: (q * 100, k, v),
    "k x100": lambda q, k, v: (q, k * 100, v),
    "v x100": lambda q, k, v: (q, k, v * 100),
    "all x100": lambda q, k, v: (q * 100, k * 100, v * 100),
    "k x0.01": lambda q, k, v: (q, k * 0.01, v),
    "half of the queries zero": lambda q, k, v: (q * (torch.arange(q.shape[-1]) % 2), k, v),
    "dead K": lambda q, k, v: (q, k * torch.tensor([0.0, 1.0]).view(2, 1, 1), v),
    "dead Q and K": lambda q, k, v: (q * 0, k * 0, v),
    "sparse K": lambda q, k, v: (q, k * (torch.rand_like(k) > 0.999), v),
}


@pytest.mark.parametrize("case", HARD)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1.5e-3), (torch.bfloat16, 1.2e-2)])
def test_half_precision_stays_finite_and_close_at_16384_tokens(case, dtype, tolerance):
    # Four times the tokens that stage 3 has at 1024 px.
    inputs = [x.to(dtype) for x in HARD[case](*qkv(16384, batch=1, d=16, e=16))]
    out = attend(*inputs)
    assert out.dtype == dtype
    assert torch.isfinite(out).all()
    # Against the same linear formula in float64: the reference of 16,384^2 weights is too large to build.
    q, k, v = (x.double() for x in inputs)
    assert (out.double() - attend(q, k, v)).abs().max() <= tolerance * v.abs().max()


def test_zero_query_and_dead_head_give_zero():
    q, k, v = qkv(16)
    q[:, 0, :, 3] = 0
    k[:, 1] = 0
    out = attend(q, k, v)
    assert (out[:, 0, :, 3] == 0).all()
    assert (out[:, 1] == 0).all()
    assert (out[:, 0, :, 4] != 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_accumulates_the_denominator_in_float32(dtype):
    # In bfloat16 a running sum of ones stops growing at 256; the mass of the weights shows whether it did.
    q, k, v = torch.ones(1, 1, 4, 16384), torch.ones(1, 1, 4, 16384), torch.ones(1, 1, 2, 16384)
    with torch.autocast("cpu", dtype=dtype):
        out = attend(q.to(dtype), k.to(dtype), v.to(dtype))
    assert torch.allclose(out.float(), torch.ones(()), atol=1e-2)


def test_no_sum_over_tokens_is_kept_in_half_precision(monkeypatch):
    sums = []
    original = Tensor.sum
    monkeypatch.setattr(Tensor, "sum", lambda self, *a, **k: sums.append(original(self, *a, **k)) or sums[-1])
    attend(*(x.half() for x in qkv(64)))
    assert [s.dtype for s in sums] == [torch.float32]


def test_token_permutation_equivariance():
    q, k, v = qkv(50)
    order = torch.randperm(50)
    assert torch.allclose(attend(q[..., order], k[..., order], v[..., order]), attend(q, k, v)[..., order], atol=1e-12)
    # The sum over tokens does not care for their order.
    assert torch.allclose(attend(q, k[..., order], v[..., order]), attend(q, k, v), atol=1e-12)


@pytest.mark.parametrize("scale", [1e-1, 1e2, 1e4])
def test_scale_of_k_cancels(scale):
    q, k, v = qkv(4096)
    # What is left is K_FLOOR beside the mean of K's sums (about 25 here): eps * K_FLOOR / 2.5 at the smallest scale.
    assert (attend(q, k * scale, v) - attend(q, k, v)).abs().max() < 1e-6


def test_gradcheck():
    q, k, v = (x.requires_grad_() for x in (torch.rand(1, 2, 3, 5, dtype=torch.float64) + 0.1 for _ in range(3)))
    assert torch.autograd.gradcheck(attend, (q, k, v))


def test_gradients_are_finite_where_everything_is_zero():
    q, k, v = (torch.zeros(1, 1, 4, 9, requires_grad=True) for _ in range(3))
    attend(q, k, v).sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v))


def test_cost_is_linear_in_tokens():
    from torch.utils.flop_counter import FlopCounterMode

    def flops(tokens: int) -> int:
        with FlopCounterMode(display=False) as counter:
            attend(*(torch.empty(1, 2, c, tokens, device="meta") for c in (32, 32, 64)))
        return counter.get_total_flops()

    assert flops(4096) == 16 * flops(256)


def test_rgma_equals_its_equations():
    rgma = RGMA(dim=8, heads=2, qk_dim=3).double().eval()
    x = torch.randn(2, 8, 5, 4, dtype=torch.float64)
    qk = rgma.qk(x).reshape(2, 2, 6, 20)
    v = rgma.v(x)
    a = attend(qk[:, :, :3], qk[:, :, 3:], v.reshape(2, 2, 4, 20)).reshape(2, 8, 5, 4)
    expected = rgma.proj((a + rgma.local(v)) * torch.sigmoid(rgma.gate[0](x)))
    assert torch.allclose(rgma(x), expected, atol=1e-12)


def test_rgma_mixes_all_tokens():
    rgma = RGMA(dim=8, heads=2, qk_dim=4).eval()
    x = torch.randn(1, 8, 9, 9, requires_grad=True)
    rgma(x)[0, :, 0, 0].sum().backward()
    assert (x.grad[0, :, 8, 8] != 0).any()


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e2, 1e4, 6e4])
@pytest.mark.parametrize("of", ["q", "k", "both"])
def test_float16_is_close_at_every_magnitude_that_it_holds(size, of):
    """Sums over channels would leave float16's range at q near 1e4, and the division by infinity gave zeros."""
    q, k, v = qkv(256, d=32, e=16)
    q, k = (part / part.max() * (size if of in (name, "both") else 3) for name, part in (("q", q), ("k", k)))
    q, k, v = (part.half() for part in (q, k, v))
    out = attend(q, k, v)
    assert torch.isfinite(out).all()
    assert (out.double() - attend(q.double(), k.double(), v.double())).abs().max() <= 4e-3 * v.abs().max().double()


def test_float16_gives_zero_where_the_query_or_the_head_is_zero():
    q, k, v = (part.half() for part in qkv(16))
    q[:, 0, :, 3] = 0
    k[:, 1] = 0
    out = attend(q / q.max() * 6e4, k, v)
    assert (out[:, 0, :, 3] == 0).all()
    assert (out[:, 1] == 0).all()


def test_autocast_to_float16_is_close_for_large_queries():
    q, k, v = (part.float() for part in qkv(256))
    with torch.autocast("cpu", dtype=torch.float16):
        out = attend(q * 1e4, k, v)
    assert out.dtype == torch.float16
    assert (out.double() - attend(q.double() * 1e4, k.double(), v.double())).abs().max() <= 4e-3 * v.abs().max()
