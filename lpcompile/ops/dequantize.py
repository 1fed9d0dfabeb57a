"""Undo MXFP8 and NVFP4: values[R, Kv], scales -> x[R, K] bf16, exact, without the tensor's scale.

Of stacks, values[E, R, Kv], every matrix.

values e4m3 with e8m0 scales per 32, or uint8 (two e2m1 codes) with e4m3 scales per 16; scales are
[R, K / block], or flat as ``swizzle`` made them. e4m3 times a power of two, and e2m1 times e4m3,
have at most 6 significant bits, so bf16 holds the product (below 2^-126 down to its own 2^-133).
It is what a GPU without block-scaled tensor cores multiplies.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lpcompile.ops import (
    amax_tensor,
    blocks,
    fp4,
    fp8,
    mx,
    quantize_mxfp8,
    quantize_nvfp4,
    swizzle,
    turned,
)
from lpcompile.ops.define import cdiv, define, same_bits
from lpcompile.ops.launcher import cached


def is_fp4(values: Tensor) -> bool:
    """Whether values are bytes of two e2m1 codes."""
    return values.dtype == torch.uint8


def contraction(values: Tensor) -> int:
    """The elements in a row of values."""
    return values.shape[-1] * (2 if is_fp4(values) else 1)


def outputs(values: Tensor, scales: Tensor) -> Tensor:
    return values.new_empty((*values.shape[:-1], contraction(values)), dtype=torch.bfloat16)


def reference(values: Tensor, scales: Tensor) -> Tensor:
    return _one_nan(wide(values, scales).bfloat16())


def wide(values: Tensor, scales: Tensor) -> Tensor:
    """The same in fp32, exact for every scale."""
    if values.dim() == 3:
        return wide(values.flatten(0, 1), scales.flatten(0, 1)).unflatten(0, values.shape[:2])
    R, K = values.shape[0], contraction(values)
    block = fp4.BLOCK if is_fp4(values) else mx.BLOCK
    if scales.dim() == 1:
        scales = swizzle.unswizzled(scales, R, K // block)
    if is_fp4(values):
        return fp4.unpack(values) * blocks.spread(scales.float(), block)
    return values.float() * blocks.spread(mx.decode_scale(scales), block)


def _one_nan(x: Tensor) -> Tensor:
    return torch.where(x.isnan(), torch.nan, x)


@triton.jit
def from_e4m3(word):
    """Four e4m3 in an int32 -> four fp32 tiles, the lowest byte first: two conversions."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b16 low, high, h<4>;
        .reg .b32 p, q;
        mov.b32 {low, high}, $4;
        cvt.rn.f16x2.e4m3x2 p, low;
        cvt.rn.f16x2.e4m3x2 q, high;
        mov.b32 {h0, h1}, p;
        mov.b32 {h2, h3}, q;
        cvt.f32.f16 $0, h0;
        cvt.f32.f16 $1, h1;
        cvt.f32.f16 $2, h2;
        cvt.f32.f16 $3, h3;
        }""",
        "=f,=f,=f,=f,r", [word],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def eight(codes, FP4: tl.constexpr):
    """Eight codes, an int32 of e2m1 or int64 of e4m3 -> eight fp32 tiles, the lowest first."""
    out = ()
    if FP4:
        for k in tl.static_range(8):
            out = out + (fp4.decode(codes, k),)  # type: ignore[assignment]
    else:
        out = from_e4m3(codes.to(tl.int32)) + from_e4m3((codes >> 32).to(tl.int32))
    return out


@triton.jit
def pair(low, high, PAIRS: tl.constexpr):
    """Two fp32 tiles -> an int32 of both in bf16, with the one NaN that torch writes."""
    if PAIRS:
        return tl.inline_asm_elementwise(
            turned.TO_BF16, "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1
        )
    a, b = turned.bits(low, False), turned.bits(high, False)
    return (a.to(tl.int32) & 0xFFFF) | (b.to(tl.int32) << 16)


@cached
@triton.jit
def kernel(
    values_ptr,
    scales_ptr,
    x_ptr,
    R,
    K,
    FP4: tl.constexpr,
    SWIZZLED: tl.constexpr,
    PAIRS: tl.constexpr,
    BN: tl.constexpr,
    REPEATS: tl.constexpr,
):
    BLOCK: tl.constexpr = 16 if FP4 else 32
    n = tl.program_id(1) * BN + tl.arange(0, BN)  # which eight elements of a row
    word = tl.program_id(1) * (BN * 4) + tl.arange(0, BN * 4)  # and which two
    blocks_in_row = K // BLOCK
    codes = ()
    scales = ()
    for i in tl.static_range(REPEATS):  # all are read before one is written
        r = tl.program_id(0) * REPEATS + i
        block = n // (BLOCK // 8)
        if SWIZZLED:
            at = swizzle.offset(r, block, (blocks_in_row + 3) // 4 * 4)
        else:
            at = r.to(tl.int64) * blocks_in_row + block
        live = (r < R) & (n < K // 8)
        code = tl.load(values_ptr + r.to(tl.int64) * (K // 8) + n, mask=live, other=0)
        codes = codes + (code,)  # type: ignore[assignment]
        scales = scales + (tl.load(scales_ptr + at, mask=live, other=0.0),)  # type: ignore[assignment]
    for i in tl.static_range(REPEATS):
        r = tl.program_id(0) * REPEATS + i
        scale = scales[i].to(tl.float32) if FP4 else mx.decoding(scales[i].to(tl.int32))
        v = eight(codes[i], FP4)
        words = ()
        for k in tl.static_range(4):
            both = pair(v[2 * k] * scale, v[2 * k + 1] * scale, PAIRS)
            words = words + (both,)  # type: ignore[assignment]
        four = turned.joined(turned.joined(words, 2), 1)[0]
        at = r.to(tl.int64) * (K // 2) + word
        tl.store(x_ptr + at, tl.reshape(four, (BN * 4,)), mask=(r < R) & (word < K // 2))


WIDE = 4096  # elements of a row that a program takes, where there are as many


def fill(values: Tensor, scales: Tensor, x: Tensor) -> Tensor:
    """Run the kernel into x[..., R, K], whose matrices follow each other."""
    K = x.shape[-1]
    if scales.dim() > 1 and x.numel() % WIDE == 0:
        K = WIDE  # rows follow each other, and so do their scales
    R = x.numel() // K
    codes = values.view(torch.int32 if is_fp4(values) else torch.int64)
    BN = 512 if K % WIDE == 0 else 256
    repeats = 2
    kernel[(cdiv(R, repeats), cdiv(K, BN * 8))](
        codes, scales, x.view(torch.int32), R, K,
        is_fp4(values), scales.dim() == 1, blocks.compares_pairs(x), BN, repeats, num_warps=8,
    )  # fmt: skip
    return x


def launch(values: Tensor, scales: Tensor) -> Tensor:
    if not fp8.runs_triton(values) or not values.numel():
        return reference(values, scales)
    return fill(values.contiguous(), scales.contiguous(), outputs(values, scales))


op = define(
    "dequantize(Tensor values, Tensor scales) -> Tensor",
    outputs=outputs,
    reference=reference,
    launch=launch,
)
agrees = same_bits


def samples(device: str) -> list[tuple[Any, ...]]:
    made = [
        args
        for args in quantize_mxfp8.samples(device)
        if args[1] == torch.float8_e4m3fn and args[0].dim() == 2
    ]
    plain = [quantize_mxfp8.reference(*args) for args in made]
    plain += [
        quantize_nvfp4.reference(x, amax_tensor.reference(x), None, 0)
        for x, element, floor in made
        if not floor
    ]
    every = torch.arange(256, device=device).to(torch.uint8)  # each scale, on each value
    codes = every.repeat(256, 1)
    plain += [
        (codes, every[:, None].expand(256, 32).contiguous().view(torch.float8_e4m3fn)),
        (codes.view(torch.float8_e4m3fn), every[:, None].expand(256, 8).contiguous()),
    ]
    return [*plain, *((values, swizzle.reference(scales)) for values, scales in plain)]
