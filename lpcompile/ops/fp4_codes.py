"""Round a tile in registers to e2m1 and pack the codes, eight to an int32.

Elements that share a word are a tuple of 8 tiles: adjacent ones of a row (``tile_packed``), or 8
rows of x as it lies, whose columns are rows of x.T (``run_packed``).
"""

import triton
import triton.language as tl

from lpcompile.ops import blocks, fp4, turned
from lpcompile.ops.philox import tile_words


@triton.jit
def halves(v):
    """A tuple of tiles [..., 2] -> one twice as long: their even elements, then their odd ones."""
    even = ()
    odd = ()
    for k in tl.static_range(len(v)):
        a, b = tl.split(v[k])
        even = even + (a,)  # type: ignore[assignment]
        odd = odd + (b,)  # type: ignore[assignment]
    return even + odd


@triton.jit
def eighths(x):
    """x[BR, BC] -> a tuple of 8 tiles [BR, BC / 8], the k-th of elements 8 i + k."""
    BR: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1] // 8
    return halves(halves(halves((tl.reshape(x, (BR, N, 2, 2, 2)),))))


@triton.jit
def tile_packed(x, enc, index, seed, draw, STOCHASTIC: tl.constexpr, NATIVE: tl.constexpr):
    """x[BR, BC] bf16 times enc[BR, n] -> ``pack`` of the codes, [BR, BC / 8] int32 of eight each.

    index[BR, BC / 8], uint32 or int64: the logical element that is the first of each word.
    """
    v = eighths(blocks.tile_scaled(turned.widened(x), enc))
    signs = 0 if STOCHASTIC or NATIVE else signs_along(eighths(x))
    return word(v, signs, index, seed, draw, STOCHASTIC, NATIVE)


@triton.jit
def run_packed(rows, enc, index, seed, draw, STOCHASTIC: tl.constexpr, NATIVE: tl.constexpr):
    """``tile_packed`` of 8 elements that are a tuple of tiles bf16, with an enc each."""
    v = ()
    for k in tl.static_range(8):
        v = v + (turned.widened(rows[k]) * enc,)  # type: ignore[assignment]
    signs = 0 if STOCHASTIC or NATIVE else signs_across(rows)
    return word(v, signs, index, seed, draw, STOCHASTIC, NATIVE)


@triton.jit
def word(v, signs, index, seed, draw, STOCHASTIC: tl.constexpr, NATIVE: tl.constexpr):
    """A tuple of 8 tiles fp32 -> words of their codes."""
    if STOCHASTIC:
        packed = native_stochastic(v, index, seed, draw) if NATIVE else drawn(v, index, seed, draw)
    elif NATIVE:
        packed = native_nearest(v)
    else:
        made = ()
        for k in tl.static_range(8):
            made = made + (fp4.to_grid(v[k], 0x3F800000, 6291456.0),)  # type: ignore[assignment]
        packed = codes(made) | (signs & -0x77777778)
        packed = tl.where(v[0] == v[0], packed, 0x77777777)  # NaN, as all that share the scale
    return packed


@triton.jit
def first_codes(n):
    """Masks of the n lowest codes of a word: all of them from 8 on, none up to 0."""
    some = (1 << 4 * tl.minimum(tl.maximum(n, 0), 7)) - 1
    return tl.where(n >= 8, -1, some)


