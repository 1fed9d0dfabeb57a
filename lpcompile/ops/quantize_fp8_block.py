"""Quantize to FP8 with a scale per 1x128: x[R, C] bf16 -> values[R, Cp] e4m3, scales[R, C / 128].

Cp is C rounded up to 16, and the padding is zero; a last block may be short. Rows of the scales are
adjacent in memory, as cuBLASLt reads them. Of x[E, R, C], an expert weight, values[E, R, Cp] and
scales[E, R, C / 128]. Arithmetic: ``lpcompile.ops.fp8``; blocks of 1x128 and 128x128: DeepSeek-V3,
arXiv 2412.19437, section 3.3.

The kernel serves the four block quantizers: strides say what is transposed, SQUARE what shares.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lpcompile.ops import amax_column, fp8
from lpcompile.ops.define import ALIGN, define, round_up, same_bits

BLOCK = 128


def outputs(x: Tensor, element: torch.dtype, pow2: bool) -> tuple[Tensor, Tensor]:
    *experts, R, C = x.shape
    values = x.new_empty((*experts, R, round_up(C, ALIGN)), dtype=element)
    blocks = (*experts, round_up(C, BLOCK) // BLOCK, R)
    return values, x.new_empty(blocks, dtype=torch.float32).mT


def reference(x: Tensor, element: torch.dtype, pow2: bool) -> tuple[Tensor, Tensor]:
    values, scales = by_blocks(x, 1, element, pow2)
    return values, outputs(x, element, pow2)[1].copy_(scales)


def by_blocks(x: Tensor, rows: int, element: torch.dtype, pow2: bool) -> tuple[Tensor, Tensor]:
    """x[..., R, C], a scale per (rows, 128): values[..., R, Cp], scales[..., R / rows, C / 128]."""
    *experts, R, C = x.shape
    whole = x.new_zeros((*experts, round_up(R, rows), round_up(C, BLOCK)))
    whole[..., :R, :C] = x
    blocks = whole.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, rows))  # [R / rows, rows, n, 128]
    if x.numel():
        amax = blocks.abs().amax((-3, -1)).float()  # [R / rows, n]
    else:
        amax = whole.new_zeros((*experts, blocks.shape[-4], blocks.shape[-2])).float()
    scale = fp8.encode_scale(amax, element, pow2)
    values = fp8.cast(blocks, scale[..., None, :, None], element).flatten(-2).flatten(-3, -2)
    return fp8.pad_columns(values[..., :R, :C], round_up(C, ALIGN)), fp8.decode_scale(scale)


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
    scales_stride_e,
    scales_stride_r,
    scales_stride_c,
    LIMIT: tl.constexpr,
    POW2: tl.constexpr,
    ELEMENT: tl.constexpr,
    SQUARE: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    e = tl.program_id(2).to(tl.int64)
    x_ptr += e * stride_e
    values_ptr += e * R * CP
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    at = r[:, None].to(tl.int64) * stride_r + c[None, :].to(tl.int64) * stride_c
    live = (r < R)[:, None] & (c < C)[None, :]
    x = tl.load(x_ptr + at, mask=live, other=0.0)
    bits = tl.max(fp8.abs_bits(x), axis=1)  # [BR]
    if SQUARE:
        bits = tl.zeros_like(bits) + tl.max(bits, axis=0)
    scale = fp8.encode(fp8.amax_of_bits(bits), LIMIT, POW2)
    scaled = tl.where(live, x.to(tl.float32) * scale[:, None], 0.0)
    values = fp8.narrow(scaled, ELEMENT)
    out = r[:, None].to(tl.int64) * CP + c[None, :]
    tl.store(values_ptr + out, values, mask=(r < R)[:, None] & (c < CP)[None, :])
    row = tl.program_id(1) + tl.zeros_like(r) if SQUARE else r  # every lane writes a square's
    to = e * scales_stride_e + row * scales_stride_r
    to += tl.program_id(0).to(tl.int64) * scales_stride_c
    tl.store(scales_ptr + to, fp8.decode(scale), mask=r < R)


def fill(
    x: Tensor, made: tuple[Tensor, Tensor], element: torch.dtype, pow2: bool, square: bool
) -> tuple[Tensor, Tensor]:
    """Run the kernel on x[R, C] or x[E, R, C], whatever its strides, into ``made``."""
    values, scales = made
    x = fp8.stack(x)
    (E, R, C), CP = x.shape, values.shape[-1]
    BR = BLOCK if square else 32
    kernel[(triton.cdiv(C, BLOCK), triton.cdiv(R, BR), E)](
        x, values, scales, R, C, CP, *x.stride(), *fp8.stack(scales).stride(),
        fp8.MAX[element], pow2, fp8.TRITON[element], square, BR, BLOCK,
        num_warps=8 if square else 4,
    )  # fmt: skip
    return made


def launch(x: Tensor, element: torch.dtype, pow2: bool) -> tuple[Tensor, Tensor]:
    if not fp8.runs_triton(x) or not x.numel():
        return reference(x, element, pow2)
    return fill(x, outputs(x, element, pow2), element, pow2, square=False)


op = define(
    "quantize_fp8_block(Tensor x, ScalarType element, bool pow2) -> (Tensor, Tensor)",
    outputs=outputs,
    reference=reference,
    launch=launch,
)
agrees = same_bits


def samples(device: str) -> list[tuple[Any, ...]]:
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    large = torch.randn(256, 384, device=device, dtype=torch.bfloat16)
    inputs = [large, large.t(), large * 1e-38, large * 1e36]
    return [
        (x, element, pow2)
        for x in (*inputs, *(args[0] for args in amax_column.samples(device)))
        for element, pow2 in ((e4m3, False), (e5m2, False), (e4m3, True))
    ]
