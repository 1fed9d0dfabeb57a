"""Narrow a tile in registers to MXFP8 or NVFP4, and store it: what plain and fused kernels share.

A tile x[BR, BW] bf16 stands in its operand at rows ``row[BR]``, of which those ``here`` are real,
and at columns ``first`` on; of x.T it is made by ``lpcompile.ops.turned``.
Arithmetic: ``lpcompile.ops.mx`` and ``lpcompile.ops.fp4``.
"""

import triton
import triton.language as tl

from lpcompile.ops import blocks, fp4, fp8, mx, swizzle, turned


@triton.jit
def largest(rows, best):
    """The largest magnitude of ``best`` and of a tuple of tiles, elementwise, fp32."""
    for k in tl.static_range(len(rows)):
        best = fp8.larger(best, tl.abs(rows[k].to(tl.float32)))
    return best


@triton.jit
def store_scales(s, ptr, row, here, n, N, SWIZZLED: tl.constexpr, EVEN: tl.constexpr):
    """s[BR, n] of an operand whose rows have N scales, plain or in tensor cores' tiles."""
    if SWIZZLED:
        at = swizzle.offset(row[:, None], n[None, :], (N + 3) // 4 * 4)
    else:
        at = row[:, None].to(tl.int64) * N + n[None, :]
    turned.write(ptr + at, s, here[:, None] & (n < N)[None, :], EVEN)


@triton.jit
def store_mx(
    x, row, here, first, C, q_ptr, s_ptr,
    LIMIT: tl.constexpr, EXPONENT: tl.constexpr, ELEMENT: tl.constexpr, FLOOR: tl.constexpr,
    ROWS: tl.constexpr, SWIZZLED: tl.constexpr, NATIVE: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """x[BR, BW], BW a multiple of 32, as FP8 with e8m0 scales."""
    BW: tl.constexpr = x.shape[1]
    CP = (C + 31) // 32 * 32
    c = first + tl.arange(0, BW)
    byte = mx.encode(blocks.tile_amax(x, ROWS, 32), LIMIT, EXPONENT, FLOOR, NATIVE)
    scaled = blocks.tile_scaled(x.to(tl.float32), mx.encoding(byte))
    if not EVEN:
        scaled = tl.where(here[:, None] & (c < C)[None, :], scaled, 0.0)
    at = row[:, None].to(tl.int64) * CP + c[None, :]
    live = here[:, None] & (c < CP)[None, :]
    turned.write(q_ptr + at, fp8.narrow(scaled, ELEMENT), live, EVEN)
    n = first // 32 + tl.arange(0, BW // 32)
    store_scales(byte.to(tl.uint8), s_ptr, row, here, n, CP // 32, SWIZZLED, EVEN)


@triton.jit
def store_nv(
    x, row, here, first, C, q_ptr, s_ptr, amax_ptr, seed_ptr, draw,
    STOCHASTIC: tl.constexpr, INDEX: tl.constexpr,
    ROWS: tl.constexpr, SWIZZLED: tl.constexpr, NATIVE: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """x[BR, BW], BW a multiple of 16, as e2m1 with e4m3 scales under the tensor's.

    INDEX: an integer that holds the index of every element of the operand.
    """
    BW: tl.constexpr = x.shape[1]
    CP = (C + 31) // 32 * 32
    c = first + tl.arange(0, BW)
    tensor = fp4.tile_tensor_scale(tl.load(amax_ptr))
    s = fp4.tile_block_scale(blocks.tile_amax(x, ROWS, 16), tensor)
    v = blocks.tile_scaled(x.to(tl.float32), fp4.tile_encode_scale(s, tensor))
    if not EVEN:
        v = tl.where(here[:, None] & (c < C)[None, :], v, 0.0)
    seed = tl.load(seed_ptr) if STOCHASTIC else 0
    eight = first // 8 + tl.arange(0, BW // 8)
    index = row[:, None].to(INDEX) * C + eight[None, :].to(INDEX) * 8  # as the operand counts
    packed = fp4.tile_packed(v, index, seed, draw, STOCHASTIC, NATIVE)
    out = q_ptr.to(tl.pointer_type(tl.int32)) + row[:, None].to(tl.int64) * (CP // 8)
    turned.write(out + eight[None, :], packed, here[:, None] & (eight < CP // 8)[None, :], EVEN)
    n = first // 16 + tl.arange(0, BW // 16)
    store_scales(s, s_ptr, row, here, n, CP // 16, SWIZZLED, EVEN)
