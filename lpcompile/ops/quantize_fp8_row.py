"""Quantize to FP8 with a scale per row: x[R, C] bf16 -> values[R, Cp] e4m3 or e5m2, scales[R].

Of x[E, R, C], an expert weight, values[E, R, Cp] and scales[E, R].
Cp is C rounded up to 16, and the padding is zero. Arithmetic: ``lpcompile.ops.fp8``. Rows of up to
32768 elements stay in registers, so that x is read once.

columns: the amax of x's columns, which is for others; it is not read. As an argument it is made in
the forward, where one kernel can make both (``passes/fuse_columns.py``).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lpcompile.ops import blocks, fp8, turned
from lpcompile.ops.define import ALIGN, cdiv, define, next_power_of_2, round_up, same_bits
from lpcompile.ops.launcher import cached


def outputs(
    x: Tensor, element: torch.dtype, pow2: bool, columns: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    values = x.new_empty((*x.shape[:-1], round_up(x.shape[-1], ALIGN)), dtype=element)
    return values, x.new_empty(x.shape[:-1], dtype=torch.float32)


def reference(
    x: Tensor, element: torch.dtype, pow2: bool, columns: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    amax = x.abs().amax(-1).float() if x.shape[-1] else x.new_zeros(x.shape[:-1]).float()
    scale = fp8.encode_scale(amax, element, pow2)
    values = fp8.cast(x, scale[..., None], element)
    return fp8.pad_columns(values, round_up(x.shape[-1], ALIGN)), fp8.decode_scale(scale)


@cached
@triton.jit
def kernel(
    x_ptr,
    values_ptr,
    scales_ptr,
    R: tl.int32,
    C: tl.int32,
    CP,
    stride_e,
    stride_r,
    stride_c,
    LIMIT: tl.constexpr,
    POW2: tl.constexpr,
    ELEMENT: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    RUN: tl.constexpr,
    ONE_READ: tl.constexpr,
    EVEN: tl.constexpr,
):
    e = tl.program_id(1).to(tl.int64)
    x_ptr += e * stride_e
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    out = values_ptr + (e * R + r)[:, None] * CP
    if ONE_READ:
        x = turned.load(x_ptr, r, 0, R, C, stride_r, stride_c, BC, RUN, EVEN)
        scale = fp8.encode(fp8.amax(x, 1), LIMIT, POW2)
        store(x, scale, out, r, tl.arange(0, BC), R, C, CP, ELEMENT, EVEN)
    else:
        best = tl.zeros([BR, BC], tl.float32)
        for first in range(0, C, BC):
            x = turned.load(x_ptr, r, first, R, C, stride_r, stride_c, BC, RUN, EVEN)
            best = fp8.larger(best, tl.abs(x.to(tl.float32)))
        scale = fp8.encode(fp8.amax(best, 1), LIMIT, POW2)
        for first in range(0, CP, BC):
            x = turned.load(x_ptr, r, first, R, C, stride_r, stride_c, BC, RUN, EVEN)
            store(x, scale, out, r, first + tl.arange(0, BC), R, C, CP, ELEMENT, EVEN)
    tl.store(scales_ptr + e * R + r, fp8.decode(scale, POW2), mask=r < R)


@triton.jit
def store(x, scale, out, r, c, R, C, CP, ELEMENT: tl.constexpr, EVEN: tl.constexpr):
    """x[BR, BC] times scale[BR], cast, in columns c of rows r, which begin at out[BR, 1]."""
    scaled = x.to(tl.float32) * scale[:, None]
    if not EVEN:  # padding stays zero under a NaN scale too
        scaled = tl.where((r < R)[:, None] & (c < C)[None, :], scaled, 0.0)
    live = (r < R)[:, None] & (c < CP)[None, :]
    turned.write(out + c[None, :], fp8.narrow(scaled, ELEMENT), live, EVEN)


def launch(
    x: Tensor, element: torch.dtype, pow2: bool, columns: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if not fp8.runs_triton(x) or not x.numel():
        return reference(x, element, pow2)
    values, scales = outputs(x, element, pow2)
    experts = fp8.stack(x)
    (E, R, C), CP = experts.shape, values.shape[-1]
    whole = next_power_of_2(CP)
    if blocks.is_turned(x):
        BR, BC, run, one_read, warps = 64, 128, 8, whole <= 128, 4
    elif whole <= 32768:
        BR, BC, run, one_read = max(1, 2048 // whole), whole, 1, True
        warps = min(16, max(2, whole // 1024))
    else:
        BR, BC, run, one_read, warps = 1, 8192, 1, False, 8
    kernel[(cdiv(R, BR), E)](
        experts, values, scales, R, C, CP, *experts.stride(),
        fp8.MAX[element], pow2, fp8.TRITON[element], BR, BC, run, one_read,
        R % BR == 0 and C % BC == 0, num_warps=warps,
    )  # fmt: skip
    return values, scales


op = define(
    "quantize_fp8_row(Tensor x, ScalarType element, bool pow2, Tensor? columns=None)"
    " -> (Tensor, Tensor)",
    outputs=outputs,
    reference=reference,
    launch=launch,
)
agrees = same_bits


def samples(device: str) -> list[tuple[Any, ...]]:
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    x = torch.randn(64, 96, device=device, dtype=torch.bfloat16)
    odd = torch.randn(37, 203, device=device, dtype=torch.bfloat16)
    wide = torch.randn(3, 33000, device=device, dtype=torch.bfloat16)
    bad = x.clone()
    bad[3, 5], bad[4, 5], bad[60, 1] = torch.inf, torch.nan, -torch.inf
    inputs = [x, x.t(), odd, odd[1:, 1:].t(), wide, x[:0], x[:1], odd[:, :1]]
    inputs += [x * 0, x * 1e-38, x * 1e36, bad]
    experts = torch.randn(3, 41, 83, device=device, dtype=torch.bfloat16)
    return [
        (x, element, pow2)
        for x in (*inputs, experts, experts.mT, torch.stack([x, bad]))
        for element, pow2 in ((e4m3, False), (e5m2, False), (e4m3, True))
    ]
