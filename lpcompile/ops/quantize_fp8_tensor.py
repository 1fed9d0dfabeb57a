"""Quantize to FP8 under one given amax: x[R, C] bf16 -> values[R, Cp] e4m3 or e5m2, scale[1].

Of x[E, R, C], an expert weight, under amax[E]: values[E, R, Cp] and scale[E].
Cp is C rounded up to 16, and the padding is zero: FP8 GEMMs read rows that start at multiples of
16 bytes. The amax comes from ``amax_tensor``. Arithmetic: ``lpcompile.ops.fp8``.

The kernel serves every quantizer under an amax that is given: strides say what is transposed, and
whether there is one amax or one for each row.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lpcompile.ops import amax_tensor, blocks, fp8, turned
from lpcompile.ops.define import ALIGN, cdiv, define, next_power_of_2, round_up, same_bits
from lpcompile.ops.launcher import cached


def outputs(x: Tensor, amax: Tensor, element: torch.dtype, pow2: bool) -> tuple[Tensor, Tensor]:
    values = x.new_empty((*x.shape[:-1], round_up(x.shape[-1], ALIGN)), dtype=element)
    return values, x.new_empty(x.shape[:-2] or (1,), dtype=torch.float32)


def reference(x: Tensor, amax: Tensor, element: torch.dtype, pow2: bool) -> tuple[Tensor, Tensor]:
    scale = fp8.encode_scale(amax, element, pow2)
    values = fp8.cast(x, scale if x.dim() == 2 else scale[:, None, None], element)
    return fp8.pad_columns(values, round_up(x.shape[-1], ALIGN)), fp8.decode_scale(scale)


@cached
@triton.jit
def kernel(
    x_ptr,
    amax_ptr,
    values_ptr,
    scales_ptr,
    R: tl.int32,
    C: tl.int32,
    CP,
    stride_e,
    stride_r,
    stride_c,
    PER_ROW: tl.constexpr,  # one amax for each row
    LIMIT: tl.constexpr,
    POW2: tl.constexpr,
    ELEMENT: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    RUN: tl.constexpr,
    EVEN: tl.constexpr,
):
    e = tl.program_id(1).to(tl.int64)
    x_ptr += e * stride_e
    # Along the dimension that is adjacent in memory first.
    tile = tl.program_id(0)
    if RUN == 1:
        across, down = tile % tl.cdiv(CP, BC), tile // tl.cdiv(CP, BC)
    else:
        across, down = tile // tl.cdiv(R, BR), tile % tl.cdiv(R, BR)
    r = down * BR + tl.arange(0, BR)
    c = across * BC + tl.arange(0, BC)
    x = turned.load(x_ptr, r, across * BC, R, C, stride_r, stride_c, BC, RUN, EVEN)
    if PER_ROW:
        of = e * R + r
        scale = fp8.encode(turned.read(amax_ptr + of, r < R, EVEN), LIMIT, POW2)
        scaled = x.to(tl.float32) * scale[:, None]
    else:
        of = e + tl.zeros_like(r)
        scale = fp8.encode(tl.load(amax_ptr + e), LIMIT, POW2)
        scaled = x.to(tl.float32) * scale
        scale = scale + tl.zeros([BR], tl.float32)
    if not EVEN:  # padding stays zero under a NaN scale too
        scaled = tl.where((r < R)[:, None] & (c < C)[None, :], scaled, 0.0)
    at = values_ptr + (e * R + r)[:, None] * CP + c[None, :]
    live = (r < R)[:, None] & (c < CP)[None, :]
    turned.write(at, fp8.narrow(scaled, ELEMENT), live, EVEN)
    if across == 0:
        tl.store(scales_ptr + of, fp8.decode(scale, POW2), mask=r < R)


def fill(
    x: Tensor, amax: Tensor, made: tuple[Tensor, Tensor], element: torch.dtype, pow2: bool
) -> tuple[Tensor, Tensor]:
    """Run the kernel on x[..., R, C], whatever its strides, under one amax, or one for each row."""
    values, scales = made
    x = fp8.stack(x)
    (E, R, C), CP = x.shape, values.shape[-1]
    if blocks.is_turned(x):
        BR, BC, run, warps = 64, 128, 8, 4
    else:
        # 256 columns if that divides them: of 1408, 11 times 128, they took half as long again.
        widths = [BC for BC in (256, 128, 64) if CP % BC == 0]
        BC = max(widths, default=min(next_power_of_2(CP), 256))
        BR, run, warps = 4096 // BC, 1, 4
    kernel[(cdiv(CP, BC) * cdiv(R, BR), E)](
        x, amax, values, scales, R, C, CP, *x.stride(), scales.numel() == E * R,
        fp8.MAX[element], pow2, fp8.TRITON[element], BR, BC, run,
        R % BR == 0 and C % BC == 0, num_warps=warps,
    )  # fmt: skip
    return made


def launch(x: Tensor, amax: Tensor, element: torch.dtype, pow2: bool) -> tuple[Tensor, Tensor]:
    if not fp8.runs_triton(x) or not x.numel():
        return reference(x, amax, element, pow2)
    return fill(x, amax, outputs(x, amax, element, pow2), element, pow2)


op = define(
    "quantize_fp8_tensor(Tensor x, Tensor amax, ScalarType element, bool pow2) -> (Tensor, Tensor)",
    outputs=outputs,
    reference=reference,
    launch=launch,
)
agrees = same_bits


def samples(device: str) -> list[tuple[Any, ...]]:
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    x = torch.randn(64, 96, device=device, dtype=torch.bfloat16)
    odd = torch.randn(37, 203, device=device, dtype=torch.bfloat16)
    bad = x.clone()
    bad[3, 5], bad[60, 1] = torch.inf, torch.nan
    experts = torch.stack([odd, odd * 3, odd * 0])
    inputs = [x, x.t(), odd, odd[1:, 1:].t(), x[:0], x[:1], odd[:, :1], x * 0, x * 1e-38, x * 1e36]
    inputs += [experts, experts.mT, experts[::2], torch.stack([x, bad])]
    cases = [
        (x, amax_tensor.reference(x), element, pow2)
        for x in inputs
        for element, pow2 in ((e4m3, False), (e5m2, False), (e4m3, True))
    ]
    nan, small = (torch.tensor([a], device=device) for a in (torch.nan, 0.25))
    return [*cases, (bad, nan, e4m3, False), (odd, nan, e4m3, True), (odd, small, e5m2, False)]
