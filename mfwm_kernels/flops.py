"""Registers the ops' products with torch's FlopCounterMode, which cannot see the products inside an op.

torch.utils.flop_counter imports Triton, which takes 0.15 s, and a FlopCounterMode copies the registered formulas when
it is constructed. So formulas wait here until the program itself imports torch.utils.flop_counter.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

COUNTER = "torch.utils.flop_counter"

_formulas: list[tuple[Any, Callable[..., int]]] = []


def register(op: Any, formula: Callable[..., int]) -> None:
    """Count `formula(*arguments)` FLOPs for each call of `op`, an attribute of torch.ops.mfwm."""
    _formulas.append((op, formula))
    if COUNTER in sys.modules:
        _register_waiting()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register_waiting() -> None:
    counter = importlib.import_module(COUNTER)
    while _formulas:
        op, formula = _formulas.pop()
        counter.register_flop_formula(op, get_raw=True)(formula)


class _Finder(MetaPathFinder):
    """Finds the counter's module once, and has the formulas registered when it has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register_waiting()

    def __getattr__(self, name: str) -> Any:
        """The rest of the module's own loader, such as get_source for tracebacks."""
        return getattr(self.loader, name)
