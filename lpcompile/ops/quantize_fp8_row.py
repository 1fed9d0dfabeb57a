"""Quantize to FP8 with a scale per row: x[R, C] bf16 -> values[R, Cp] e4m3 or e5m2, scales[R].

Of x[E, R, C], an expert weight, values[E, R, Cp] and scales[E, R].
Cp is C rounded up to 16, and the padding is zero. Arithmetic: ``lpcompile.ops.fp8``. Rows of up to
32768 elements stay in registers, so that x is read once.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lpcompile.ops import fp8
from lpcompile.ops.define import ALIGN, define, round_up, same_bits


def outputs(x: Tensor, element: torch.dtype, pow2: bool) -> tuple[Tensor, Tensor]:
    values = x.new_empty((*x.shape[:-1], round_up(x.shape[-1], ALIGN)), dtype=element)
    return values, x.new_empty(x.shape[:-1], dtype=torch.float32)


def reference(x: Tensor, element: torch.dtype, pow2: bool) -> tuple[Tensor, Tensor]:
    amax = x.abs().amax(-1).float() if x.shape[-1] else x.new_zeros(x.shape[:-1]).float()
    scale = fp8.encode_scale(amax, element, pow2)
    columns = round_up(x.shape[-1], ALIGN)
    values = fp8.cast(x, scale[..., None], element)
    return fp8.pad_columns(values, columns), fp8.decode_scale(scale)


@triton.jit
def kernel(
    x_ptr,
    values_ptr,
    scales_ptr,
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
    ONE_READ: tl.constexpr,
):
    e = tl.program_id(1).to(tl.int64)
    x_ptr += e * stride_e
    values_ptr += e * R * CP
    scales_ptr += e * R
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    at = x_ptr + r[:, None].to(tl.int64) * stride_r
    out = values_ptr + r[:, None].to(tl.int64) * CP
    if ONE_READ:
        c = tl.arange(0, BC)
        live = (r < R)[:, None] & (c < C)[None, :]
        x = tl.load(at + c[None, :].to(tl.int64) * stride_c, mask=live, other=0.0)
        amax = fp8.amax_of_bits(tl.max(fp8.abs_bits(x), axis=1))
        scale = fp8.encode(amax, LIMIT, POW2)
        scaled = tl.where(live, x.to(tl.float32) * scale[:, None], 0.0)
        values = fp8.narrow(scaled, ELEMENT)
        tl.store(out + c[None, :], values, mask=(r < R)[:, None] & (c < CP)[None, :])
    else:
        best = tl.zeros([BR, BC], tl.int32)
        for start in range(0, C, BC):
            c = start + tl.arange(0, BC)
            live = (r < R)[:, None] & (c < C)[None, :]
            x = tl.load(at + c[None, :].to(tl.int64) * stride_c, mask=live, other=0.0)
            best = tl.maximum(best, fp8.abs_bits(x))
        scale = fp8.encode(fp8.amax_of_bits(tl.max(best, axis=1)), LIMIT, POW2)
        for start in range(0, CP, BC):
            c = start + tl.arange(0, BC)
            live = (r < R)[:, None] & (c < C)[None, :]
            x = tl.load(at + c[None, :].to(tl.int64) * stride_c, mask=live, other=0.0)
            scaled = tl.where(live, x.to(tl.float32) * scale[:, None], 0.0)
            values = fp8.narrow(scaled, ELEMENT)
            tl.store(out + c[None, :], values, mask=(r < R)[:, None] & (c < CP)[None, :])
    tl.store(scales_ptr + r, fp8.decode(scale), mask=r < R)


def launch(x: Tensor, element: torch.dtype, pow2: bool) -> tuple[Tensor, Tensor]:
    if not fp8.runs_triton(x) or not x.numel():
        return reference(x, element, pow2)
    values, scales = outputs(x, element, pow2)
    experts = fp8.stack(x)
    (E, R, C), CP = experts.shape, values.shape[-1]
    whole = triton.next_power_of_2(CP)
    if x.stride(-2) == 1 and x.stride(-1) != 1:  # a transposed view: many rows, to read along them
        BR, BC, one_read, warps = 64, 64, whole <= 64, 4
    elif whole <= 32768:
        BR, BC, one_read = max(1, 1024 // whole), whole, True
        warps = min(16, max(4, whole // 1024))
    else:
        BR, BC, one_read, warps = 1, 8192, False, 8
    kernel[(triton.cdiv(R, BR), E)](
        experts, values, scales, R, C, CP, *experts.stride(),
        fp8.MAX[element], pow2, fp8.TRITON[element], BR, BC, one_read, num_warps=warps,
    )  # fmt: skip
    return values, scales


op = define(
    "quantize_fp8_row(Tensor x, ScalarType element, bool pow2) -> (Tensor, Tensor)",
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
    inputs = [x, x.t(), odd, odd[1:, 1:].t(), wide, x[:0], x[:1], x * 0, x * 1e-38, x * 1e36, bad]
    experts = torch.randn(3, 41, 83, device=device, dtype=torch.bfloat16)
    return [
        (x, element, pow2)
        for x in (*inputs, experts, experts.mT, torch.stack([x, bad]))
        for element, pow2 in ((e4m3, False), (e5m2, False), (e4m3, True))
    ]
