"""The largest magnitude of every column: x[M, C] bf16 -> amax[C] fp32; of x[E, M, C]: [E, C].

An op of its own, so that it can move into the producer of x. NaN above Inf above all: maxima keep
NaN in a program, and are of integers, by atomics, between programs. Of no rows it is 0.

The kernel serves the amaxes of ragged groups too.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lpcompile.ops import fp8, groups, turned
from lpcompile.ops.define import cdiv, define, next_power_of_2, same_bits
from lpcompile.ops.launcher import cached


def outputs(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-2], x.shape[-1]), dtype=torch.float32)


def reference(x: Tensor) -> Tensor:
    if not x.shape[-2]:
        return x.new_zeros((*x.shape[:-2], x.shape[-1]), dtype=torch.float32)
    return fp8.canonical(x.abs().amax(-2).float())


@cached
@triton.jit
def kernel(
    x_ptr,
    offs_ptr,
    rows_ptr,
    amax_ptr,
    E,
    T,
    C,
    stride_e,
    stride_t,
    stride_c,
    WHOLE: tl.constexpr,  # one amax for everything
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    EP: tl.constexpr,
):
    if offs_ptr is None:  # the stacked matrices are the groups
        group, index, first, last = tl.program_id(2), tl.program_id(1), 0, T
        x_ptr += group.to(tl.int64) * stride_e
    else:
        starts, ends = groups.load(offs_ptr, E, EP)
        group, first, last, index, _ = groups.locate(tl.program_id(1), starts, ends, ROWS, 1, EP)
    begin = first + index * ROWS
    end = tl.minimum(begin + ROWS, last)
    if begin < end:
        c = tl.program_id(0) * BC + tl.arange(0, BC)
        best = tl.zeros([BT, BC], tl.float32)
        for start in range(begin, end, BT):
            # Past the end the last row again, which changes no maximum and needs no mask.
            t = tl.minimum(start + tl.arange(0, BT), end - 1)
            row = groups.source(rows_ptr, t, t < end, T)
            at = row[:, None] * stride_t + c[None, :].to(tl.int64) * stride_c
            x = turned.read(x_ptr + at, (c < C)[None, :], EVEN)
            best = fp8.larger(best, tl.abs(x.to(tl.float32)))
        amax = fp8.amax(best, 0)
        if WHOLE:
            tl.atomic_max(amax_ptr, fp8.bits_of_amax(fp8.amax(amax, 0)), sem="relaxed")
        else:
            to = amax_ptr + group.to(tl.int64) * C + c
            tl.atomic_max(to, fp8.bits_of_amax(amax), mask=c < C, sem="relaxed")


def fill(x: Tensor, offs: Tensor | None, rows: Tensor | None, amax: Tensor, whole: bool) -> Tensor:
    """Run the kernel on x[E, M, C], or on the groups of x[1, T, C] or of x[1, rows, C]."""
    if not x.numel():
        return amax
    (E, T, C), num_tokens = x.shape, groups.num_tokens(x[0], rows)
    ROWS, BT, BC, warps = 256, 16, 64, 1
    grid = (cdiv(C, BC), cdiv(num_tokens, ROWS), E)
    if offs is not None:
        E = offs.shape[0]
        grid = (grid[0], grid[1] + E, 1)
    kernel[grid](
        x, offs, rows, amax.view(torch.int32), E, T, C, *x.stride(), whole,
        C % BC == 0, ROWS, BT, BC, next_power_of_2(E), num_warps=warps,
    )  # fmt: skip
    return amax


def launch(x: Tensor) -> Tensor:
    amax = torch.zeros((*x.shape[:-2], x.shape[-1]), dtype=torch.float32, device=x.device)
    return fill(fp8.stack(x), None, None, amax, whole=False)


op = define("amax_column(Tensor x) -> Tensor", outputs=outputs, reference=reference, launch=launch)
agrees = same_bits


def matrices(device: str) -> list[Tensor]:
    """x[M, C] of every kind, for the samples of quantizers too."""
    x = torch.randn(64, 96, device=device, dtype=torch.bfloat16)
    bad = x.clone()
    bad[3, 5], bad[4, 5], bad[60, 1] = torch.inf, torch.nan, -torch.inf
    odd = torch.randn(777, 131, device=device, dtype=torch.bfloat16)
    single = [x[:1], odd[:1, :24].contiguous(), odd[:24, :1].contiguous()]
    return [x, x.t(), odd, odd[1:, 1:], x[:0], *single, x * 0, bad]


def samples(device: str) -> list[tuple[Any, ...]]:
    x, *_, bad = inputs = matrices(device)
    experts = torch.randn(3, 141, 83, device=device, dtype=torch.bfloat16)
    return [(x,) for x in (*inputs, experts, experts.mT, experts[:, :0], torch.stack([x, bad]))]
