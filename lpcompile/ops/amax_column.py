"""The largest magnitude of every column: x[M, C] bf16 -> amax[C] fp32; of x[E, M, C]: [E, C].

An op of its own, so that it can move into the producer of x. NaN above Inf above all: maxima keep
NaN in a program, and are of integers, by atomics, between programs. Of no rows it is 0.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lpcompile.ops import fp8
from lpcompile.ops.define import define, same_bits


def outputs(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-2], x.shape[-1]), dtype=torch.float32)


def reference(x: Tensor) -> Tensor:
    if not x.shape[-2]:
        return x.new_zeros((*x.shape[:-2], x.shape[-1]), dtype=torch.float32)
    return fp8.canonical(x.abs().amax(-2).float())


@triton.jit
def kernel(
    x_ptr,
    amax_ptr,
    M,
    C,
    stride_e,
    stride_m,
    stride_c,
    ROWS,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    e = tl.program_id(2).to(tl.int64)
    x_ptr += e * stride_e
    amax_ptr += e * C
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    start = tl.program_id(1) * ROWS
    best = tl.zeros([BM, BC], tl.float32)
    for i in range(0, ROWS, BM):
        m = start + i + tl.arange(0, BM)
        at = x_ptr + m[:, None].to(tl.int64) * stride_m + c[None, :].to(tl.int64) * stride_c
        if EVEN:
            x = tl.load(at)
        else:
            x = tl.load(at, mask=(m < M)[:, None] & (c < C)[None, :], other=0.0)
        best = fp8.larger(best, tl.abs(x.to(tl.float32)))
    bits = fp8.bits_of_amax(tl.reduce(best, 0, fp8.larger))
    tl.atomic_max(amax_ptr + c, bits, mask=c < C, sem="relaxed")


def launch(x: Tensor) -> Tensor:
    amax = torch.zeros((*x.shape[:-2], x.shape[-1]), dtype=torch.float32, device=x.device)
    if x.numel():
        x = fp8.stack(x)
        E, M, C = x.shape
        rows, BM, BC = 256, 8, 128
        grid = (triton.cdiv(C, BC), triton.cdiv(M, rows), E)
        bits, even = amax.view(torch.int32), M % rows == 0 and C % BC == 0
        kernel[grid](x, bits, M, C, *x.stride(), rows, even, BM, BC, num_warps=2)
    return amax


op = define("amax_column(Tensor x) -> Tensor", outputs=outputs, reference=reference, launch=launch)
agrees = same_bits


def matrices(device: str) -> list[Tensor]:
    """x[M, C] of every kind, for the samples of quantizers too."""
    x = torch.randn(64, 96, device=device, dtype=torch.bfloat16)
    bad = x.clone()
    bad[3, 5], bad[4, 5], bad[60, 1] = torch.inf, torch.nan, -torch.inf
    odd = torch.randn(777, 131, device=device, dtype=torch.bfloat16)
    return [x, x.t(), odd, odd[1:, 1:], x[:0], x[:1], x * 0, bad]


def samples(device: str) -> list[tuple[Any, ...]]:
    x, *_, bad = inputs = matrices(device)
    experts = torch.randn(3, 141, 83, device=device, dtype=torch.bfloat16)
    return [(x,) for x in (*inputs, experts, experts.mT, experts[:, :0], torch.stack([x, bad]))]
