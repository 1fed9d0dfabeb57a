"""The largest magnitude of all groups together: x[T, C] bf16, offs[E] -> amax[1] fp32.

One scale for all tokens; rows past offs[-1] are none and do not count. NaN above Inf above all.
With ``rows``, of x[rows]. Kernel: ``amax_column``.
"""

import torch
from torch import Tensor

from lpcompile.ops import amax_column, amax_column_grouped, amax_tensor, groups
from lpcompile.ops.define import define, same_bits

kernel = amax_column.kernel
samples = amax_column_grouped.samples
agrees = same_bits


def outputs(x: Tensor, offs: Tensor, rows: Tensor | None = None) -> Tensor:
    return x.new_empty((1,), dtype=torch.float32)


def reference(x: Tensor, offs: Tensor, rows: Tensor | None = None) -> Tensor:
    return amax_tensor.reference(groups.tokens(x, offs, rows)[: groups.slices(offs)[-1].stop])


def launch(x: Tensor, offs: Tensor, rows: Tensor | None = None) -> Tensor:
    amax = torch.zeros((1,), dtype=torch.float32, device=x.device)
    return amax_column.fill(x[None], offs, rows, amax, whole=True)


op = define(
    "amax_tensor_grouped(Tensor x, Tensor offs, Tensor? rows=None) -> Tensor",
    outputs=outputs,
    reference=reference,
    launch=launch,
)
