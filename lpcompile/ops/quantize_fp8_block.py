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

from lpcompile.ops import amax_column, blocks, fp8, turned
from lpcompile.ops.define import ALIGN, cdiv, define, round_up, same_bits
from lpcompile.ops.launcher import cached

BLOCK = 128


def outputs(x: Tensor, element: torch.dtype, pow2: bool) -> tuple[Tensor, Tensor]:
    *experts, R, C = x.shape
    values = x.new_empty((*experts, R, round_up(C, ALIGN)), dtype=element)
    shape = (*experts, round_up(C, BLOCK) // BLOCK, R)
    return values, x.new_empty(shape, dtype=torch.float32).mT


def reference(x: Tensor, element: torch.dtype, pow2: bool) -> tuple[Tensor, Tensor]:
    values, scales = by_blocks(x, 1, element, pow2)
    return values, outputs(x, element, pow2)[1].copy_(scales)


def by_blocks(x: Tensor, rows: int, element: torch.dtype, pow2: bool) -> tuple[Tensor, Tensor]:
    """x[..., R, C], a scale per (rows, 128): values[..., R, Cp], scales[..., R / rows, C / 128]."""
    *experts, R, C = x.shape
    whole = x.new_zeros((*experts, round_up(R, rows), round_up(C, BLOCK)))
    whole[..., :R, :C] = x
    cut = whole.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, rows))  # [R / rows, rows, n, 128]
    if x.numel():
        amax = cut.abs().amax((-3, -1)).float()  # [R / rows, n]
    else:
        amax = whole.new_zeros((*experts, cut.shape[-4], cut.shape[-2])).float()
    scale = fp8.encode_scale(amax, element, pow2)
    values = fp8.cast(cut, scale[..., None, :, None], element).flatten(-2).flatten(-3, -2)
    return fp8.pad_columns(values[..., :R, :C], round_up(C, ALIGN)), fp8.decode_scale(scale)


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
    scales_stride_e,
    scales_stride_r,
    scales_stride_c,
    LIMIT: tl.constexpr,
    POW2: tl.constexpr,
    ELEMENT: tl.constexpr,
    SQUARE: tl.constexpr,
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
        across, down = tile % tl.cdiv(C, BC), tile // tl.cdiv(C, BC)
    else:
        across, down = tile // tl.cdiv(R, BR), tile % tl.cdiv(R, BR)
    r = down * BR + tl.arange(0, BR)
    c = across * BC + tl.arange(0, BC)
    x = turned.load(x_ptr, r, across * BC, R, C, stride_r, stride_c, BC, RUN, EVEN)
    amax = fp8.amax(x, 1)  # [BR]
    if SQUARE:
        amax = tl.zeros_like(amax) + fp8.amax(amax, 0)
    scale = fp8.encode(amax, LIMIT, POW2)
    scaled = x.to(tl.float32) * scale[:, None]
    if not EVEN:  # padding stays zero under a NaN scale too
        scaled = tl.where((r < R)[:, None] & (c < C)[None, :], scaled, 0.0)
    at = values_ptr + (e * R + r)[:, None] * CP + c[None, :]
    live = (r < R)[:, None] & (c < CP)[None, :]
    turned.write(at, fp8.narrow(scaled, ELEMENT), live, EVEN)
    row = down + tl.zeros_like(r) if SQUARE else r  # every lane writes a square's
    to = e * scales_stride_e + row * scales_stride_r + across.to(tl.int64) * scales_stride_c
    tl.store(scales_ptr + to, fp8.decode(scale, POW2), mask=r < R)


# (transposed, shared by rows) -> BR, RUN, warps
TILES = {
    (False, False): (32, 1, 4),
    (False, True): (BLOCK, 1, 8),
    (True, False): (64, 16, 4),
    (True, True): (BLOCK, 32, 8),
}


def fill(
    x: Tensor, made: tuple[Tensor, Tensor], element: torch.dtype, pow2: bool, square: bool
) -> tuple[Tensor, Tensor]:
    """Run the kernel on x[R, C] or x[E, R, C], whatever its strides, into ``made``."""
    values, scales = made
    x = fp8.stack(x)
    (E, R, C), CP = x.shape, values.shape[-1]
    BR, run, warps = TILES[blocks.is_turned(x), square]
    kernel[(cdiv(C, BLOCK) * cdiv(R, BR), E)](
        x, values, scales, R, C, CP, *x.stride(), *fp8.stack(scales).stride(),
        fp8.MAX[element], pow2, fp8.TRITON[element], square, BR, BLOCK, run,
        R % BR == 0 and C % BLOCK == 0, num_warps=warps,
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
