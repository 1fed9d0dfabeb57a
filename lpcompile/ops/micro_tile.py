"""Narrow a tile in registers to MXFP8 or NVFP4, and store it: what plain and fused kernels share.

A tile x[BR, BW] bf16 stands in its operand at rows ``row[BR]``, of which those ``here`` are real,
and at columns ``first`` on; of x.T it is made by ``lpcompile.ops.turned``.
Arithmetic: ``lpcompile.ops.mx`` and ``lpcompile.ops.fp4``.
"""

import triton
import triton.language as tl

from lpcompile.ops import blocks, fp4, fp4_codes, fp8, mx, pointwise, swizzle, turned


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
    if x.dtype == tl.float32:
        x = pointwise.narrowed(x)
    tensor = fp4.tile_tensor_scale(tl.load(amax_ptr))
    s = fp4.tile_block_scale(blocks.tile_amax(x, ROWS, 16), tensor)
    enc = fp4.tile_encode_scale(s, tensor)
    seed = tl.load(seed_ptr) if STOCHASTIC else 0
    eight = first // 8 + tl.arange(0, BW // 8)
    index = row[:, None].to(INDEX) * C + eight[None, :].to(INDEX) * 8  # as the operand counts
    packed = fp4_codes.tile_packed(x, enc, index, seed, draw, STOCHASTIC, NATIVE)
    if not EVEN:
        packed &= fp4_codes.first_codes(C - eight * 8)[None, :]
    n = first // 16 + tl.arange(0, BW // 16)
    store_words(packed, row, here, eight, C, q_ptr, EVEN)
    store_scales(s.to(tl.float8e4nv), s_ptr, row, here, n, (C + 31) // 32 * 2, SWIZZLED, EVEN)


@triton.jit
def store_words(packed, row, here, eight, C, q_ptr, EVEN: tl.constexpr):
    """packed[BR, n], words of eight codes, of an operand of C columns."""
    words = (C + 31) // 32 * 4
    out = q_ptr.to(tl.pointer_type(tl.int32)) + row[:, None].to(tl.int64) * words
    turned.write(out + eight[None, :], packed, here[:, None] & (eight < words)[None, :], EVEN)


@triton.jit
def store_nv_runs(
    rows, row, here, first, C, q_ptr, s_ptr, amax_ptr, seed_ptr, draw,
    STOCHASTIC: tl.constexpr, INDEX: tl.constexpr,
    ROWS: tl.constexpr, SWIZZLED: tl.constexpr, NATIVE: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """``store_nv`` of runs of 16 columns, a tuple of tiles [BN, BR] bf16, as x lies."""
    BN: tl.constexpr = rows[0].shape[0]
    BR: tl.constexpr = rows[0].shape[1]
    tensor = fp4.tile_tensor_scale(tl.load(amax_ptr))
    amax = turned.amax(rows)
    if ROWS > 1:
        amax = tl.max(tl.reshape(amax.to(tl.int32, bitcast=True), (BN, BR // ROWS, ROWS)), 2)
        amax = tl.broadcast_to(tl.expand_dims(amax, 2), (BN, BR // ROWS, ROWS))
        amax = tl.reshape(amax, (BN, BR)).to(tl.float32, bitcast=True)
    s = fp4.tile_block_scale(amax, tensor)
    enc = fp4.tile_encode_scale(s, tensor)
    seed = tl.load(seed_ptr) if STOCHASTIC else 0
    run = first + tl.arange(0, BN) * 16
    words = ()
    for k in tl.static_range(2):
        c = run + 8 * k
        index = row[None, :].to(INDEX) * C + c[:, None].to(INDEX)  # as the operand counts
        part = rows[8 * k : 8 * k + 8]
        word = fp4_codes.run_packed(part, enc, index, seed, draw, STOCHASTIC, NATIVE)
        if not EVEN:
            word &= fp4_codes.first_codes(C - c)[:, None]
        words = words + (word,)  # type: ignore[assignment]
    eight = first // 8 + tl.arange(0, BN * 2)
    store_words(turned.turned(words), row, here, eight, C, q_ptr, EVEN)
    n = first // 16 + tl.arange(0, BN)
    store_scales(
        tl.trans(s).to(tl.float8e4nv), s_ptr, row, here, n, (C + 31) // 32 * 2, SWIZZLED, EVEN
    )
