"""What every NVFP4 quantizer shares: two levels of scales, e2m1 rounding, in torch and Triton.

    S_enc = min(2688 / amax_tensor, FLT_MAX); 1 where amax_tensor == 0           2688 = 448 * 6
    s     = e4m3(min(amax_block * (S_enc * (1/6)), 448))          a zero scale is allowed
    enc   = min(1 / (f32(s) * (1 / S_enc)), FLT_MAX)
    q     = e2m1(clamp(x * enc, -6, 6)),  decoded as q * s * amax_tensor / 2688

A block whose amax, or whose tensor's amax, is NaN or Inf gets the scale NaN and the codes of +6,
which is what ``cvt.rn.satfinite.e2m1x2`` makes of NaN: e2m1 has none of its own. Two codes share a
byte, the even element in the low half. Scales: arXiv 2509.25149, appendix C.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lpcompile.ops.philox import tile_words

BLOCK = 16
ALIGN = 32  # elements: 16 bytes
MAX = 6.0
TENSOR_MAX = 2688.0
FLT_MAX = torch.finfo(torch.float32).max
GRID = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the magnitudes, by code
# Where nearest rounding goes up, and whether a tie does: ties go to the even code.
MIDPOINTS = (
    (0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True),
    (5.0, False),
)  # fmt: skip


def tensor_scale(amax: Tensor) -> Tensor:
    """amax[...] fp32 -> S_enc, NaN where amax is not finite."""
    # Tensor by tensor: torch turns 2688 / amax into 2688 * (1 / amax).
    scale = (torch.full_like(amax, TENSOR_MAX) / amax).clamp(max=FLT_MAX)
    return torch.where(amax.isfinite(), torch.where(amax == 0, 1.0, scale), torch.nan)


def block_scale(amax: Tensor, tensor: Tensor) -> Tensor:
    """amax[R, n] of blocks under S_enc -> s e4m3, NaN where an amax is not finite."""
    scale = (amax * (tensor * (1 / 6))).clamp(max=448.0)
    finite = amax.isfinite() & scale.isfinite()
    return torch.where(finite, scale, torch.nan).to(torch.float8_e4m3fn)


def encode_scale(s: Tensor, tensor: Tensor) -> Tensor:
    """s[R, n] e4m3 under S_enc -> what x is multiplied by."""
    return (1 / (s.float() * (1 / tensor))).clamp(max=FLT_MAX)


def nearest(v: Tensor) -> Tensor:
    """v[...] fp32 -> e2m1 codes, 0 .. 15, uint8; ties to the even code."""
    a = v.abs()
    code = torch.zeros_like(a, dtype=torch.uint8)
    for midpoint, tie_up in MIDPOINTS:
        code += a >= midpoint if tie_up else a > midpoint
    return _signed(code, v)


def stochastic(v: Tensor, word: Tensor) -> Tensor:
    """v[...] fp32 -> codes, up where the upper 24 bits of ``word`` are below the fraction.

    Between grid points lo < hi the fraction is (|v| - lo) / (hi - lo), exact in fp32.
    """
    grid = torch.tensor([*GRID, 8.0], device=v.device)
    a = v.abs().nan_to_num(MAX).clamp(max=MAX)
    code = torch.bucketize(a.contiguous(), grid[1:8], right=True)
    fraction = (a - grid[code]) / (grid[code + 1] - grid[code])
    up = (word >> 8).float() * 2.0**-24 < fraction
    return _signed((code + up).to(torch.uint8), v)


def _signed(code: Tensor, v: Tensor) -> Tensor:
    return torch.where(v.isnan(), 7, code | (v.signbit().to(torch.uint8) << 3))


def tensor_decode(amax: Tensor) -> Tensor:
    """amax[...] -> the decode scale of its tensor, fp32: amax / 2688."""
    return amax / torch.full_like(amax, TENSOR_MAX)  # by a tensor: by a number is not IEEE


def pack(codes: Tensor) -> Tensor:
    """codes[R, C] -> bytes[R, C / 2], the even element in the low half."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack(values: Tensor) -> Tensor:
    """bytes[R, C / 2] -> fp32[R, C]."""
    grid = torch.tensor([*GRID, *(-g for g in GRID)], device=values.device)
    codes = torch.stack([values & 15, values >> 4], dim=2).flatten(1)
    return grid[codes.long()]


