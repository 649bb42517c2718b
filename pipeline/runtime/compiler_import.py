"""torch's compiler is imported where something is compiled, not with torchvision and timm, nor for tensors without data.

`torch._dynamo` takes more than a second of a processor and 150 MiB in each process. torchvision imports it for a function that
RoIAlign calls when it runs, and both mark functions that are not to be compiled. torch imports it at the first call of a
function so marked, such as most operations on the device `meta`.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

_IMPORTERS = ("torchvision.ops.roi_align", "torchvision.tv_tensors", "timm.models.naflexvit")
_COMPILER = "torch._dynamo"
_KEPT = "__dynamo_disable"


def defer_compiler() -> None:
    """Let later imports of torchvision and timm in this process do without the compiler.

    Versions that take more of it at their import get it.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname in _IMPORTERS else None
        if spec and spec.origin and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(fullname, spec.origin)
        return spec


class _Loader(SourceFileLoader):
    """Runs a module while a stand-in has the place of the compiler, unless that is there already."""

    def exec_module(self, module: ModuleType) -> None:
        there = sys.modules.get(_COMPILER)
        if there is not None and hasattr(there, "__path__"):  # the compiler itself
            super().exec_module(module)
            return
        stand_ins = {_COMPILER: ModuleType(_COMPILER), f"{_COMPILER}.utils": ModuleType(f"{_COMPILER}.utils")}
        stand_ins[_COMPILER].disable = _disable  # type: ignore[attr-defined]
        stand_ins[f"{_COMPILER}.utils"].is_compile_supported = _is_compile_supported  # type: ignore[attr-defined]
        sys.modules |= stand_ins
        try:
            super().exec_module(module)
        except (ImportError, AttributeError, TypeError):
            _remove(stand_ins)
            super().exec_module(module)
        finally:
            _remove(stand_ins)
            if there is not None:
                sys.modules.setdefault(_COMPILER, there)  # that of `without_compiler`


@contextmanager
def without_compiler() -> Iterator[None]:
    """A block in which functions that are marked run as they are, and do not import the compiler. Nothing may be compiled in it.

    It has no effect if the compiler is there already. What takes more of the compiler raises AttributeError or ImportError.
    """
    if _COMPILER in sys.modules:
        yield
        return
    marked: list[Any] = []

    def run_as_it_is(function: Any, recursive: bool = True, *, wrapping: bool = True, reason: str | None = None) -> Any:
        marked.append(function)
        return function

    stand_in = ModuleType(_COMPILER)
    stand_in.disable = run_as_it_is  # type: ignore[attr-defined]
    sys.modules[_COMPILER] = stand_in
    try:
        yield
    finally:
        _remove({_COMPILER: stand_in})
        for function in marked:  # where torch keeps what `disable` gave
            if hasattr(function, _KEPT):
                delattr(function, _KEPT)


def _remove(modules: dict[str, ModuleType]) -> None:
    for name, module in modules.items():
        if sys.modules.get(name) is module:
            del sys.modules[name]


def _disable(function: Any, recursive: bool = True, *, reason: str | None = None) -> Any:
    import torch

    return torch._disable_dynamo(function, recursive)  # torch's own decorator for this: it imports at the first call


def _is_compile_supported(device_type: Any) -> Any:
    from torch._dynamo.utils import is_compile_supported

    return is_compile_supported(device_type)
