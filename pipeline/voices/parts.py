"""Parts without labels: k-means on the patches of all images together, by cosine."""

import torch
import torch.nn.functional as F
from torch import Tensor

STEPS, RESTARTS = 50, 4


def find_parts(maps: Tensor, count: int, seed: int = 0) -> Tensor:
    """The part of each patch of maps [N, h, w, D], 0 to `count` - 1: int64 [N, h, w], the largest part first.

    Lloyd's algorithm from starts by k-means++ (Arthur and Vassilvitskii 2007), on patches of length 1; the best of `RESTARTS`.
    Memory: 4 N h w (D + count) bytes.
    """
    tokens = F.normalize(maps.flatten(0, 2), dim=1)
    generator = torch.Generator().manual_seed(seed)
    tries = [_lloyd(tokens, _starts(tokens, count, generator)) for _ in range(RESTARTS)]
    _, labels = min(tries, key=lambda result: result[0])
    sizes = torch.bincount(labels, minlength=count)
    rank = torch.empty_like(sizes)
    rank[sizes.argsort(descending=True, stable=True)] = torch.arange(count)
    return rank[labels].view(maps.shape[:3])


def _starts(tokens: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` of the tokens, each drawn with a chance that grows with its squared distance from those before."""
    chosen = [tokens[int(torch.randint(len(tokens), (1,), generator=generator))]]
    distance = torch.full((len(tokens),), torch.inf)
    for _ in range(count - 1):
        distance = torch.minimum(distance, (tokens - chosen[-1]).square().sum(dim=1))
        weights = distance if distance.any() else torch.ones_like(distance)
        chosen.append(tokens[_draw(weights, generator)])
    return torch.stack(chosen)


def _draw(weights: Tensor, generator: torch.Generator) -> int:
    """An index with a chance in proportion to its weight; `torch.multinomial` takes at most 2^24 weights."""
    sums = weights.double().cumsum(0)
    at = torch.rand(1, generator=generator, dtype=torch.float64) * sums[-1]
    return int(torch.searchsorted(sums, at, right=True).clamp_max(len(weights) - 1))


def _lloyd(tokens: Tensor, centres: Tensor) -> tuple[float, Tensor]:
    """Sum of squared distances to the nearest centres, and the number of each token's; an empty part keeps its centre."""
    labels = torch.full((len(tokens),), -1)
    for _ in range(STEPS):
        nearest = (tokens @ centres.T - centres.square().sum(dim=1) / 2).argmax(dim=1)
        if torch.equal(nearest, labels):
            break
        labels = nearest
        sums = torch.zeros_like(centres).index_add_(0, labels, tokens)
        sizes = torch.bincount(labels, minlength=len(centres))[:, None]
        centres = torch.where(sizes > 0, sums / sizes.clamp_min(1), centres)
    return (tokens - centres[labels]).square().sum().item(), labels
