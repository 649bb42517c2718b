"""A pretended GPU, as a plugin of pytest: `pytest -p tests.pretended_gpu tests/test_gpu.py` where there is none.

Tensors say that they are of `cuda`, compute on the CPU, and refuse the company of the CPU's own, as those of a GPU do. So
a tensor that was left behind is found, and with `torch.cuda.set_sync_debug_mode` what would wait for the device. There is
one stream, no time and no memory; a backward pass is beyond it, for which autograd asks CUDA's driver. It changes torch
for good, hence a process of its own.
"""

import threading
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
MEMORY = 1 << 33
COPIES = ("_to_copy", "copy_")
INDEXING = ("index", "index_put_", "_unsafe_index")
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2")
"""Operations whose result the CPU needs before it continues."""

forbidden = False
"""Whether waiting is."""


class OnGpu(Tensor):
    """A tensor of the pretended GPU; `inner` has its values."""

    is_cuda = True

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnGpu":
        tensor: OnGpu = Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=CUDA
        )
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})

    def __repr__(self) -> str:
        return f"OnGpu({self.inner})"


class PretendedGpu(TorchDispatchMode):
    """Puts there what is made there, or brought there."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = function.overloadpacket.__name__
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, OnGpu)]
    if there and name not in COPIES:
        for tensor in tensors[:1] if name in INDEXING else tensors:  # indices may be the CPU's, and so may numbers
            assert isinstance(tensor, OnGpu) or not tensor.dim(), f"{name}: {tuple(tensor.shape)} is left on the CPU"
    asked = kwargs.get("device")
    goes_there = bool(there) if asked is None else _is_there(asked)
    if name == "copy_":
        goes_there = isinstance(args[0], OnGpu)
    assert not (forbidden and _waits(name, args, kwargs)), f"{name} waits for the device"
    here = {
        key: torch.device("cpu") if key == "device" else value for key, value in kwargs.items() if key != "pin_memory"
    }
    found = function(*tree_map(_values, list(args)), **tree_map(_values, here))
    known = {id(tensor.inner): tensor for tensor in there}  # what an operation in place gives is what it was given

    def placed(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, OnGpu):
            return value
        return known[id(value)] if id(value) in known else OnGpu(value) if goes_there else value

    return tree_map(placed, found)


def _waits(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    if name in COPIES:
        target = args[0] if name == "copy_" else kwargs.get("device") or args[0]
        crosses = _is_there(target) != _is_there(args[1] if name == "copy_" else args[0])
        return crosses and not (kwargs.get("non_blocking") or args[2:3] == (True,))
    if name in INDEXING and _is_there(args[0]):
        indices = [index for index in tree_leaves(args[1]) if index is not None]
        return any(index.dtype == torch.bool or not _is_there(index) for index in indices)
    return name in WAITING and _is_there(args[0])


def _is_there(place: Any) -> bool:
    return isinstance(place, OnGpu) if isinstance(place, Tensor) else torch.device(place).type == "cuda"


def _values(value: Any) -> Any:
    return value.inner if isinstance(value, OnGpu) else value


class _Stream:
    def __init__(self, **_: Any) -> None: ...

    def wait_stream(self, _: Any) -> None: ...

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, _: Any) -> float:
        return 1.0


def _forbid(mode: str) -> None:
    global forbidden
    forbidden = mode == "error"


def _decode_there() -> None:
    """JPEGs are decoded by the CPU's decoder, and brought."""
    import torchvision.io

    decode = torchvision.io.decode_jpeg

    def decode_jpeg(encoded: Any, mode: Any, device: Any = "cpu") -> Any:
        return [planes.to(device) for planes in decode(encoded, mode)]

    torchvision.io.decode_jpeg = decode_jpeg


def _pretend() -> None:
    torch._C._ensureCUDADeviceGuardSet()  # as torch's own fake tensors do, where there is no driver
    answers: dict[str, Any] = {
        "_lazy_init": None,
        "is_available": True,
        "synchronize": None,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "get_device_name": "pretended GPU",
        "mem_get_info": (MEMORY, MEMORY),
        "max_memory_reserved": MEMORY // 8,
        "current_stream": _Stream(),
        "default_stream": _Stream(),
        "stream": nullcontext(),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    torch.cuda.set_sync_debug_mode = _forbid
    torch.cuda.Stream = torch.cuda.Event = _Stream  # type: ignore[assignment, misc]
    made = torch.tensor

    def tensor(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        """Made on the CPU and brought: the real one asks CUDA's driver."""
        return made(*args, **kwargs).to(device or "cpu")

    torch.tensor = tensor
    torch.inference_mode = lambda *_: torch.no_grad()  # type: ignore[assignment, misc]
    torch.backends.cudnn.enabled = False
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    run = threading.Thread.run

    def run_there(thread: threading.Thread) -> None:
        with PretendedGpu():
            run(thread)

    threading.Thread.run = run_there  # type: ignore[method-assign]
    _decode_there()
    PretendedGpu().__enter__()


_pretend()
