"""Quantize to FP8 under one given amax: x[R, C] bf16 -> values[R, Cp] e4m3 or e5m2, scale[1].

Of x[E, R, C], an expert weight, under amax[E]: values[E, R, Cp] and scale[E].
Cp is C rounded up to 16, and the padding is zero: FP8 GEMMs read rows that start at multiples of
16 bytes. The amax comes from ``amax_tensor``. Arithmetic: ``lpcompile.ops.fp8``.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lpcompile.ops import amax_tensor, fp8
from lpcompile.ops.define import ALIGN, define, round_up, same_bits


def outputs(x: Tensor, amax: Tensor, element: torch.dtype, pow2: bool) -> tuple[Tensor, Tensor]:
    values = x.new_empty((*x.shape[:-1], round_up(x.shape[-1], ALIGN)), dtype=element)
    return values, x.new_empty(x.shape[:-2] or (1,), dtype=torch.float32)


def reference(x: Tensor, amax: Tensor, element: torch.dtype, pow2: bool) -> tuple[Tensor, Tensor]:
    scale = fp8.encode_scale(amax, element, pow2)
    values = fp8.cast(x, scale if x.dim() == 2 else scale[:, None, None], element)
    return fp8.pad_columns(values, round_up(x.shape[-1], ALIGN)), fp8.decode_scale(scale)


@triton.jit
def kernel(
    x_ptr,
    amax_ptr,
    values_ptr,
    scale_ptr,
    R,
    C,
    CP,
    stride_e,
    stride_r,
    stride_c,
    LIMIT: tl.constexpr,
    POW2: tl.constexpr,
    ELEMENT: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    e = tl.program_id(2).to(tl.int64)
    x_ptr += e * stride_e
    values_ptr += e * R * CP
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    scale = fp8.encode(tl.load(amax_ptr + e), LIMIT, POW2)
    at = r[:, None].to(tl.int64) * stride_r + c[None, :].to(tl.int64) * stride_c
    live = (r < R)[:, None] & (c < C)[None, :]
    x = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
    # Padding stays zero under a NaN scale too.
    values = fp8.narrow(tl.where(live, x * scale, 0.0), ELEMENT)
    out = r[:, None].to(tl.int64) * CP + c[None, :]
    tl.store(values_ptr + out, values, mask=(r < R)[:, None] & (c < CP)[None, :])
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(scale_ptr + e, fp8.decode(scale))


def launch(x: Tensor, amax: Tensor, element: torch.dtype, pow2: bool) -> tuple[Tensor, Tensor]:
    if not fp8.runs_triton(x) or not x.numel():
        return reference(x, amax, element, pow2)
    values, scale = outputs(x, amax, element, pow2)
    x = fp8.stack(x)
    (E, R, C), CP = x.shape, values.shape[-1]
    if x.stride(1) == 1 and x.stride(2) != 1:  # a transposed view: tiles, to read along columns
        BR, BC = 64, 64
    else:
        BC = min(triton.next_power_of_2(CP), 1024)
        BR = 4096 // BC
    kernel[(triton.cdiv(CP, BC), triton.cdiv(R, BR), E)](
        x, amax, values, scale, R, C, CP, *x.stride(),
        fp8.MAX[element], pow2, fp8.TRITON[element], BR, BC, num_warps=4,
    )  # fmt: skip
    return values, scale


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
    inputs = [x, x.t(), odd, odd[1:, 1:].t(), x[:0], x * 0, x * 1e-38, x * 1e36]
    inputs += [experts, experts.mT, experts[::2], torch.stack([x, bad])]
    cases = [
        (x, amax_tensor.reference(x), element, pow2)
        for x in inputs
        for element, pow2 in ((e4m3, False), (e5m2, False), (e4m3, True))
    ]
    nan, small = (torch.tensor([a], device=device) for a in (torch.nan, 0.25))
    return [*cases, (bad, nan, e4m3, False), (odd, nan, e4m3, True), (odd, small, e5m2, False)]