@triton.jit
def tile_tensor_scale(amax):
    """``tensor_scale``, in a kernel."""
    scale = tl.minimum(tl.div_rn(2688.0, amax), 3.4028234663852886e38)
    finite = amax.to(tl.int32, bitcast=True) < 0x7F800000
    return tl.where(finite, tl.where(amax == 0, 1.0, scale), float("nan"))


@triton.jit
def tile_block_scale(amax, tensor):
    """``block_scale``, in a kernel."""
    scale = tl.minimum(amax * (tensor * (1 / 6)), 448.0)
    known = tensor.to(tl.int32, bitcast=True) < 0x7F800000
    finite = (amax.to(tl.int32, bitcast=True) < 0x7F800000) & known
    return tl.where(finite, scale, float("nan")).to(tl.float8e4nv)


@triton.jit
def tile_encode_scale(s, tensor):
    """``encode_scale``, in a kernel; a NaN scale stays NaN."""
    wide = s.to(tl.float32)
    enc = tl.minimum(tl.div_rn(1.0, wide * tl.div_rn(1.0, tensor)), 3.4028234663852886e38)
    return tl.where(wide == wide, enc, float("nan"))


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
def code_above(v, word, STOCHASTIC: tl.constexpr):
    """The code of |v| fp32, plus ABOVE, as uint32.

    With 2^e the power of two at or below |v|, at least 1, grid points are 2^(e - 1) apart, and the
    code is |v| in such steps, plus 2e. Nearest: adding 2^(e + 22) rounds to that step, in the
    addition's own rounding. Stochastic: in 2^-24 of a step, rounded up, which decides as the exact
    fraction does. The minimum drops NaN, and so makes it 6.
    """
    a = tl.minimum(tl.abs(v), 6.0)
    power = tl.maximum(a.to(tl.int32, bitcast=True) & 0x7F800000, 0x3F800000)
    if STOCHASTIC:
        fine = (254 << 23) - power + (25 << 23)
        steps = tl.ceil(a * fine.to(tl.float32, bitcast=True)).to(tl.int32)
        code = (steps + 0xFFFFFF - (word >> 8).to(tl.int32) >> 24) + (power >> 22)
    else:
        rounded = tl.fma(power.to(tl.float32, bitcast=True), 4194304.0, a)
        code = rounded.to(tl.int32, bitcast=True) + ((power >> 22) - power)
    return code.to(tl.uint32, bitcast=True)


@triton.jit
def tile_packed(v, index, seed, draw, STOCHASTIC: tl.constexpr, NATIVE: tl.constexpr):
    """v[BR, BC] fp32 -> ``pack`` of its codes, [BR, BC / 8] int32 of eight codes each.

    index[BR, BC / 8], uint32 or int64: the logical element that is the first of each word.
    """
    v = eighths(v)
    if NATIVE:
        return native_stochastic(v, index, seed, draw) if STOCHASTIC else native_nearest(v)
    ABOVE: tl.constexpr = 254 if STOCHASTIC else 254 + (22 << 23)
    packed = tl.zeros(v[0].shape, tl.uint32)
    for i in tl.static_range(8):
        # The sign last, where one instruction shifts it in.
        sign = v[7 - i].to(tl.uint32, bitcast=True) >> 31
        word = tile_words(seed, draw, index + (7 - i)) if STOCHASTIC else 0
        packed = (packed << 4) + ((code_above(v[7 - i], word, STOCHASTIC) << 1) | sign)
    # What is above each code, once for all eight; then each sign before its code.
    packed -= ABOVE * 0x22222222 & 0xFFFFFFFF
    packed = ((packed >> 1) & 0x77777777) | ((packed << 3) & 0x88888888)
    return packed.to(tl.int32, bitcast=True)


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


@triton.jit
def decode(codes, k: tl.constexpr):
    """The k-th of eight codes in an int32 -> fp32, exact."""
    # The code of e2m1, placed at the top of an fp32's mantissa, is 2^-126 of its value.
    top = codes << (22 - 4 * k) if k < 6 else codes >> (4 * k - 22)
    small = (top & 0x01C00000) | ((codes << (28 - 4 * k)) & -0x80000000)
    return small.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126
