"""A card's stated rates, and those that it reaches on large matrix products and copies.

    python benchmarks/card.py --device cuda

Prints one line of JSON.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # a script imports from its own checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch


@dataclass(frozen=True)
class Card:
    """Rates as the vendor states them.

    Attributes:
        flops: dense operations per second by dtype, a multiply-accumulate counted as two; float32 and float64 without and
            with tensor cores, as torch uses them by default.
        bandwidth: bytes per second of the memory.
    """

    flops: dict[torch.dtype, float]
    bandwidth: float


_HOPPER = {torch.bfloat16: 989.5e12, torch.float16: 989.5e12, torch.float32: 67e12, torch.float64: 67e12}
CARDS = {"H200": Card(_HOPPER, 4.8e12), "H100": Card(_HOPPER, 3.35e12)}
"""SXM cards, from NVIDIA's data sheets "H200 Tensor Core GPU" and "H100 Tensor Core GPU": half of the rates with sparsity."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--side", type=int, default=8192, help="of the multiplied matrices")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    print(
        json.dumps(
            {
                "card": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
                "torch": torch.__version__,
                "bf16_tflops": round(matmul_rate(device, options.side) / 1e12, 3),
                "copy_tb_per_s": round(copy_rate(device, options.side) / 1e12, 3),
            }
        )
    )


def matmul_rate(device: torch.device, side: int = 8192) -> float:
    """Operations per second of a bfloat16 product of square matrices of random numbers."""
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / seconds_per_call(lambda: left @ right, device)


def copy_rate(device: torch.device, side: int = 8192) -> float:
    """Bytes per second, read and written, of a copy within the memory."""
    source = torch.zeros(16 * side * side, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds_per_call(lambda: target.copy_(source), device)


def seconds_per_call(call: Callable[[], object], device: torch.device, calls: int = 10) -> float:
    """Mean seconds of a call, after three that are not measured; calls follow each other without a synchronisation."""
    for _ in range(3):
        call()
    synchronise(device)
    started = time.perf_counter()
    for _ in range(calls):
        call()
    synchronise(device)
    return (time.perf_counter() - started) / calls


def synchronise(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
