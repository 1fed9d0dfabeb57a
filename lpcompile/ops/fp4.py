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
def to_grid(v, least: tl.constexpr, middle: tl.constexpr):
    """v fp32 to the next point of a grid, ties to even; a zero's sign is lost.

    With 2^e the power of two at or below |v|, at least that of the bits ``least``, points are
    2^(e - m) apart, which is what adding ``middle`` * 2^e rounds to, 1.5 * 2^(23 - m) * 2^e.
    """
    power = tl.maximum(v.to(tl.int32, bitcast=True) & 0x7F800000, least)
    power = power.to(tl.float32, bitcast=True)
    return tl.fma(power, -middle, tl.fma(power, middle, v))


@triton.jit
def tile_block_scale(amax, tensor):
    """``block_scale``, in a kernel, as fp32.

    Rounded to e4m3 without its conversions: of one to e4m3 and back ptxas 12.8, which Triton 3.6
    has for sm_90, may put the second before the first.
    """
    scale = to_grid(tl.minimum(amax * (tensor * (1 / 6)), 448.0), 0x3C800000, 1572864.0)
    known = tensor.to(tl.int32, bitcast=True) < 0x7F800000
    finite = (amax.to(tl.int32, bitcast=True) < 0x7F800000) & known
    return tl.where(finite, scale, float("nan"))


@triton.jit
def reciprocal(v):
    """1 / v as ``tl.div_rn`` rounds it, of a v between 2^-100 and 2^100; NaN of zero.

    What IEEE division does of such operands, without the test and the call for others, before
    which everything would have to be in registers.
    """
    r = tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [v], dtype=tl.float32, is_pure=True, pack=1
    )
    less = v * -1.0  # not -v, which is 0 - v, an instruction
    r = tl.fma(r, tl.fma(less, r, 1.0), r)
    return tl.fma(r, tl.fma(less, r, 1.0), r)


@triton.jit
def tile_encode_scale(s, tensor):
    """``encode_scale``, in a kernel, of s fp32; a NaN scale stays NaN.

    By a power of two, exact, what is divided by comes to between 2^-9 and 2^10.
    """
    power = (tensor.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    # Of a zero scale it is NaN, which the minimum drops.
    r = reciprocal(s * tl.div_rn(1.0, tensor) * power)
    enc = tl.minimum(r * power, 3.4028234663852886e38)
    return tl.where(s == s, enc, float("nan"))


@triton.jit
def decode(codes, k: tl.constexpr):
    """The k-th of eight codes in an int32 -> fp32, exact."""
    # The code of e2m1, placed at the top of an fp32's mantissa, is 2^-126 of its value.
    top = codes << (22 - 4 * k) if k < 6 else codes >> (4 * k - 22)
    small = (top & 0x01C00000) | ((codes << (28 - 4 * k)) & -0x80000000)
    return small.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126
