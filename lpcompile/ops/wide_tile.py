"""Narrow a tile in registers to MXFP8 or NVFP4 and widen it again: what ``dequantize`` makes of it.

A tile x[BR, BC] bf16 has a scale for every DOWN x ACROSS elements: 1 x 32 along its rows, 32 x 1
along its columns, 32 x 32 of a square, as it lies in memory. Nothing is turned.
Arithmetic: ``lpcompile.ops.mx`` and ``lpcompile.ops.fp4``.
"""

import triton
import triton.language as tl

from lpcompile.ops import fp4, fp8, group_tile, mx, pointwise, turned
from lpcompile.ops.philox import tile_words


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
    enc, dec = mx.scales(amax(x, DOWN, ACROSS), LIMIT, EXPONENT, FLOOR)
    narrow = fp8.narrow(times(x.to(tl.float32), enc, DOWN, ACROSS), tl.float8e4nv)
    return times(narrow.to(tl.float32), dec, DOWN, ACROSS)


@triton.jit
def up(a, b, c):
    """a * b + c of fp32 tiles, rounded up."""
    return tl.inline_asm_elementwise(
        "fma.rp.f32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c],
        dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def rounded(v, index, k: tl.constexpr, seed, draw, STOCHASTIC: tl.constexpr):
    """v[...] fp32 -> what its e2m1 code stands for, fp32.

    index[...] + k: the logical element of each, uint32 or int64.

    Grid points are p / 2 apart, p the power of two at or below |v|, at least 1: a number below
    2^22 p is rounded to them as 1.5 * 2^22 p is added. Stochastically, |v| - u * p / 2 is rounded
    up to one: first to an fp32, which passes no grid point for they are fp32 too, then to that.
    The minimum drops NaN, and so makes it 6.
    """
    a = tl.minimum(tl.abs(v), 6.0)
    power = tl.maximum(a.to(tl.int32, bitcast=True) & 0x7F800000, 0x3F800000)
    power = power.to(tl.float32, bitcast=True)
    if STOCHASTIC:
        u = (tile_words(seed, draw, index, k) >> 8).to(tl.float32)
        above = up(power, 6291456.0, up(u, power * -(2.0**-25), a))
    else:
        above = tl.fma(power, 6291456.0, a)
    made = tl.fma(power, -6291456.0, above)
    sign = v.to(tl.uint32, bitcast=True) & 0x80000000
    return (made.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)


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
    return times(rounded(v, index, 0, seed, draw, STOCHASTIC), s.to(tl.float32), DOWN, ACROSS)


@triton.jit
def store_transformed(
    ptr, rows, tensor_amax, index, seed, draw, STOCHASTIC: tl.constexpr, m, stop, c, C,
    NATIVE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """``nvfp4`` of runs of 16 rows that are a tuple rows[k][BN, BC] fp32, stored.

    Row k of a run goes to row m[BN] + k, if that is before ``stop``; its index is ``index`` + k.
    """
    tensor = fp4.tile_tensor_scale(tensor_amax)
    s = fp4.tile_block_scale(group_tile.amax(rows), tensor)
    enc = fp4.tile_encode_scale(s, tensor)
    for k in tl.static_range(16):
        v = pointwise.rounded(rows[k]) * enc
        wide = rounded(v, index, k, seed, draw, STOCHASTIC) * s.to(tl.float32)
        store(ptr, wide, m + k, m + k < stop, c, C, NATIVE, EVEN)


@triton.jit
def store(ptr, x, m, here, c, C, NATIVE: tl.constexpr, EVEN: tl.constexpr):
    """x[BR, BC] fp32 as bf16, with the one NaN that torch writes, at rows m and columns c of C.

    here: which rows there are. ptr: int16, of the bits. NATIVE: two at a time, as Hopper can.
    """
    bits = turned.bits(x, NATIVE)
    at = m[:, None].to(tl.int64) * C + c[None, :]
    turned.write(ptr + at, bits, here[:, None] & (c < C)[None, :], EVEN)
