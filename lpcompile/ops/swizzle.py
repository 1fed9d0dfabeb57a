"""Scales in the tiles that block-scaled tensor cores read: scales[R, C] -> flat[Rp * Cp], bytes.

Padded with zeros to Rp, Cp, multiples of (128, 4). Tile (r // 128, c // 4) is 512 consecutive
bytes, tiles row-major; inside a tile, byte 16 * (r % 32) + 4 * (r % 128 // 32) + c % 4. Source:
cuBLAS documentation, "1D block scaling factors layout".
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lpcompile.ops.define import cdiv, define, round_up, same_bits
from lpcompile.ops.launcher import cached

ROWS, COLUMNS = 128, 4  # of a tile


def outputs(scales: Tensor) -> Tensor:
    R, C = scales.shape
    return scales.new_empty((round_up(R, ROWS) * round_up(C, COLUMNS),))


def reference(scales: Tensor) -> Tensor:
    return tiles(scales.view(torch.uint8)).flatten().view(scales.dtype)


def tiles(scales: Tensor) -> Tensor:
    """scales[R, C] bytes -> [Rp / 128, Cp / 4, 32, 4, 4]: row and column of tile, then in it."""
    R, C = scales.shape
    RP, CP = round_up(R, ROWS), round_up(C, COLUMNS)
    whole = scales.new_zeros((RP, CP))
    whole[:R, :C] = scales
    return whole.view(RP // ROWS, 4, 32, CP // COLUMNS, 4).permute(0, 3, 2, 1, 4).contiguous()


def unswizzled(flat: Tensor, R: int, C: int) -> Tensor:
    """The scales[R, C] that ``reference`` makes flat of."""
    RP, CP = round_up(R, ROWS), round_up(C, COLUMNS)
    cut = flat.view(torch.uint8).view(RP // ROWS, CP // COLUMNS, 32, 4, 4)
    whole = cut.permute(0, 3, 2, 1, 4).reshape(RP, CP)
    return whole[:R, :C].contiguous().view(flat.dtype)


@triton.jit
def offset(r, c, columns):
    """Where scale (r, c) stands in the tiles of a matrix of ``columns``, a multiple of 4."""
    tile = (r // 128).to(tl.int64) * (columns // 4) + c // 4
    return tile * 512 + (r % 32) * 16 + (r % 128 // 32) * 4 + c % 4


@triton.jit
def tiles_of(scales):
    """scales[128, BC] bytes -> flat[BC / 4 * 512]: the tiles of a strip, in a kernel."""
    N: tl.constexpr = scales.shape[1] // 4
    cut = tl.reshape(scales, (4, 32, N, 4))
    return tl.reshape(tl.permute(cut, (2, 1, 0, 3)), (N * 512,))


@cached
@triton.jit
def kernel(
    scales_ptr, flat_ptr, R, C, CP, stride_e, stride_r, stride_c, SIZE, BC: tl.constexpr
):  # fmt: skip
    expert, strip = tl.program_id(1).to(tl.int64), tl.program_id(0) // tl.cdiv(CP, BC)
    first = tl.program_id(0) % tl.cdiv(CP, BC) * BC
    r = strip * 128 + tl.arange(0, 128)
    c = first + tl.arange(0, BC)
    at = r[:, None].to(tl.int64) * stride_r + c[None, :].to(tl.int64) * stride_c
    live = (r < R)[:, None] & (c < C)[None, :]
    scales = tl.load(scales_ptr + expert * stride_e + at, mask=live, other=0)
    byte = first * 128 + tl.arange(0, BC * 128)
    to = flat_ptr + expert * SIZE + strip.to(tl.int64) * CP * 128
    tl.store(to + byte, tiles_of(scales), mask=byte < CP * 128)


def launch(scales: Tensor) -> Tensor:
    return fill(scales[None], outputs(scales))


def fill(scales: Tensor, flat: Tensor) -> Tensor:
    """Run the kernel on scales[E, R, C], each expert's tiles after the last's."""
    E, R, C = scales.shape
    if flat.numel():
        CP, BC = round_up(C, COLUMNS), 32
        kernel[(cdiv(R, ROWS) * cdiv(CP, BC), E)](
            scales.view(torch.uint8), flat.view(torch.uint8), R, C, CP,
            *scales.stride(), flat.numel() // E, BC, num_warps=4,
        )  # fmt: skip
    return flat


op = define("swizzle(Tensor scales) -> Tensor", outputs=outputs, reference=reference, launch=launch)
agrees = same_bits


def samples(device: str) -> list[tuple[Any, ...]]:
    shapes = [(128, 8), (300, 37), (1, 1), (129, 4), (640, 100), (0, 8), (48, 0)]
    made = [torch.randint(256, s, device=device, dtype=torch.uint8) for s in shapes]
    return [(s,) for s in made] + [(made[4].t(),), (made[1].view(torch.float8_e4m3fn),)]
