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

from lpcompile.ops.define import define, round_up, same_bits

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
def kernel(scales_ptr, flat_ptr, R, C, CP, stride_e, stride_r, stride_c, SIZE, BLOCK: tl.constexpr):
    # By bytes of the output, which are written in order: 8 tiles read 32 bytes of each row.
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.program_id(1).to(tl.int64)
    tile = at // 512
    byte = (at % 512).to(tl.int32)
    r = (tile // (CP // 4)) * 128 + row_in_tile(byte)
    c = (tile % (CP // 4)) * 4 + byte % 4
    source = scales_ptr + expert * stride_e + r * stride_r + c * stride_c
    scale = tl.load(source, mask=(r < R) & (c < C), other=0)
    tl.store(flat_ptr + expert * SIZE + at, scale, mask=at < SIZE)


@triton.jit
def row_in_tile(byte):
    """The row of a tile's byte, 0 .. 511."""
    return byte % 16 // 4 * 32 + byte // 16


def launch(scales: Tensor) -> Tensor:
    return fill(scales[None], outputs(scales))


def fill(scales: Tensor, flat: Tensor) -> Tensor:
    """Run the kernel on scales[E, R, C], each expert's tiles after the last's."""
    E, R, C = scales.shape
    if flat.numel():
        size = flat.numel() // E
        kernel[(triton.cdiv(size, 4096), E)](
            scales.view(torch.uint8), flat.view(torch.uint8), R, C, round_up(C, COLUMNS),
            *scales.stride(), size, 4096, num_warps=4,
        )  # fmt: skip
    return flat


op = define("swizzle(Tensor scales) -> Tensor", outputs=outputs, reference=reference, launch=launch)
agrees = same_bits


def samples(device: str) -> list[tuple[Any, ...]]:
    shapes = [(128, 8), (300, 37), (1, 1), (129, 4), (640, 100), (0, 8), (48, 0)]
    made = [torch.randint(256, s, device=device, dtype=torch.uint8) for s in shapes]
    return [(s,) for s in made] + [(made[4].t(),), (made[1].view(torch.float8_e4m3fn),)]
