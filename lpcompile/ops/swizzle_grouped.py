"""``swizzle`` of groups of rows: scales[T, C], offs[E] -> [Tp, Cp], bytes.

What a grouped GEMM reads of X in fprop and of dY in dgrad. Each group's rows are padded with zeros
to a multiple of 128 and tiled on their own, one group's tiles after the last's. Tp is T rounded up
to 128, plus 128 for each group; the tail is zero. Rows past offs[-1] reach nothing.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lpcompile.ops import groups, swizzle
from lpcompile.ops.define import define, round_up, same_bits
from lpcompile.ops.swizzle import COLUMNS, ROWS

agrees = same_bits


def outputs(scales: Tensor, offs: Tensor) -> Tensor:
    T, C = scales.shape
    rows = groups.padded_length(T, offs.shape[0], ROWS)
    return scales.new_empty((rows, round_up(C, COLUMNS)))


def reference(scales: Tensor, offs: Tensor) -> Tensor:
    flat = torch.zeros_like(outputs(scales, offs), dtype=torch.uint8)
    at = 0
    for rows in groups.slices(offs):
        tiles = swizzle.tiles(scales[rows].view(torch.uint8)).flatten()
        flat.view(-1)[at : at + tiles.numel()] = tiles
        at += tiles.numel()
    return flat.view(scales.dtype)


@triton.jit
def kernel(
    scales_ptr, offs_ptr, flat_ptr, E, C, CP, stride_t, stride_c, EP: tl.constexpr,
):  # fmt: skip
    # A program writes 8 tiles side by side.
    starts, ends = groups.load(offs_ptr, E, EP)
    strip = tl.program_id(0)
    _, first, last, index, _ = groups.locate(strip, starts, ends, 128, 128, EP)
    at = tl.arange(0, 4096)
    byte = at % 512
    tile = tl.program_id(1) * 8 + at // 512
    t = first + index * 128 + swizzle.row_in_tile(byte)
    c = tile * 4 + byte % 4
    source = scales_ptr + t.to(tl.int64) * stride_t + c.to(tl.int64) * stride_c
    scale = tl.load(source, mask=(t < last) & (c < C), other=0)
    to = (strip.to(tl.int64) * (CP // 4) + tile) * 512 + byte
    tl.store(flat_ptr + to, scale, mask=tile < CP // 4)


def launch(scales: Tensor, offs: Tensor) -> Tensor:
    flat = outputs(scales, offs)
    if flat.numel():
        (TP, CP), E = flat.shape, offs.shape[0]
        kernel[(TP // ROWS, triton.cdiv(CP, 8 * COLUMNS))](
            scales.view(torch.uint8), offs, flat.view(torch.uint8), E, scales.shape[1], CP,
            *scales.stride(), triton.next_power_of_2(E), num_warps=4,
        )  # fmt: skip
    return flat


op = define(
    "swizzle_grouped(Tensor scales, Tensor offs) -> Tensor",
    outputs=outputs,
    reference=reference,
    launch=launch,
)


def samples(device: str) -> list[tuple[Any, ...]]:
    def of(*ends: int) -> Tensor:
        return torch.tensor(ends, device=device, dtype=torch.int32)

    x = torch.randint(256, (333, 37), device=device, dtype=torch.uint8)
    return [
        (x, of(0, 1, 17, 150, 150, 333)),
        (x, of(128, 256)),
        (x, of(16, 16, 200)),
        (x.t(), of(10, 37)),
        (x, of(0, 0, 0)),
        (x, of(333)),
        (x[:0], of(0, 0)),
        (x, of(*range(1, 65), 320)),
        (x.view(torch.float8_e4m3fn), of(16, 16, 200)),
    ]
