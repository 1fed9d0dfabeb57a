"""The largest magnitude of all groups together: x[T, C] bf16, offs[E] -> amax[1] fp32.

One scale for all tokens; rows past offs[-1] are none and do not count. NaN above Inf above all, as
in ``amax_tensor``. With ``rows``, of x[rows].
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lpcompile.ops import amax_column_grouped, amax_tensor, fp8, groups
from lpcompile.ops.define import define, same_bits

samples = amax_column_grouped.samples
agrees = same_bits


def outputs(x: Tensor, offs: Tensor, rows: Tensor | None = None) -> Tensor:
    return x.new_empty((1,), dtype=torch.float32)


def reference(x: Tensor, offs: Tensor, rows: Tensor | None = None) -> Tensor:
    return amax_tensor.reference(groups.tokens(x, rows)[: groups.slices(offs)[-1].stop])


@triton.jit
def kernel(
    x_ptr,
    offs_ptr,
    rows_ptr,
    amax_ptr,
    E,
    T,
    C,
    stride_t,
    stride_c,
    ROWS: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    begin = tl.program_id(1) * ROWS
    end = tl.minimum(begin + ROWS, tl.load(offs_ptr + E - 1))
    best = tl.zeros([BT, BC], tl.float32)
    for start in range(begin, end, BT):
        t = start + tl.arange(0, BT)
        row = groups.source(rows_ptr, t, t < end, T)
        at = row[:, None] * stride_t + c[None, :].to(tl.int64) * stride_c
        live = (t < end)[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + at, mask=live, other=0.0)
        best = fp8.larger(best, tl.abs(x.to(tl.float32)))
    amax = tl.reduce(tl.reduce(best, 0, fp8.larger), 0, fp8.larger)
    tl.atomic_max(amax_ptr, fp8.bits_of_amax(amax), sem="relaxed")


def launch(x: Tensor, offs: Tensor, rows: Tensor | None = None) -> Tensor:
    (T, C), E = x.shape, offs.shape[0]
    amax = torch.zeros((1,), dtype=torch.float32, device=x.device)
    if x.numel():
        ROWS, BC = 256, 256
        grid = (triton.cdiv(C, BC), triton.cdiv(groups.num_tokens(x, rows), ROWS))
        bits = amax.view(torch.int32)
        kernel[grid](x, offs, rows, bits, E, T, C, *x.stride(), ROWS, 16, BC, num_warps=8)
    return amax


op = define(
    "amax_tensor_grouped(Tensor x, Tensor offs, Tensor? rows=None) -> Tensor",
    outputs=outputs,
    reference=reference,
    launch=launch,
)
