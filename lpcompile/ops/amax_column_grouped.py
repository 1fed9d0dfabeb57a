"""The largest magnitude of every column of every group: x[T, C] bf16, offs[E] -> amax[E, C] fp32.

Group e is x[offs[e - 1] : offs[e]]; rows past offs[-1] count nowhere, an empty group's amax is 0.
NaN above Inf above all. With ``rows``, of x[rows]. Kernel: ``amax_column``.
"""

from typing import Any

import torch
from torch import Tensor

from lpcompile.ops import amax_column, groups
from lpcompile.ops.define import define, same_bits

kernel = amax_column.kernel
agrees = same_bits


def outputs(x: Tensor, offs: Tensor, rows: Tensor | None = None) -> Tensor:
    return x.new_empty((offs.shape[0], x.shape[1]), dtype=torch.float32)


def reference(x: Tensor, offs: Tensor, rows: Tensor | None = None) -> Tensor:
    x = groups.tokens(x, offs, rows)
    return torch.stack([amax_column.reference(x[group]) for group in groups.slices(offs)])


def launch(x: Tensor, offs: Tensor, rows: Tensor | None = None) -> Tensor:
    amax = torch.zeros((offs.shape[0], x.shape[1]), dtype=torch.float32, device=x.device)
    return amax_column.fill(x[None], offs, rows, amax, whole=False)


op = define(
    "amax_column_grouped(Tensor x, Tensor offs, Tensor? rows=None) -> Tensor",
    outputs=outputs,
    reference=reference,
    launch=launch,
)


def samples(device: str) -> list[tuple[Any, ...]]:
    """Groups of every kind: unequal, empty, all empty, one, many, with NaN in and past them.

    The last three are of tokens picked from a smaller tensor, and from a larger one.
    """

    def of(*ends: int) -> Tensor:
        return torch.tensor(ends, device=device, dtype=torch.int32)

    x = torch.randn(333, 131, device=device, dtype=torch.bfloat16)
    even = torch.randn(256, 64, device=device, dtype=torch.bfloat16)
    past, bad = x.clone(), x.clone()
    past[200:] = torch.nan
    bad[3, 5], bad[150, 5], bad[151, 5], bad[299, 1] = torch.inf, -torch.inf, torch.nan, torch.nan
    skewed = torch.randn(1400, 40, device=device, dtype=torch.bfloat16)
    return [
        (x, of(0, 1, 17, 150, 150, 333)),
        (even, of(64, 128, 192, 256)),
        (past, of(16, 16, 200)),
        (even.t(), of(10, 64)),
        (bad, of(100, 300, 333)),
        (x, of(333)),
        (x[:2, :24].contiguous(), of(1, 2)),
        (x[:1, :24].contiguous(), of(0, 1)),
        (x, of(0, 0, 0)),
        (x[:0], of(0, 0)),
        (x[1:, 1:], of(300, 301, 302)),
        (skewed, of(*range(1, 65), 1400)),
        (even * 1e-38, of(100, 256)),
        (bad, of(40, 40, 999), torch.arange(1000, device=device) * 7 % 333),
        (x.t(), of(5, 60), torch.arange(-70, 0, device=device, dtype=torch.int32)),
        (even, of(0, 0), torch.arange(0, device=device)),
    ]