@triton.jit
def codes(made):
    """A tuple of 8 tiles of grid points fp32 -> words of the codes of their magnitudes, at most 6.

    2^-14 of a grid point in fp16, whose least normal number that is, are the code's bits, from bit
    9 on: two points to a conversion, a product and a minimum, which makes 7 of NaN.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 a, b, c, d, even, odd, tiny, most;
        mov.b32 tiny, 0x04000400;
        mov.b32 most, 0x0E000E00;
        cvt.rn.f16x2.f32 a, $3, $1;
        cvt.rn.f16x2.f32 b, $7, $5;
        cvt.rn.f16x2.f32 c, $4, $2;
        cvt.rn.f16x2.f32 d, $8, $6;
        mul.rn.f16x2 a, a, tiny;
        mul.rn.f16x2 b, b, tiny;
        mul.rn.f16x2 c, c, tiny;
        mul.rn.f16x2 d, d, tiny;
        abs.f16x2 a, a;
        abs.f16x2 b, b;
        abs.f16x2 c, c;
        abs.f16x2 d, d;
        min.f16x2 a, a, most;
        min.f16x2 b, b, most;
        min.f16x2 c, c, most;
        min.f16x2 d, d, most;
        prmt.b32 even, a, b, 0x7531;
        prmt.b32 odd, c, d, 0x7531;
        shr.u32 even, even, 1;
        shl.b32 odd, odd, 3;
        or.b32 $0, even, odd;
        }""",
        "=r,f,f,f,f,f,f,f,f",
        [made[0], made[1], made[2], made[3], made[4], made[5], made[6], made[7]],
        dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def signs_along(x):
    """The signs of a tuple of 8 tiles bf16, in bit 3 of each code of a word, among other bits.

    Two that follow each other are in a register.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 a, b, c, d, p, q, even, odd;
        mov.b32 a, {$1, $2};
        mov.b32 b, {$3, $4};
        mov.b32 c, {$5, $6};
        mov.b32 d, {$7, $8};
        prmt.b32 p, a, b, 0x7351;
        prmt.b32 q, c, d, 0x7351;
        prmt.b32 even, p, q, 0x5410;
        prmt.b32 odd, p, q, 0x7632;
        shr.u32 even, even, 4;
        lop3.b32 $0, odd, even, 0x80808080, 0xe4;
        }""",
        "=r,h,h,h,h,h,h,h,h", [x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]],
        dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def signs_across(x):
    """``signs_along`` where the same element of two words is in a register."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 p, q, r, s, even, odd;
        prmt.b32 p, $2, $4, 0x7351;
        prmt.b32 q, $6, $8, 0x7351;
        prmt.b32 r, $3, $5, 0x7351;
        prmt.b32 s, $7, $9, 0x7351;
        prmt.b32 even, p, q, 0x5410;
        prmt.b32 odd, r, s, 0x5410;
        shr.u32 even, even, 4;
        lop3.b32 $0, odd, even, 0x80808080, 0xe4;
        prmt.b32 even, p, q, 0x7632;
        prmt.b32 odd, r, s, 0x7632;
        shr.u32 even, even, 4;
        lop3.b32 $1, odd, even, 0x80808080, 0xe4;
        }""",
        "=r,=r,r,r,r,r,r,r,r,r", [x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]],
        dtype=tl.int32, is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def drawn(v, index, seed, draw):
    """``tile_packed`` of 8 tiles, rounded stochastically."""
    packed = tl.zeros(v[0].shape, tl.uint32)
    for i in tl.static_range(8):
        # The sign last, where one instruction shifts it in.
        sign = v[7 - i].to(tl.uint32, bitcast=True) >> 31
        word = tile_words(seed, draw, index + (7 - i))
        packed = (packed << 4) + ((drawn_above(v[7 - i], word) << 1) | sign)
    # What is above each code, once for all eight; then each sign before its code.
    packed -= 254 * 0x22222222 & 0xFFFFFFFF
    packed = ((packed >> 1) & 0x77777777) | ((packed << 3) & 0x88888888)
    return packed.to(tl.int32, bitcast=True)


@triton.jit
def drawn_above(v, word):
    """The code of |v| fp32 under a random word, plus ABOVE, as uint32.

    With 2^e the power of two at or below |v|, at least 1, grid points are 2^(e - 1) apart, and the
    code is |v| in such steps, plus 2e. In 2^-24 of a step, rounded up, it decides as the exact
    fraction does. The minimum drops NaN, and so makes it 6.
    """
    a = tl.minimum(tl.abs(v), 6.0)
    power = tl.maximum(a.to(tl.int32, bitcast=True) & 0x7F800000, 0x3F800000)
    fine = (254 << 23) - power + (25 << 23)
    steps = tl.ceil(a * fine.to(tl.float32, bitcast=True)).to(tl.int32)
    code = (steps + 0xFFFFFF - (word >> 8).to(tl.int32) >> 24) + (power >> 22)
    return code.to(tl.uint32, bitcast=True)


@triton.jit
def native_nearest(v):
    """``tile_packed`` of 8 tiles, rounded and packed by Blackwell's conversion."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b8 b<4>;
        cvt.rn.satfinite.e2m1x2.f32 b0, $2, $1;
        cvt.rn.satfinite.e2m1x2.f32 b1, $4, $3;
        cvt.rn.satfinite.e2m1x2.f32 b2, $6, $5;
        cvt.rn.satfinite.e2m1x2.f32 b3, $8, $7;
        mov.b32 $0, {b0, b1, b2, b3};
        }""",
        "=r,f,f,f,f,f,f,f,f", [v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7]],
        dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def native_stochastic(v, index, seed, draw):
    """The same, stochastically.

    One random word serves four elements, so the bits differ from ``stochastic``; the distribution
    does not, but for the 8 random bits that an element gets.
    """
    low = tile_words(seed, draw, index)
    high = tile_words(seed, draw, index + 4)
    return tl.inline_asm_elementwise(
        """{
        .reg .b16 h<2>;
        cvt.rs.satfinite.e2m1x4.f32 h0, {$4, $3, $2, $1}, $9;
        cvt.rs.satfinite.e2m1x4.f32 h1, {$8, $7, $6, $5}, $10;
        mov.b32 $0, {h0, h1};
        }""",
        "=r,f,f,f,f,f,f,f,f,r,r", [v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], low, high],
        dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip
