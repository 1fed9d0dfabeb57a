"""Narrow a tile that a fused kernel has in registers to MXFP8 or NVFP4, and store it.

A tile x[BR, BW] bf16 stands in its operand [R, C] at rows ``row[BR]`` and columns ``first[BR]`` on,
so that a tile may be runs of a transpose: 16 or 32 rows of what is read, one register each, are the
elements of one block, and neither a transpose nor a reduction crosses threads.
Arithmetic: ``lpcompile.ops.mx`` and ``lpcompile.ops.fp4``.
"""

import triton
import triton.language as tl

from lpcompile.ops import blocks, fp4, fp8, mx, swizzle
from lpcompile.ops.hadamard import joined


@triton.jit
def run_rows(run, c):
    """Runs [BN] of columns [BC] -> row and first column in the transpose, [BN * BC] each."""
    BN: tl.constexpr = run.shape[0]
    BC: tl.constexpr = c.shape[0]
    zeros = tl.zeros([BN, BC], tl.int32)
    return tl.reshape(zeros + c[None, :], (BN * BC,)), tl.reshape(zeros + run[:, None], (BN * BC,))


@triton.jit
def runs(rows):
    """A tuple of 16 or 32 tiles [BN, BC] -> [BN * BC, 16 or 32], the tuple's index fastest."""
    SIZE: tl.constexpr = len(rows)
    BN: tl.constexpr = rows[0].shape[0]
    BC: tl.constexpr = rows[0].shape[1]
    y = joined(rows, 16) if SIZE == 32 else rows
    y = joined(joined(joined(joined(y, 8), 4), 2), 1)[0]
    return tl.reshape(y, (BN * BC, SIZE))


@triton.jit
def signed(x, k: tl.constexpr, SIGNS: tl.constexpr):
    """x bf16 -> fp32, negated where bit k of the signs is set."""
    wide = x.to(tl.float32)
    return wide * -1.0 if (SIGNS >> k) & 1 else wide  # not -x, which is 0 - x and loses -0


@triton.jit
def store(ptr, value, live, EVEN: tl.constexpr):
    """``tl.store`` where ``live``, or everywhere."""
    if EVEN:
        tl.store(ptr, value)
    else:
        tl.store(ptr, value, mask=live)


@triton.jit
def store_scales(s, ptr, row, n, R, N, SWIZZLED: tl.constexpr, EVEN: tl.constexpr):
    """s[BR, n] of an operand whose rows have N scales, plain or in tensor cores' tiles."""
    if SWIZZLED:
        at = swizzle.offset(row[:, None], n, (N + 3) // 4 * 4)
    else:
        at = row[:, None].to(tl.int64) * N + n
    store(ptr + at, s, (row < R)[:, None] & (n < N), EVEN)


@triton.jit
def store_mx(
    x, row, first, R, C, q_ptr, s_ptr,
    LIMIT: tl.constexpr, EXPONENT: tl.constexpr, FLOOR: tl.constexpr,
    ROWS: tl.constexpr, SWIZZLED: tl.constexpr, NATIVE: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """x[BR, BW], BW a multiple of 32, as e4m3 with e8m0 scales."""
    BW: tl.constexpr = x.shape[1]
    CP = (C + 31) // 32 * 32
    c = first[:, None] + tl.arange(0, BW)[None, :]
    byte = mx.encode(blocks.tile_amax(x, ROWS, 32), LIMIT, EXPONENT, FLOOR, NATIVE)
    scaled = blocks.tile_scaled(x.to(tl.float32), mx.encoding(byte))
    if not EVEN:
        scaled = tl.where((row < R)[:, None] & (c < C), scaled, 0.0)
    values = fp8.narrow(scaled, tl.float8e4nv)
    at = row[:, None].to(tl.int64) * CP + c
    store(q_ptr + at, values, (row < R)[:, None] & (c < CP), EVEN)
    n = first[:, None] // 32 + tl.arange(0, BW // 32)[None, :]
    store_scales(byte.to(tl.uint8), s_ptr, row, n, R, CP // 32, SWIZZLED, EVEN)


@triton.jit
def store_nv(
    x, row, first, R, C, q_ptr, s_ptr, amax_ptr, seed_ptr, draw,
    STOCHASTIC: tl.constexpr, ROWS: tl.constexpr, SWIZZLED: tl.constexpr, NATIVE: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """x[BR, BW], BW a multiple of 16, as e2m1 with e4m3 scales under the tensor's."""
    BW: tl.constexpr = x.shape[1]
    CP = (C + 31) // 32 * 32
    c = first[:, None] + tl.arange(0, BW)[None, :]
    tensor = fp4.tile_tensor_scale(tl.load(amax_ptr))
    s = fp4.tile_block_scale(blocks.tile_amax(x, ROWS, 16), tensor)
    scaled = blocks.tile_scaled(x.to(tl.float32), fp4.tile_encode_scale(s, tensor))
    v = scaled if EVEN else tl.where((row < R)[:, None] & (c < C), scaled, 0.0)
    seed = tl.load(seed_ptr) if STOCHASTIC else 0
    index = row[:, None].to(tl.int64) * C  # of the row's first element, as the operand counts
    if NATIVE and STOCHASTIC:
        four = first[:, None] // 4 + tl.arange(0, BW // 4)[None, :]
        codes = fp4.native_stochastic(v, index + four * 4, seed, draw)
        out = q_ptr.to(tl.pointer_type(tl.int16)) + row[:, None].to(tl.int64) * (CP // 4)
        store(out + four, codes, (row < R)[:, None] & (four < CP // 4), EVEN)
    else:
        if NATIVE:
            packed = fp4.native_nearest(v)
        else:
            packed = fp4.tile_pack(fp4.tile_codes(v, index + c, seed, draw, STOCHASTIC))
        two = first[:, None] // 2 + tl.arange(0, BW // 2)[None, :]
        out = q_ptr + row[:, None].to(tl.int64) * (CP // 2)
        store(out + two, packed, (row < R)[:, None] & (two < CP // 2), EVEN)
    n = first[:, None] // 16 + tl.arange(0, BW // 16)[None, :]
    store_scales(s, s_ptr, row, n, R, CP // 16, SWIZZLED, EVEN)
