"""What every FP8 quantizer shares: amax to scale, scale and clamp and cast, in torch and Triton.

    scale = f32(max / max(f64(amax), 1e-12));  pow2: rounded down to a power of two
    q     = element(clamp(x * scale, -max, max));  the scale kept is 1 / scale

An amax that is NaN or Inf makes the scale NaN, and with it every value that shares the scale: a
diverged run must show. The clamp keeps NaN (``tl.clamp`` and ``tl.maximum`` drop it), and comes
before the cast because torch 2.11's casts do not saturate.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lpcompile.ops import device

MAX = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
TRITON = {torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e5m2: tl.float8e5}


def canonical(x: Tensor) -> Tensor:
    """x with one NaN, the positive quiet one, on every device."""
    return torch.where(x.isnan(), torch.nan, x)


def encode_scale(amax: Tensor, element: torch.dtype, pow2: bool) -> Tensor:
    """amax[...] fp32 -> encode scale[...] fp32, NaN where amax is not finite."""
    wide = amax.double().clamp(min=1e-12)
    # `number / tensor` is number * reciprocal in torch, and rounds twice.
    scale = (torch.full_like(wide, MAX[element]) / wide).float()
    if pow2:
        scale = (scale.view(torch.int32) & 0x7F800000).view(torch.float32)
    return torch.where(amax.isfinite(), scale, torch.nan)


def decode_scale(scale: Tensor) -> Tensor:
    """The reciprocal of an encode scale, with one NaN on every device."""
    return canonical(1 / scale)


def cast(x: Tensor, scale: Tensor, element: torch.dtype) -> Tensor:
    """x[...] times an encode scale that broadcasts, clamped and cast; NaN is the positive one."""
    limit = MAX[element]
    return canonical((x.float() * scale).clamp(-limit, limit)).to(element)


def pad_columns(values: Tensor, columns: int) -> Tensor:
    """values[..., C] in a zeroed [..., columns], of the same bytes where the two are equal."""
    if values.shape[-1] == columns:
        return values.clone(memory_format=torch.contiguous_format)
    padded = values.new_zeros((*values.shape[:-1], columns))
    padded[..., : values.shape[-1]] = values
    return padded


def stack(x: Tensor) -> Tensor:
    """x[E, R, C] as it is, x[R, C] as a stack of one: what the kernels read."""
    return x if x.dim() == 3 else x[None]


def runs_triton(x: Tensor) -> bool:
    """Whether the device of x converts to FP8 in Triton: capability 8.9 and up."""
    return device.capability(x) >= (8, 9)


@triton.jit
def larger(a, b):
    """The larger, NaN if either is: one instruction, where ``tl.max`` drops NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def amax(x, axis: tl.constexpr):
    """The largest magnitude along an axis of a tile, fp32."""
    return tl.reduce(tl.abs(x.to(tl.float32)), axis, larger)


@triton.jit
def bits_of_amax(amax):
    """An fp32 maximum of magnitudes, rounded to bf16 as each of them is to be, as ordered int32.

    Rounding keeps order, so the maximum may be taken before it. NaN is the one that torch writes.
    """
    rounded = amax.to(tl.bfloat16).to(tl.float32)
    return tl.where(rounded == rounded, rounded.to(tl.int32, bitcast=True), 0x7FC00000)


@triton.jit
def quotient(LIMIT: tl.constexpr, amax):
    """LIMIT / amax in fp32, rounded once, for an amax from 1e-12 up.

    So is the fp64 quotient, rounded: 53 bits are more than twice 24. fp32 `/` is div.full.f32 in
    Triton, off by up to two units (3.6, sm_90a), and two steps from it are exact. ``tl.div_rn``
    makes the same steps, and calls a function where exponents are extreme: what a kernel holds
    across a call takes registers (``quantize_fp8_grouped_t``: 105 for 56, 192 us for 168).
    """
    down = tl.where(amax > 1.8446744073709552e19, 5.421010862427522e-20, 1.0)  # 2^64, 2^-64
    amax = amax * down
    reciprocal = 1.0 / amax
    reciprocal = tl.fma(tl.fma(-amax, reciprocal, 1.0), reciprocal, reciprocal)
    q = LIMIT * reciprocal
    q = tl.fma(tl.fma(-amax, q, LIMIT), reciprocal, q)
    q = tl.fma(tl.fma(-amax, q, LIMIT), reciprocal, q)
    return q * down


@triton.jit
def encode(amax, LIMIT: tl.constexpr, POW2: tl.constexpr):
    """``encode_scale``, in a kernel."""
    if POW2:
        # LIMIT is 1.75 * 2^n: the largest power of two up to LIMIT / amax, from the bits of amax.
        TOP: tl.constexpr = 262 if LIMIT == 448.0 else 269
        bits = tl.where(amax > 1e-12, amax, 1e-12).to(tl.int32, bitcast=True)
        field = TOP - (bits >> 23) - tl.where((bits & 0x7FFFFF) > 0x600000, 1, 0)
        scale = (field << 23).to(tl.float32, bitcast=True)
    else:
        scale = quotient(LIMIT, tl.where(amax > 1e-12, amax, 1e-12))
    finite = amax.to(tl.int32, bitcast=True) < 0x7F800000
    return tl.where(finite, scale, float("nan"))


@triton.jit
def decode(scale, POW2: tl.constexpr):
    """The reciprocal of an encode scale, with the one NaN that torch writes."""
    if POW2:
        # 2^-n for 2^n, n from -120 to 55; ``tl.div_rn`` calls a function, see ``quotient``
        inverse = (0x7F000000 - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    else:
        inverse = tl.div_rn(1.0, scale)
    return tl.where(scale == scale, inverse, float("nan"))


@triton.jit
def narrow(scaled, ELEMENT: tl.constexpr):
    """The clamp and the cast of ``cast``, in a kernel: one saturating conversion, NaN kept.

    No element may be a constant, such as the zeros of padding are where the size that masks them
    is. Triton makes a size of 1 one, unless the kernel declares it ``tl.int32``. Equal conversions
    are merged, and of a word whose halves are one conversion ptxas 12.8, which Triton 3.6 and 3.7
    have for sm_90, writes the lower half alone: what was in the register is the upper one, in the
    padding of a single token. ptxas 13.0 writes both.
    """
    return scaled.to(ELEMENT)


@triton.jit
def narrow4(a, b, c, d, ELEMENT: tl.constexpr):
    """``narrow`` of four tiles, as words of four bytes, a's the lowest: two conversions a word.

    ELEMENT: "e4m3" or "e5m2".
    """
    return tl.inline_asm_elementwise(
        "{ .reg .b16 low, high; cvt.rn.satfinite."
        + ELEMENT
        + "x2.f32 low, $2, $1; cvt.rn.satfinite."
        + ELEMENT
        + "x2.f32 high, $4, $3; mov.b32 $0, {low, high}; }",
        "=r,r,r,r,r",
        [a, b, c, d],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def first_bytes(n):
    """Masks of the n lowest bytes of a word: all of them from 4 on, none up to 0."""
    some = (1 << 8 * tl.minimum(tl.maximum(n, 0), 3)) - 1
    return tl.where(n >= 4, -1, some)
