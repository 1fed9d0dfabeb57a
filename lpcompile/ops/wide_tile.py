"""Narrow a tile in registers to MXFP8 or NVFP4 and widen it again: what ``dequantize`` makes of it.

A tile x[BR, BC] bf16 has a scale for every DOWN x ACROSS elements: 1 x 32 along its rows, 32 x 1
along its columns, 32 x 32 of a square, as it lies in memory. Nothing is turned.
Arithmetic: ``lpcompile.ops.mx`` and ``lpcompile.ops.fp4``.
"""

import triton
import triton.language as tl

from lpcompile.ops import fp4, fp4_codes, fp8, hadamard, mx, turned
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
    DOWN: tl.constexpr, ACROSS: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """x[BR, BC] bf16, of e4m3 under e8m0 scales -> bits of bf16, int16."""
    enc, dec = mx.scales(amax(x, DOWN, ACROSS), LIMIT, EXPONENT, FLOOR)
    narrow = fp8.narrow(times(x.to(tl.float32), enc, DOWN, ACROSS), tl.float8e4nv)
    return turned.bits(times(narrow.to(tl.float32), dec, DOWN, ACROSS), NATIVE)


@triton.jit
def up(a, b, c):
    """a * b + c of fp32 tiles, rounded up."""
    return tl.inline_asm_elementwise(
        "fma.rp.f32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c],
        dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def rounded(v, index, k: tl.constexpr, seed, draw, STOCHASTIC: tl.constexpr):
    """v[...] fp32 -> the magnitude of what its e2m1 code stands for, fp32.

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
    return tl.fma(power, -6291456.0, above)


@triton.jit
def sign_mask(s):
    """s fp32, scales of blocks -> what of a bf16 number under each is its sign, int16.

    Nothing under a NaN, which torch writes without one.
    """
    return tl.where(s == s, -0x8000, 0).to(tl.int16)


@triton.jit
def signed_bits(a, x, mask, PAIRS: tl.constexpr):
    """Magnitudes a[...] fp32 and numbers x bf16 -> ``turned.bits`` of a with the signs of x."""
    if PAIRS:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 both, nan;
            cvt.rn.bf16x2.f32 both, $2, $1;
            mov.b32 nan, 0x7FC07FC0;
            lop3.b32 both, both, $3, $4, 0xF8;
            min.s16x2 $0, both, nan;
            }""",
            "=r,r,r,r,r", [a, x, mask], dtype=tl.int16, is_pure=True, pack=2,
        )  # fmt: skip
    return turned.bits(a, False) | (x.to(tl.int16, bitcast=True) & mask)


@triton.jit
def nvfp4(
    x, tensor_amax, index, seed, draw, STOCHASTIC: tl.constexpr,
    DOWN: tl.constexpr, ACROSS: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """x[BR, BC] bf16, of e2m1 under e4m3 scales under the tensor's, without it -> bits of bf16.

    index[BR, BC]: the logical element of each, uint32 or int64; index[BR, BC / 8], of the first of
    eight that follow each other.
    """
    BR: tl.constexpr = x.shape[0]
    BC: tl.constexpr = x.shape[1]
    tensor = fp4.tile_tensor_scale(tensor_amax)
    s = fp4.tile_block_scale(amax(x, DOWN, ACROSS), tensor)
    v = times(x.to(tl.float32), fp4.tile_encode_scale(s, tensor), DOWN, ACROSS)
    if STOCHASTIC and index.shape[1] != BC:
        parts = fp4_codes.eighths(v)
        made = ()
        for k in tl.static_range(8):
            one = rounded(parts[k], index, k, seed, draw, True)
            made = made + (one,)  # type: ignore[assignment]
        made = turned.joined(turned.joined(turned.joined(made, 4), 2), 1)
        a = tl.reshape(made[0], (BR, BC))
    else:
        a = rounded(v, index, 0, seed, draw, STOCHASTIC)
    mask = spread(sign_mask(s), BR, BC, DOWN, ACROSS)
    return signed_bits(times(a, s, DOWN, ACROSS), x, mask, NATIVE)


@triton.jit
def spread(s, BR: tl.constexpr, BC: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr):
    """s[BR / DOWN, BC / ACROSS] of each block -> [BR, BC]."""
    s = tl.expand_dims(tl.expand_dims(s, 2), 1)
    return tl.reshape(tl.broadcast_to(s, (BR // DOWN, DOWN, BC // ACROSS, ACROSS)), (BR, BC))


@triton.jit
def store_transformed(
    ptr, rows, tensor_amax, index, seed, draw, STOCHASTIC: tl.constexpr, m, stop, c, C,
    NATIVE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """``nvfp4`` of runs of 16 rows that are a tuple rows[k][BN, BC] fp32, stored.

    Row k of a run goes to row m[BN] + k, if that is before ``stop``; its index is ``index`` + k.
    """
    rows = hadamard.narrowed(rows)
    tensor = fp4.tile_tensor_scale(tensor_amax)
    s = fp4.tile_block_scale(turned.amax(rows), tensor)
    enc = fp4.tile_encode_scale(s, tensor)
    mask = sign_mask(s)
    at = ptr + (m[:, None].to(tl.int64) * C + c[None, :])
    for k in tl.static_range(16):
        v = turned.widened(rows[k]) * enc
        wide = rounded(v, index, k, seed, draw, STOCHASTIC) * s
        here = (stop - m > k)[:, None] & (c < C)[None, :]
        turned.write(at, signed_bits(wide, rows[k], mask, NATIVE), here, EVEN)
        at += C


@triton.jit
def store(ptr, bits, m, here, c, C, EVEN: tl.constexpr):
    """bits[BR, BC] int16 of bf16 numbers, at rows m and columns c of C.

    here: which rows there are.
    """
    at = m[:, None].to(tl.int64) * C + c[None, :]
    turned.write(ptr + at, bits, here[:, None] & (c < C)[None, :], EVEN)
