"""The largest magnitude of every group: x[T, C] bf16, offs[E] -> amax[E] fp32.

Of x itself, or, given ``signs``, of what ``hadamard`` makes of a group's rows: NVFP4 scales each
group of an operand of wgrad on top of its blocks. Rows past offs[-1] count nowhere, an empty
group's amax is 0. NaN above Inf above all, as in ``amax_tensor``.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lpcompile.ops import (
    amax_column_grouped,
    amax_tensor,
    fp8,
    group_tile,
    groups,
    hadamard,
    micro_tile,
    turned,
)
from lpcompile.ops.define import cdiv, define, next_power_of_2, same_bits
from lpcompile.ops.launcher import cached


def outputs(x: Tensor, offs: Tensor, signs: int | None) -> Tensor:
    return x.new_empty(offs.shape, dtype=torch.float32)


def reference(x: Tensor, offs: Tensor, signs: int | None) -> Tensor:
    x = groups.tokens(x, offs)
    each = [x[rows] for rows in groups.slices(offs)]
    if signs is not None:
        each = [hadamard.reference(one, signs) for one in each]
    return torch.cat([amax_tensor.reference(one) for one in each])


@cached
@triton.jit
def kernel(
    x_ptr,
    offs_ptr,
    amax_ptr,
    tokens_ptr,
    E,
    C,
    stride_t,
    stride_c,
    SIGNS: tl.constexpr,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    EP: tl.constexpr,
):
    starts, ends = groups.load(offs_ptr, E, EP)
    group, first, last, index, _ = groups.locate(tl.program_id(1), starts, ends, ROWS, 16, EP)
    if group < E:
        c = tl.program_id(0) * BC + tl.arange(0, BC)
        begin = first + index * ROWS
        best = tl.zeros([BN, BC], tl.float32)
        plain = tl.zeros([BN, BC], tl.float32)
        for start in range(begin, tl.minimum(begin + ROWS, last), BN * 16):
            run = start + tl.arange(0, BN) * 16
            if SIGNS is None:
                whole = (start + BN * 16 <= last) & (tl.program_id(0) * BC + BC <= C)
                rows = group_tile.load(x_ptr, run, last, c, C, stride_t, stride_c, 16, whole)
            else:  # masks are no more than what two ways to load cost its registers
                rows = group_tile.load(x_ptr, run, last, c, C, stride_t, stride_c, 16, False)
                if tokens_ptr is not None:
                    plain = fp8.larger(plain, turned.amax(rows))
                rows = hadamard.summed(rows, SIGNS)
            best = micro_tile.largest(rows, best)
        amax = tl.reduce(tl.reduce(best, 0, fp8.larger), 0, fp8.larger)
        if SIGNS is not None:
            amax *= 0.25  # and rounded once: both keep order
        tl.atomic_max(amax_ptr + group, fp8.bits_of_amax(amax), sem="relaxed")
        if tokens_ptr is not None:
            amax = tl.reduce(tl.reduce(plain, 0, fp8.larger), 0, fp8.larger)
            tl.atomic_max(tokens_ptr, fp8.bits_of_amax(amax), sem="relaxed")


def launch(x: Tensor, offs: Tensor, signs: int | None) -> Tensor:
    amax = torch.zeros(offs.shape, dtype=torch.float32, device=x.device)
    return fill(x, offs, signs, amax)[0]


def fill(
    x: Tensor, offs: Tensor, signs: int | None, amax: Tensor, tokens: Tensor | None = None
) -> tuple[Tensor, Any]:
    """Run the kernel into amax[E], of zeros, and tokens[1], the maximum of x itself: both."""
    (T, C), E = x.shape, offs.shape[0]
    if x.numel():
        rows, BN, BC = 256, 1, 256
        bits = amax.view(torch.int32), None if tokens is None else tokens.view(torch.int32)
        kernel[cdiv(C, BC), cdiv(T, rows) + E](
            x, offs, *bits, E, C, *x.stride(), signs,
            rows, BN, BC, next_power_of_2(E), num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return amax, tokens


op = define(
    "amax_group(Tensor x, Tensor offs, int? signs) -> Tensor",
    outputs=outputs,
    reference=reference,
    launch=launch,
)
agrees = same_bits


def samples(device: str) -> list[tuple[Any, ...]]:
    return [
        (x, offs, signs)
        for x, offs, *picked in amax_column_grouped.samples(device)
        if not picked
        for signs in (None, hadamard.SIGNS)
    ]
