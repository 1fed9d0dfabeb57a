"""The random Hadamard transform of x.T in runs of 16: x[M, C] bf16 -> y[C, Mp] bf16.

    y[c, 16 i + j] = sum_k  x[16 i + k, c] * s[k] * H[k, j] / 4

Mp is M rounded up to 16; rows past M count as zeros. Of x[E, M, C], a stack, y[E, C, Mp].
``signs`` is the mask of negative s[k], bit k for row k. Both operands of wgrad get it along tokens,
where it cancels: (R a).(R b) = a.b. The sum is the fp32 butterfly of strides 1, 2, 4, 8, rounded
once. Source: arXiv 2509.25149, section 3.3.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lpcompile.ops import amax_column, blocks, fp8, pointwise, turned
from lpcompile.ops.define import cdiv, define, round_up, same_bits
from lpcompile.ops.launcher import cached

RUN = 16
NAN = 0x7FC0  # one bf16 NaN on every device


def outputs(x: Tensor, signs: int) -> Tensor:
    *experts, M, C = x.shape
    return x.new_empty((*experts, C, round_up(M, RUN)), dtype=torch.bfloat16)


def reference(x: Tensor, signs: int) -> Tensor:
    M = x.shape[-2]
    whole = torch.nn.functional.pad(x.mT, (0, round_up(M, RUN) - M)).float()
    negative = torch.tensor([signs >> k & 1 for k in range(RUN)], device=x.device).bool()
    runs = whole.view(*whole.shape[:-1], whole.shape[-1] // RUN, RUN)
    runs = torch.where(negative, -runs, runs)  # [..., C, n, 16]
    for stride in (1, 2, 4, 8):
        pairs = runs.unflatten(-1, (-1, 2, stride))
        a, b = pairs.unbind(-2)
        runs = torch.stack([a + b, a - b], dim=-2).flatten(-3)
    y = (runs / 4).flatten(-2).bfloat16()
    return torch.where(y.isnan(), torch.nan, y)


@triton.jit
def butterfly(v, STRIDE: tl.constexpr):
    """One stage, on a tuple of 16 tensors."""
    out = ()
    for k in tl.static_range(16):
        pair = v[k - STRIDE] - v[k] if k & STRIDE else v[k] + v[k + STRIDE]
        out = out + (pair,)  # type: ignore[assignment]
    return out


@triton.jit
def signed(x, k: tl.constexpr, SIGNS: tl.constexpr):
    """x bf16 -> fp32, negated where bit k of the signs is set."""
    wide = turned.widened(x) if x.dtype == tl.bfloat16 else x
    return wide * -1.0 if (SIGNS >> k) & 1 else wide  # not -x, which is 0 - x and loses -0


@triton.jit
def summed(rows, SIGNS: tl.constexpr):
    """4 times the transform of a tuple of 16 tiles bf16, with signs, fp32."""
    v = ()
    for k in tl.static_range(16):
        v = v + (signed(rows[k], k, SIGNS),)  # type: ignore[assignment]
    return butterfly(butterfly(butterfly(butterfly(v, 1), 2), 4), 8)


@triton.jit
def transformed(rows, SIGNS: tl.constexpr):
    """The transform of a tuple of 16 tiles bf16, with signs, fp32."""
    v = summed(rows, SIGNS)
    out = ()
    for k in tl.static_range(16):
        out = out + (v[k] * 0.25,)  # type: ignore[assignment]
    return out


@triton.jit
def narrowed(v):
    """A tuple of tiles fp32, rounded to bf16."""
    out = ()
    for k in tl.static_range(len(v)):
        out = out + (pointwise.narrowed(v[k]),)  # type: ignore[assignment]
    return out


@cached
@triton.jit
def kernel(
    x_ptr, y_ptr, M, C, MP, stride_e, stride_m, stride_c,
    SIGNS: tl.constexpr, PAIRS: tl.constexpr,
    BC: tl.constexpr, BM: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(2).to(tl.int64)
    x_ptr += e * stride_e
    y_ptr += e * C * MP
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    first = tl.program_id(0) * BM
    run = first + tl.arange(0, BM // 16) * 16
    rows = turned.rows(x_ptr, c, run, C, M, stride_c, stride_m, 16, EVEN)
    y = turned.turned(transformed(rows, SIGNS))
    m = first + tl.arange(0, BM)
    to = y_ptr + c[:, None].to(tl.int64) * MP + m[None, :]
    turned.write(to, turned.bits(y, PAIRS), (c < C)[:, None] & (m < MP)[None, :], EVEN)


def fill(x: Tensor, signs: int, y: Tensor) -> Tensor:
    """Run the kernel on x[..., M, C], whatever its strides, into y[..., C, Mp]."""
    x = fp8.stack(x)
    (E, M, C), MP = x.shape, y.shape[-1]
    BC, BM = 128, 64
    even = M % BM == 0 and C % BC == 0
    kernel[(cdiv(MP, BM), cdiv(C, BC), E)](
        x, y.view(torch.int16), M, C, MP, *x.stride(), signs, blocks.compares_pairs(x),
        BC, BM, even, num_warps=4,
    )  # fmt: skip
    return y


def launch(x: Tensor, signs: int) -> Tensor:
    if not x.numel():
        return reference(x, signs)
    return fill(x, signs, outputs(x, signs))


op = define(
    "hadamard(Tensor x, int signs) -> Tensor",
    outputs=outputs,
    reference=reference,
    launch=launch,
)
agrees = same_bits


def samples(device: str) -> list[tuple[Any, ...]]:
    large = torch.randn(160, 288, device=device, dtype=torch.bfloat16)
    powers = torch.arange(-133, 128, device=device)[:, None]
    spread = torch.randn(261, 48, device=device, dtype=torch.bfloat16).clamp(-1.9, 1.9)
    spread = torch.ldexp(spread.double(), powers).to(torch.bfloat16)
    experts = torch.randn(3, 41, 83, device=device, dtype=torch.bfloat16)
    inputs = [large, large.t(), large * 1e-38, large[:5], spread, spread.t(), experts, experts.mT]
    cases = [(x, SIGNS) for x in (*inputs, *amax_column.matrices(device))]
    return [*cases, (large, 0), (large, 0xFFFF), (large, 1)]


# s = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1), the same on every rank.
SIGNS = sum(1 << k for k in (3, 5, 6, 7, 8, 9, 10, 12, 14, 15))
