"""Quantize to MXFP8: x[R, C] bf16 -> values[R, Cp] e4m3, scales[R, Cp / 32] e8m0 as uint8.

One scale per 1x32. Cp is C rounded up to 32, and the padding is zero. Of x[E, R, C], a stack, every
matrix alone. Arithmetic: ``lpcompile.ops.mx``. The kernel serves the four MXFP8 quantizers: strides
say what is transposed, ROWS what shares.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lpcompile.ops import amax_column, blocks, fp8, micro_tile, mx, turned
from lpcompile.ops.define import cdiv, define, round_up, same_bits
from lpcompile.ops.launcher import cached
from lpcompile.ops.mx import BLOCK


def outputs(x: Tensor, element: torch.dtype, floor: bool) -> tuple[Tensor, Tensor]:
    *rows, C = x.shape
    CP = round_up(C, BLOCK)
    scales = x.new_empty((*rows, CP // BLOCK), dtype=torch.uint8)
    return x.new_empty((*rows, CP), dtype=element), scales


def reference(x: Tensor, element: torch.dtype, floor: bool) -> tuple[Tensor, Tensor]:
    return by_blocks(x, 1, element, floor)


def by_blocks(x: Tensor, rows: int, element: torch.dtype, floor: bool) -> tuple[Tensor, Tensor]:
    """x[R, C] with a scale per (rows, 32), repeated over the rows."""
    if x.dim() == 3:
        return blocks.stacked([by_blocks(one, rows, element, floor) for one in x])
    R, C = x.shape
    whole = blocks.padded(x, round_up(C, BLOCK))
    byte = mx.scale_byte(blocks.shared_amax(whole, rows, BLOCK), element, floor)
    values = fp8.cast(whole, blocks.spread(mx.encode_scale(byte), BLOCK), element)
    values.view(torch.uint8)[:, C:] = 0  # under a NaN scale too
    return values.contiguous(), byte.contiguous()


@cached
@triton.jit
def kernel(
    x_ptr,
    values_ptr,
    scales_ptr,
    R: tl.int32,
    C: tl.int32,
    stride_e,
    stride_r,
    stride_c,
    LIMIT: tl.constexpr,
    EXPONENT: tl.constexpr,
    ELEMENT: tl.constexpr,
    FLOOR: tl.constexpr,
    ROWS: tl.constexpr,
    NATIVE: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    RUN: tl.constexpr,
    EVEN: tl.constexpr,
):
    e = tl.program_id(2).to(tl.int64)
    x_ptr += e * stride_e
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    first = tl.program_id(1) * BC
    x = turned.load(x_ptr, r, first, R, C, stride_r, stride_c, BC, RUN, EVEN)
    micro_tile.store_mx(
        x, e * R + r, r < R, first, C, values_ptr, scales_ptr,
        LIMIT, EXPONENT, ELEMENT, FLOOR, ROWS, False, NATIVE, EVEN,
    )  # fmt: skip


# (transposed, shared by rows) -> tile (BR, BC), RUN, warps
TILES = {
    (False, False): (4, 1024, 1, 4),
    (False, True): (32, 512, 1, 8),
    (True, False): (64, 256, 32, 8),
    (True, True): (64, 256, 32, 8),
}


def fill(
    x: Tensor, made: tuple[Tensor, Tensor], element: torch.dtype, floor: bool, rows: int
) -> tuple[Tensor, Tensor]:
    """Run the kernel on x[..., R, C], whatever its strides, into ``made``."""
    values, scales = made
    x = fp8.stack(x)
    E, R, C = x.shape
    BR, BC, run, warps = TILES[blocks.is_turned(x), rows > 1]
    kernel[(cdiv(R, BR), cdiv(C, BC), E)](
        x, values, scales, R, C, *x.stride(),
        fp8.MAX[element], mx.EXPONENT[element], fp8.TRITON[element], floor, rows,
        blocks.runs_native(x), BR, BC, run, R % BR == 0 and C % BC == 0, num_warps=warps,
    )  # fmt: skip
    return made


def launch(x: Tensor, element: torch.dtype, floor: bool) -> tuple[Tensor, Tensor]:
    if not fp8.runs_triton(x) or not x.numel():
        return reference(x, element, floor)
    return fill(x, outputs(x, element, floor), element, floor, rows=1)


op = define(
    "quantize_mxfp8(Tensor x, ScalarType element, bool floor) -> (Tensor, Tensor)",
    outputs=outputs,
    reference=reference,
    launch=launch,
)
agrees = same_bits


def samples(device: str) -> list[tuple[Any, ...]]:
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    large = torch.randn(160, 288, device=device, dtype=torch.bfloat16)
    # Rows of every magnitude that bf16 has: 2^-133, its smallest, to 2^127.
    spread = torch.randn(261, 64, device=device, dtype=torch.bfloat16).clamp(-1.9, 1.9)
    powers = torch.arange(-133, 128, device=device)[:, None]
    spread = torch.ldexp(spread.double(), powers).to(torch.bfloat16)
    experts = torch.randn(3, 41, 83, device=device, dtype=torch.bfloat16)
    inputs = [large, large.t(), spread, spread.t(), experts, experts.mT]
    return [
        (x, element, floor)
        for x in (*inputs, *amax_column.matrices(device))
        for element, floor in ((e4m3, False), (e4m3, True), (e5m2, False))
    ]
