"""The fused ops that the passes put into a layer, called as they are called there.

A forward and a backward run once with ``codegen="eager"``: graphs after all passes, op by op. What
reaches a fused op is kept, to call the op with it again: real operands, amaxes and offsets.
"""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lpcompile import ops
from lpcompile.backend import lowprec
from lpcompile.bench.models import Layer, built, drawn
from lpcompile.bench.variants import static_shapes
from lpcompile.ops import pointwise

FUSED = (
    ops.fused_amax,
    ops.fused_amax_micro,
    ops.fused_cast,
    ops.fused_cast_micro,
    ops.fused_quantize_row,
    ops.fused_wide_micro,
)
_MODULES = {module.op: module for module in FUSED}
OPTIONS = {"codegen": "eager", "rewrite": "all"}


class Call(NamedTuple):
    """An op as a layer calls it, what tells it from its other calls, and what it reads."""

    name: str
    R: int
    C: int
    function: Callable[[], Any]
    tensors: tuple[Any, ...]


class _Recorder(TorchDispatchMode):
    """Keeps the arguments of every fused op."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, tuple[Any, ...]]] = []

    @classmethod
    def is_infra_mode(cls) -> bool:
        """So that Dynamo runs what it compiled with the mode on."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _MODULES:
            if kwargs:
                raise NotImplementedError(f"{func} is called with {sorted(kwargs)} by name")
            self.seen.append((func, args))
        return func(*args, **(kwargs or {}))


def calls(layer: Layer, recipe: str, device: torch.device) -> list[Call]:
    """The calls of fused ops in a forward and a backward of the layer, alike ones once."""
    torch._dynamo.reset()
    module, inputs = built(layer, device), drawn(layer, device)
    dy = torch.randn_like(inputs[0])
    with static_shapes():
        module.compile(backend=lowprec, fullgraph=True, options={**OPTIONS, "recipe": recipe})
        module(*inputs).backward(dy)  # with a mode on, Dynamo compiles nothing
        with _Recorder() as recorder:
            module(*inputs).backward(dy)
    found: dict[tuple[Any, ...], Call] = {}
    for op, args in recorder.seen:
        (program,) = (a for a in args if isinstance(a, str))
        *rows, C = args[0][pointwise.parse(program).large].shape  # or a stack of matrices
        R = prod(rows)
        name = f"{name_of(_MODULES[op])}: {_makes(args)} of {len(args[0])} inputs"
        found.setdefault((name, R, C), Call(name, R, C, partial(op, *args), args))
    return list(found.values())


def name_of(module: Any) -> str:
    """The op's name."""
    return module.__name__.rpartition(".")[2]


def _makes(args: tuple[Any, ...]) -> str:
    """What is asked of a fused op: its forms, its amaxes, or rows."""
    texts = [a for a in args[1:] if isinstance(a, list) and a and isinstance(a[0], str)]
    columns = any(a is True for a in args[4:])  # of ``fused_quantize_row``
    rows = "row n, maxima of columns" if columns else "row n"
    return ", ".join(texts[0]) if texts else rows
