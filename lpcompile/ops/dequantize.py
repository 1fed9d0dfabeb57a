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
)
from lpcompile.ops.define import define, same_bits


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
def kernel(
    values_ptr,
    scales_ptr,
    x_ptr,
    R,
    K,
    FP4: tl.constexpr,
    SWIZZLED: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    BLOCK: tl.constexpr = 16 if FP4 else 32
    BYTES: tl.constexpr = BK // 2 if FP4 else BK
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    n = tl.program_id(1) * (BK // BLOCK) + tl.arange(0, BK // BLOCK)
    blocks_in_row = K // BLOCK
    if SWIZZLED:
        at = swizzle.offset(r[:, None], n[None, :], (blocks_in_row + 3) // 4 * 4)
    else:
        at = r[:, None].to(tl.int64) * blocks_in_row + n[None, :]
    scale = tl.load(
        scales_ptr + at, mask=(r < R)[:, None] & (n < blocks_in_row)[None, :], other=0.0
    )
    b = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    bytes_in_row = K // 2 if FP4 else K
    values = tl.load(
        values_ptr + r[:, None].to(tl.int64) * bytes_in_row + b[None, :],
        mask=(r < R)[:, None] & (b < bytes_in_row)[None, :],
        other=0.0,
    )
    if FP4:
        x = blocks.tile_scaled(fp4.tile_decode(values), scale.to(tl.float32))
    else:
        x = blocks.tile_scaled(values.to(tl.float32), mx.decoding(scale.to(tl.int32)))
    bits = x.to(tl.bfloat16).to(tl.int16, bitcast=True)
    bits = tl.where(x == x, bits, 0x7FC0)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    out = r[:, None].to(tl.int64) * K + k[None, :]
    tl.store(x_ptr + out, bits, mask=(r < R)[:, None] & (k < K)[None, :])


def fill(values: Tensor, scales: Tensor, x: Tensor) -> Tensor:
    """Run the kernel into x[..., R, K], whose matrices follow each other."""
    K = x.shape[-1]
    R = x.numel() // K
    BR, BK = 16, 256
    kernel[(triton.cdiv(R, BR), triton.cdiv(K, BK))](
        values, scales, x.view(torch.int16), R, K,
        is_fp4(values), scales.dim() == 1, BR, BK, num_warps=4,
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
