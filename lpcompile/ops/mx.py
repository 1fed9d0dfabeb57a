"""What every MXFP8 quantizer shares: amax to an e8m0 scale, and back, in torch and Triton.

    rceil  d = amax * f32(1 / max); byte = d rounded up to a power of two, biased by 127
    floor  byte = floor(log2 amax) - floor(log2 max) + 127, at least 0      (OCP MX 1.0, 6.3)
    q    = element(clamp(x * 2^(127 - byte), -max, max));  the scale kept is byte, uint8

An amax that is NaN or Inf makes the byte 255, the NaN of e8m0, and with it every value of the
block. No byte of a bf16 amax lies in 248..254, so that 2^(127 - byte) is a normal number.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lpcompile.ops import fp8

BLOCK = 32
EXPONENT = {torch.float8_e4m3fn: 8, torch.float8_e5m2: 15}  # floor(log2 max)
NAN = 255


def scale_byte(amax: Tensor, element: torch.dtype, floor: bool) -> Tensor:
    """amax[...] fp32 -> biased exponent of the decode scale, uint8."""
    if floor:
        byte = ((amax.view(torch.int32) >> 23) - EXPONENT[element]).clamp(min=0)
    else:
        bits = (amax * (1 / fp8.MAX[element])).view(torch.int32)
        exponent, mantissa = bits >> 23, bits & 0x7FFFFF
        # 2^-127, the smallest e8m0, is 0x400000 as a subnormal.
        byte = exponent + torch.where(exponent == 0, mantissa > 0x400000, mantissa != 0)
    return torch.where(amax.isfinite(), byte, NAN).to(torch.uint8)


def encode_scale(byte: Tensor) -> Tensor:
    """2^(127 - byte) fp32, NaN for 255."""
    scale = ((254 - byte.int()) << 23).view(torch.float32)
    return torch.where(byte == NAN, torch.nan, scale)


def decode_scale(byte: Tensor) -> Tensor:
    """2^(byte - 127) fp32, NaN for 255."""
    wide = byte.int()
    scale = torch.where(wide == 0, 0x400000, wide << 23).view(torch.float32)
    return torch.where(byte == NAN, torch.nan, scale)


@triton.jit
def encode(
    amax, LIMIT: tl.constexpr, EXPONENT: tl.constexpr, FLOOR: tl.constexpr, NATIVE: tl.constexpr
):
    """``scale_byte``, in a kernel, as int32. NATIVE: with the conversion of Blackwell."""
    bits = amax.to(tl.int32, bitcast=True)
    if FLOOR:
        byte = tl.maximum((bits >> 23) - EXPONENT, 0)
    elif NATIVE:
        byte = tl.inline_asm_elementwise(
            "cvt.rp.satfinite.ue8m0x2.f32 $0, 0f00000000, $1;",
            "=h,f", [amax * (1 / LIMIT)], dtype=tl.int16, is_pure=True, pack=1,
        ).to(tl.int32)  # fmt: skip
    else:
        d = (amax * (1 / LIMIT)).to(tl.int32, bitcast=True)
        exponent = d >> 23
        mantissa = d & 0x7FFFFF
        up = tl.where(exponent == 0, mantissa > 0x400000, mantissa != 0)
        byte = exponent + up.to(tl.int32)
    return tl.where(bits < 0x7F800000, byte, 255)


@triton.jit
def encoding(byte):
    """``encode_scale``, in a kernel: byte int32."""
    return tl.where(byte == 255, float("nan"), ((254 - byte) << 23).to(tl.float32, bitcast=True))


@triton.jit
def decoding(byte):
    """``decode_scale``, in a kernel: byte int32."""
    scale = tl.where(byte == 0, 0x400000, byte << 23).to(tl.float32, bitcast=True)
    return tl.where(byte == 255, float("nan"), scale)


@triton.jit
def scales(amax, LIMIT: tl.constexpr, EXPONENT: tl.constexpr, FLOOR: tl.constexpr):
    """``encoding`` and ``decoding`` of the byte of an amax, without it: in half the instructions.

    Of an amax that is not finite the first alone is NaN.
    """
    if FLOOR:
        bits = amax.to(tl.int32, bitcast=True)
        field = tl.maximum((bits & 0x7F800000) - (EXPONENT << 23), 0)
    else:
        d = (amax * (1 / LIMIT)).to(tl.int32, bitcast=True)
        field = tl.where(d > 0x400000, d + 0x7FFFFF, 0) & 0x7F800000
    enc = (0x7F000000 - field).to(tl.float32, bitcast=True)
    return tl.fma(amax, 0.0, enc), tl.maximum(field, 0x400000).to(tl.float32, bitcast=True)
