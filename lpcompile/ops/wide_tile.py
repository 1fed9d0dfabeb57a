"""Narrow a tile in registers to MXFP8 or NVFP4 and widen it again: what ``dequantize`` makes of it.

A tile x[BR, BC] bf16 has a scale for every DOWN x ACROSS elements: 1 x 32 along its rows, 32 x 1
along its columns, 32 x 32 of a square, as it lies in memory. Nothing is turned.
Arithmetic: ``lpcompile.ops.mx`` and ``lpcompile.ops.fp4``.
"""

import triton
import triton.language as tl

from lpcompile.ops import fp4, fp8, group_tile, mx, turned


@triton.jit
def amax(x, DOWN: tl.constexpr, ACROSS: tl.constexpr):
    """x[BR, BC] -> the largest magnitude of every block [BR / DOWN, BC / ACROSS], fp32."""
    BR: tl.constexpr = x.shape[0]
    BC: tl.constexpr = x.shape[1]
    best = tl.abs(x.to(tl.float32))
    if ACROSS > 1:
        best = fp8.amax(tl.reshape(best, (BR, BC // ACROSS, ACROSS)), 2)
    if DOWN > 1:
        best = fp8.amax(tl.reshape(best, (BR // DOWN, DOWN, BC // ACROSS)), 1)
    return best


@triton.jit
def times(x, scale, DOWN: tl.constexpr, ACROSS: tl.constexpr):
    """x[BR, BC] fp32 times the scale[BR / DOWN, BC / ACROSS] of each block."""
    BR: tl.constexpr = x.shape[0]
    BC: tl.constexpr = x.shape[1]
    cut = tl.reshape(x, (BR // DOWN, DOWN, BC // ACROSS, ACROSS))
    cut *= tl.expand_dims(tl.expand_dims(scale, 2), 1)
    return tl.reshape(cut, (BR, BC))


@triton.jit
def mxfp8(
    x, LIMIT: tl.constexpr, EXPONENT: tl.constexpr, FLOOR: tl.constexpr,
    DOWN: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """x[BR, BC] bf16, of e4m3 under e8m0 scales -> fp32."""
    byte = mx.encode(amax(x, DOWN, ACROSS), LIMIT, EXPONENT, FLOOR, False)
    scaled = times(x.to(tl.float32), mx.encoding(byte), DOWN, ACROSS)
    narrow = fp8.narrow(scaled, tl.float8e4nv).to(tl.float32)
    return times(narrow, mx.decoding(byte), DOWN, ACROSS)


@triton.jit
def nvfp4(
    x, tensor_amax, index, seed, draw, STOCHASTIC: tl.constexpr,
    DOWN: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """x[BR, BC] bf16, of e2m1 under e4m3 scales under the tensor's, without it -> fp32.

    index[BR, BC]: the logical element of each, uint32 or int64.
    """
    tensor = fp4.tile_tensor_scale(tensor_amax)
    s = fp4.tile_block_scale(amax(x, DOWN, ACROSS), tensor)
    v = times(x.to(tl.float32), fp4.tile_encode_scale(s, tensor), DOWN, ACROSS)
    rounded = fp4.tile_rounded(v, index, seed, draw, STOCHASTIC)
    return times(rounded, s.to(tl.float32), DOWN, ACROSS)


@triton.jit
def store_transformed(
    ptr, rows, tensor_amax, index, seed, draw, STOCHASTIC: tl.constexpr, m, full, stop, c, C,
    EVEN: tl.constexpr,
):  # fmt: skip
    """``nvfp4`` of runs of 16 rows that are a tuple rows[k][BN, BC] fp32, stored.

    Row k of a run goes to row m[BN] + k, if that is before ``stop``; its index is ``index`` + k.
    From ``full`` on it is zero, under a NaN scale too.
    """
    tensor = fp4.tile_tensor_scale(tensor_amax)
    s = fp4.tile_block_scale(group_tile.amax(rows), tensor)
    enc = fp4.tile_encode_scale(s, tensor)
    for k in tl.static_range(16):
        v = rows[k].to(tl.bfloat16).to(tl.float32) * enc
        rounded = fp4.tile_rounded(v, index + k, seed, draw, STOCHASTIC)
        wide = rounded * s.to(tl.float32)
        if not EVEN:
            wide = tl.where((m + k < full)[:, None], wide, 0.0)
        store(ptr, wide, m + k, m + k < stop, c, C, EVEN)


@triton.jit
def store(ptr, x, m, here, c, C, EVEN: tl.constexpr):
    """x[BR, BC] fp32 as bf16, with the one NaN that torch writes, at rows m and columns c of C.

    here: which rows there are. ptr: int16, of the bits.
    """
    bits = x.to(tl.bfloat16).to(tl.int16, bitcast=True)
    bits = tl.where(x == x, bits, 0x7FC0)
    at = m[:, None].to(tl.int64) * C + c[None, :]
    turned.write(ptr + at, bits, here[:, None] & (c < C)[None, :], EVEN)
