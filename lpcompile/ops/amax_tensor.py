"""The largest magnitude of a matrix: x[R, C] bf16 -> amax[1] fp32; x[E, R, C] -> amax[E].

NaN counts above Inf and Inf above all numbers, so that a non-finite element is never hidden: maxima
keep NaN in a program, and are of integers, by atomics, between programs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lpcompile.ops import fp8
from lpcompile.ops.define import cdiv, define, same_bits
from lpcompile.ops.launcher import cached


def outputs(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-2] or (1,), dtype=torch.float32)


def reference(x: Tensor) -> Tensor:
    x = fp8.stack(x)
    if not x.numel():
        return x.new_zeros(x.shape[:1], dtype=torch.float32)
    return fp8.canonical(x.abs().amax((1, 2)).float())


@cached
@triton.jit
def kernel(x_ptr, amax_ptr, n, EVEN: tl.constexpr, PER_PROGRAM: tl.constexpr, BLOCK: tl.constexpr):
    e = tl.program_id(1)
    x_ptr += e.to(tl.int64) * n
    start = tl.program_id(0).to(tl.int64) * PER_PROGRAM
    best = tl.zeros([BLOCK], tl.float32)
    for i in range(0, PER_PROGRAM, BLOCK):
        at = start + i + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at) if EVEN else tl.load(x_ptr + at, mask=at < n, other=0.0)
        best = fp8.larger(best, tl.abs(x.to(tl.float32)))
    bits = fp8.bits_of_amax(fp8.amax(best, 0))
    tl.atomic_max(amax_ptr + e, bits, sem="relaxed")


def launch(x: Tensor) -> Tensor:
    x = fp8.stack(x)
    E, n = x.shape[0], x[0].numel()
    amax = torch.zeros((E,), dtype=torch.float32, device=x.device)
    if n:
        dense = x if _is_dense(x) else x.contiguous()
        per_program, block = 16384, 16384
        grid = (cdiv(n, per_program), E)
        bits, even = amax.view(torch.int32), n % per_program == 0
        kernel[grid](dense, bits, n, even, per_program, block, num_warps=8)
    return amax


def _is_dense(x: Tensor) -> bool:
    """Whether each matrix of x[E, R, C] fills one stretch of memory, in whatever order."""
    stretches = x.stride(0) == x.shape[1] * x.shape[2] or x.shape[0] == 1
    return stretches and (x.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(x))


op = define("amax_tensor(Tensor x) -> Tensor", outputs=outputs, reference=reference, launch=launch)
agrees = same_bits


def samples(device: str) -> list[tuple[Any, ...]]:
    x = torch.randn(64, 96, device=device, dtype=torch.bfloat16)
    bad = x.clone()
    bad[3, 5] = torch.inf
    worse = bad.clone()
    worse[60, 1] = torch.nan
    large = torch.randn(300, 513, device=device, dtype=torch.bfloat16)
    experts = torch.stack([x, x * 3, bad, worse * 0, x.flip(0)])  # [E, R, C]
    inputs = [x, x.t(), large[:, 1:], x[:0], x * 0, bad, worse, large * 1e-38]
    return [(x,) for x in (*inputs, experts, experts.mT, experts[::2], experts[:, :0])]
