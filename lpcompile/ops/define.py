"""How an op module registers itself: functional schema, reference on CPU, launch on CUDA.

``Library.define`` costs 2.3 us a call where ``custom_op`` costs 6.7 us (torch 2.11 and 2.13), and
a ``triton_op`` becomes a higher-order op before the joint pass and is not merged by AOT's CSE.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library
from torch.utils.flop_counter import register_flop_formula

from lpcompile.ops.tape import played

LIBRARY = Library("lpcompile", "FRAGMENT")
PRODUCTS: set[Any] = set()  # the ops that multiply, those with a flop formula
LAUNCHES: dict[Any, Callable[..., Any]] = {}  # what runs an op on a GPU
ALIGN = 16  # bytes: cuBLAS and CUTLASS read FP8 rows that start at multiples of this


def define(
    schema: str,
    *,
    outputs: Callable[..., Any],
    reference: Callable[..., Any],
    launch: Callable[..., Any],
    flops: Callable[..., int] | None = None,
) -> Any:
    """Register ``lpcompile::<schema>`` and return its OpOverload.

    ``flops`` takes the shapes of the arguments. Without a formula, AOT's activation memory budget
    does not know the op and recomputes everything, so an op that multiplies nothing counts 0.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, reference, "CPU")
    LIBRARY.impl(name, launch, "CUDA")
    torch.library.register_fake(f"lpcompile::{name}", outputs, lib=LIBRARY)
    packet = getattr(torch.ops.lpcompile, name)
    LAUNCHES[packet.default] = launch
    packet.default.launched = played(packet.default, launch)  # see ``lowerings/launch.py``
    register_flop_formula(packet)(flops or _no_flops)
    if flops is not None:
        PRODUCTS.add(packet.default)
    return packet.default


def _no_flops(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 0


def round_up(n: Any, multiple: int) -> Any:
    """The smallest multiple of ``multiple`` that is at least n; n may be a SymInt."""
    return (n + multiple - 1) // multiple * multiple


def cdiv(n: int, size: int) -> int:
    """n / size, rounded up. Triton's takes a microsecond on the host."""
    return -(-n // size)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def same_bits(made: Any, expected: Any) -> str:
    """Empty when the two agree bit for bit, else where they differ first."""
    made, expected = _flat(made), _flat(expected)
    for i, (a, b) in enumerate(zip(made, expected, strict=True)):
        if a.dtype != b.dtype or a.shape != b.shape:
            return f"output {i}: {a.dtype}{list(a.shape)} is not {b.dtype}{list(b.shape)}"
        x = a.flatten().contiguous().view(torch.uint8)
        y = b.flatten().contiguous().view(torch.uint8)
        if not torch.equal(x, y):
            at = int((x != y).nonzero()[0])
            size = a.element_size()
            return (
                f"output {i}: {int((x != y).sum())} of {x.numel()} bytes differ, first in element "
                f"{at // size}: {a.flatten()[at // size]} is not {b.flatten()[at // size]}"
            )
    return ""


def per_column(bound: float) -> Callable[[Tensor, Tensor], str]:
    """Compares a GEMM with an fp64 expectation: every column within ``bound``, relative norm.

    NaN must stand exactly where it is expected. A global SQNR would hide one wrong column.
    """

    def agrees(made: Tensor, expected: Tensor) -> str:
        if made.shape != expected.shape:
            return f"shape {list(made.shape)} is not {list(expected.shape)}"
        made, expected = made.double(), expected.double()
        if not torch.equal(made.isfinite(), expected.isfinite()):
            return "non-finite elements do not stand where they are expected"
        error = (made - expected).nan_to_num(0, 0, 0).norm(dim=-2)
        size = expected.nan_to_num(0, 0, 0).norm(dim=-2)
        wrong = error > bound * size
        if not wrong.any():
            return ""
        relative = (error / size.clamp(min=1e-300))[wrong]
        return (
            f"{int(wrong.sum())} of {wrong.numel()} columns are off by more than {bound}, "
            f"the worst by {relative.max():.3g}"
        )

    return agrees


def _flat(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
